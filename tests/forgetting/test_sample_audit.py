"""Audits of single images: figures by hand, and gold in place of unseen images where there is one."""

import math

import pytest
import torch
from tiny_digits import images

from postgrad.errors import DataError
from postgrad.forgetting.leakage import Pass
from postgrad.forgetting.leakage_audit import Views
from postgrad.forgetting.membership import Sides, auc_difference, auc_interval
from postgrad.forgetting.sample_audit import Scope, audit_samples, rows_of, unseen_rows
from postgrad.forgetting.schedules import TaskSplit

SCOPE = Scope(TaskSplit((0, 1), (), (2,)), rows=(0, 2), unseen=(0, 1))
TEST = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
TRAIN = torch.tensor([0, 0, 0, 1])


def views(train: list[float], test: list[float]) -> Views:
    """Give images the log odds of their own class: three logits, 0 of the others less log 2."""

    def shown(odds: list[float], labels: torch.Tensor) -> Pass:
        logits = torch.full((len(labels), 3), -math.log(2))
        logits[torch.arange(len(labels)), labels] = torch.tensor(odds)
        return Pass(torch.zeros(len(labels), 1), logits, labels)

    return Views(shown(train, TRAIN), shown(test, TEST))


OURS = views([3.0, 9.0, -3.0, 9.0], [2.0, 1.0, 5.0, -5.0, 1.0, 1.0, -9.0, -9.0])
BASE = views([9.0, 9.0, 9.0, 9.0], [2.0, 1.0, 5.0, 5.0, 1.0, -5.0, 1.0, 1.0])
GOLD = views([2.5, 9.0, -4.0, 9.0], [2.0, 1.0, 5.0, 5.0, 1.0, 1.0, -9.0, -9.0])


def test_without_gold_unseen_images_are_what_counts() -> None:
    """One of two images is named, 3 of 4 unseen ones of class 0, 5 of 6 of kept classes; of odds 3 and -3 one in two
    beats 2 and 1."""
    found = audit_samples("ours", OURS, BASE, None, SCOPE)
    assert (found.acc_f.value, found.acc_h.value, found.acc_f_pretrained) == (50.0, 75.0, 100.0)
    assert found.acc_r.value == pytest.approx(100 * 5 / 6) and found.acc_r_pretrained == pytest.approx(100 * 5 / 6)
    assert found.acc_o is not None and found.acc_o.value == 0.0
    assert found.acc_excess.value == -25.0 and found.acc_excess.low < -25 < found.acc_excess.high
    assert found.membership.value == 0.5 and found.mia_excess.value == 0.0 and found.mia_pretrained == 1.0
    figures = found.figures()
    assert figures["mia_auc_low"] < 0.5 < figures["mia_auc_high"] and "mia_gold" not in figures
    assert figures["acc_h_pretrained"] == 100.0 and all(map(math.isfinite, figures.values()))


def test_with_gold_it_is_gold() -> None:
    found = audit_samples("ours", OURS, BASE, GOLD, SCOPE)
    assert found.acc_f_gold == 50.0 and found.acc_excess.value == 0.0 and found.mia_gold == 0.5
    sides = Sides(torch.tensor([3.0, -3.0]), torch.tensor([2.0, 1.0]))
    theirs = Sides(torch.tensor([2.5, -4.0]), torch.tensor([2.0, 1.0]))
    assert found.membership == pytest.approx(auc_interval(sides))
    assert found.mia_excess == pytest.approx(auc_difference(sides, theirs))
    base = audit_samples("base", BASE, BASE, GOLD, SCOPE)
    assert base.acc_excess.value == 50.0 and base.mia_excess.value == 0.5


def test_a_single_image_has_no_interval_of_its_own_but_figures() -> None:
    found = audit_samples("ours", OURS, BASE, None, Scope(TaskSplit((0, 1, 2), ()), rows=(0,), unseen=(0,)))
    assert found.acc_o is None and found.membership.value == 1.0
    assert all(map(math.isfinite, found.figures().values())) and found.figures()["acc_f"] == 100.0


def test_images_are_found_by_their_content() -> None:
    train, test = images()
    assert rows_of([], train) == () == rows_of(["0" * 16], train)
    wanted = [train.hashes[5], train.hashes[2]]
    assert {2, 5} <= set(rows_of(wanted, train)) and {train.hashes[row] for row in rows_of(wanted, train)} == {*wanted}
    first, second = unseen_rows(test, (3, 5))
    assert not set(first) & set(second)
    every = [row for row in range(len(test)) if int(test.labels[row]) in (3, 5)]
    assert sorted((*first, *second)) == every and first and second
    one = test.select(every[:1])
    assert unseen_rows(one, (3, 5)) == ((0,), (0,))
    with pytest.raises(DataError, match="expected some, found none"):
        unseen_rows(one, (7,))
