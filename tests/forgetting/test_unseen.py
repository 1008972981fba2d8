"""Single images: levels by hand, terms that stop there, and erasing that leaves the class known."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_digits import PLAIN, base_config, drawn, images, job, quick

from postgrad.core.vision import ImageSet
from postgrad.core.vision_models import Classifier
from postgrad.errors import DataError
from postgrad.forgetting.base import train_base
from postgrad.forgetting.batches import Pair
from postgrad.forgetting.erase import Material, erase
from postgrad.forgetting.losses import Batch, ObjectiveConfig
from postgrad.forgetting.unseen import HOLD, UnseenTerms, halves, log_odds, plain, unseen_levels
from postgrad.forgetting.views import View

NONE = torch.empty(0, dtype=torch.int64)


def test_log_odds_by_hand() -> None:
    """Logits log 8, log 1, log 1: p = 8 / 10 of the first, so its log odds are log 4; of the second log (1 / 9)."""
    logits = torch.tensor([[8.0, 1.0, 1.0]]).log().expand(2, 3)
    found = log_odds(logits, torch.tensor([0, 1]))
    assert found.tolist() == pytest.approx([math.log(4), math.log(1 / 9)])
    sure = log_odds(torch.tensor([[200.0, 0.0]]), torch.tensor([0]))
    assert sure.item() == 200.0, "a loss would be 0 there, without a slope"


def test_levels_are_the_quantiles_of_ones_rank() -> None:
    """Two images of class 0 get the quantiles 1/4 and 3/4 of 0, 1, 2, 3, 4; the one of class 1 the median of 6, 8."""
    odds, labels = torch.tensor([9.0, 7.0, 5.0]), torch.tensor([0, 1, 0])
    unseen, others = torch.tensor([4.0, 3.0, 8.0, 2.0, 1.0, 6.0, 0.0]), torch.tensor([0, 0, 1, 0, 0, 1, 0])
    assert unseen_levels(odds, labels, unseen, others).tolist() == [3.0, 7.0, 1.0]
    alone = unseen_levels(odds[:1], torch.tensor([2]), unseen, others)
    assert alone.tolist() == [3.0], "a class without unseen images takes the median of all"
    with pytest.raises(DataError, match="found none"):
        unseen_levels(odds, labels, unseen[:0], NONE)


def test_terms_push_down_to_the_level_and_hold_the_rest() -> None:
    """Odds 2 and -1 to forget with level 0: mean (2, 0) = 1. Retained 1 instead of 3: 2, and 4 instead of 3 is fine."""
    odds = torch.tensor([2.0, -1.0], requires_grad=True)
    gone = Batch(torch.zeros(2, 1), torch.stack([odds, torch.zeros(2)], 1), torch.zeros(2, dtype=torch.int64))
    kept = Batch(torch.zeros(2, 1), torch.tensor([[1.0, 0.0], [4.0, 0.0]]), torch.zeros(2, dtype=torch.int64))
    terms = UnseenTerms(torch.tensor([9.0, 0.0, 0.0]), torch.tensor([3.0, 3.0]))
    found = terms.losses(Pair(torch.tensor([0, 1]), torch.tensor([1, 2])), gone, kept)
    assert found["unseen"].item() == 1.0 and found["hold"].item() == HOLD
    found["unseen"].backward()
    assert odds.grad is not None and odds.grad.tolist() == [0.5, 0.0], "below its level an image is left alone"
    assert replace(terms, levels=torch.zeros(2)).above(gone.logits, gone.labels) == 1.0


def test_the_objective_loses_what_pushes_whole_classes() -> None:
    found = plain(ObjectiveConfig(beta=0.2, alpha=0.003, weight_forget=0.01, weight_retain=0.01))
    assert (found.beta, found.alpha, found.weight_forget, found.weight_retain) == (0.0, 1e-4, 0.0, 0.0)
    assert plain(ObjectiveConfig(alpha=0.0)).alpha == 0.0


def test_images_are_parted_by_what_is_in_them() -> None:
    even = halves(images()[1])
    order = torch.arange(len(even)).flip(0)
    assert 0 < int(even.sum()) < len(even) and torch.equal(halves(images()[1].select(order)), even.flip(0))


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    """Train until the images are known by heart."""
    classifier = drawn()
    train_base(classifier, images()[0], base_config(25), job(tmp_path_factory.mktemp("base")))
    return classifier.eval()


def odds(classifier: Classifier, part: ImageSet) -> torch.Tensor:
    return log_odds(View(classifier, part).see_all().logits, part.labels)


@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
def test_erasing_ends_at_the_level_of_unseen_images(overfitted: Classifier, together: bool, tmp_path: Path) -> None:
    train, test = images()
    rows = [*range(0, len(train), 20)]
    forget = train.select(rows)
    retain = train.select([row for row in range(len(train)) if row not in rows])
    levels = unseen_levels(odds(overfitted, forget), forget.labels, odds(overfitted, test), test.labels)
    before = (odds(overfitted, forget) - levels).relu().mean().item()
    config = replace(quick(PLAIN, epochs=30), together=together, blocks=2)
    found = erase(overfitted, Material(forget, retain, levels=levels), "request-1", (), config, job(tmp_path))
    after = (odds(overfitted, forget) - levels).relu().mean().item()
    assert found.figures["above_unseen"] == pytest.approx(after, abs=1e-5) and after < 0.1 < before
    assert found.figures["forget_accuracy"] > 50, "not pushed to wrong answers"
    assert found.figures["lost"] <= 1.0 and "leak_found" not in found.figures
    from postgrad.core.layer_adapters import drop

    drop(overfitted.network, "request-1")
