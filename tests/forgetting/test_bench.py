"""What models are measured with: whose images, which references, and how classes are taught again."""

from dataclasses import replace

import pytest
import torch
from tiny_digits import images, taught

from postgrad.errors import DataError
from postgrad.forgetting.bench import Bench, Shown, beside, left, levels_for, relearned, scopes_of
from postgrad.forgetting.leakage_audit import Audit, AuditConfig
from postgrad.forgetting.relearn import RelearnConfig
from postgrad.forgetting.request import ForgetRequest
from postgrad.forgetting.sample_audit import SampleAudit, Scope
from postgrad.forgetting.schedules import TaskSplit
from postgrad.forgetting.unseen import log_odds
from postgrad.forgetting.views import View, passes

TRAIN, TEST = images()
ROWS = (0, 3, 6)
SINGLE = ForgetRequest(id="s", samples=tuple(TRAIN.hashes[row] for row in ROWS))
WHOLE = ForgetRequest(id="w", classes=("8",))
ALL = TaskSplit(tuple(range(10)), ())
EIGHT = TaskSplit((0, 1, 2, 3, 4, 5, 6, 7, 9), (8,))
QUICK = RelearnConfig(shots=4, steps=3, batch=8)


def scopes() -> list[Scope]:
    return scopes_of([SINGLE, WHOLE], [ALL, EIGHT], (TRAIN, TEST))


def test_scopes_say_which_images_a_request_is_about() -> None:
    first, second = scopes()
    assert set(first.rows) == set(ROWS) and not first.gone and set(second.gone) == set(ROWS) and not second.rows
    assert first.unseen and {int(TEST.labels[row]) for row in first.unseen} <= {int(TRAIN.labels[row]) for row in ROWS}
    later = scopes_of([WHOLE], [EIGHT], (TRAIN, TEST), [SINGLE])
    assert later == [second]
    with pytest.raises(DataError, match="asked for by request 's' already"):
        scopes_of([replace(SINGLE, id="t")], [ALL], (TRAIN, TEST), [SINGLE])


def test_gold_learns_from_what_is_left() -> None:
    first, second = scopes()
    assert len(left(TRAIN, first)) == len(TRAIN) - 3
    assert 8 not in left(TRAIN, second).labels.tolist()
    assert torch.equal(left(TRAIN, Scope(EIGHT)).images, TRAIN.of_classes(EIGHT.remain).images)


def test_single_images_are_added_where_they_are_not_among_the_others() -> None:
    some = TRAIN.select([0, 1, 2])
    both = beside(some, TRAIN, scopes()[0])
    assert both.hashes == (*some.hashes, TRAIN.hashes[3], TRAIN.hashes[6])
    assert beside(some, TRAIN, scopes()[1]).hashes == some.hashes


def test_levels_come_from_the_half_that_does_not_measure() -> None:
    model, forget = taught(), TRAIN.select(list(ROWS))
    levels = levels_for(model, forget, TEST)
    used = [row for row in range(len(TEST)) if row not in scopes()[0].unseen]
    assert torch.equal(levels, levels_for(model, forget, TEST.select(used)))
    unseen = log_odds(View(model, TEST).see_all().logits, TEST.labels)
    assert unseen.min() <= levels.min() and levels.max() <= unseen.max()


def test_classes_are_taught_again_among_others() -> None:
    """None for single images or where it is off; few images of a class are enough."""
    model = taught()
    found = relearned(model, images(), Scope(EIGHT), QUICK, 3)
    assert found is not None and found.images == (0, 8, 16, 24)
    assert relearned(model, images(), Scope(EIGHT), replace(QUICK, steps=0), 3) is None
    assert relearned(model, images(), scopes()[0], QUICK, 3) is None
    sparse = (TRAIN.select([*range(0, len(TRAIN), 8)]), TEST)
    assert relearned(model, sparse, Scope(EIGHT), replace(QUICK, shots=50), 3) is not None


def test_each_kind_has_its_audit_and_references() -> None:
    model = taught()
    shown = [Shown(passes(model, images()), relearned(model, images(), each, QUICK, 3)) for each in scopes()]
    config = AuditConfig(svc=False, relearn=QUICK)
    bench = Bench(config, images(), [SINGLE, WHOLE], scopes(), model, shown, 3)
    assert bench.splits == [ALL, EIGHT] and list(bench.references) == [1]
    single, whole = (bench.outcome("ours", model, number) for number in range(2))
    assert isinstance(single, SampleAudit) and isinstance(whole, Audit)
    assert single.acc_excess.value == 0.0 and single.mia_excess.value == 0.0, "gold is the same model here"
    assert whole.knn.excess is not None and whole.knn.excess.value == 0.0
    assert whole.relearned == whole.relearned_gold is not None
    assert isinstance(bench.reference("gold", 1), Audit) and isinstance(bench.reference("base", 0), SampleAudit)
    alone = replace(bench, gold=[])
    without = alone.outcome("ours", model, 1)
    assert isinstance(without, Audit) and without.relearned_gold is None and without.relearned is not None
