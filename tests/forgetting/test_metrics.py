"""Forgetting metrics: hand values, the reference numbers and the published tables."""

import json
import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postgrad.core.metrics import wilson_interval
from postgrad.errors import DataError
from postgrad.forgetting.metrics import (
    ClassDrop,
    acc_table,
    accuracy,
    class_accuracy,
    drop,
    gold_gap,
    h_mean,
    worst_drops,
)
from postgrad.forgetting.schedules import TaskSplit


def test_h_means_equal_the_reference(shared):
    for one in json.loads((shared / "oracles/forget_metrics.json").read_text())["h_mean"]:
        lost = drop(one["acc_f_before"], one["acc_f"])
        assert lost == one["drop"]
        assert h_mean(one["acc_r"], lost, "continual") == pytest.approx(one["continual"], abs=1e-12)
        single = 0.0 if one["single_step"] == "ZeroDivisionError" else one["single_step"]
        assert h_mean(one["acc_r"], lost) == pytest.approx(single, abs=1e-12)


@pytest.mark.parametrize("lost", [0.0, -10.0])
def test_an_h_mean_without_a_value_is_zero(lost):
    assert h_mean(-lost, lost) == 0.0


def columns(index, missing):
    """Where a task's numbers lie in a row of a continual table: the first task has no Acc_o."""
    width = 5 if missing else 4
    return 0 if index == 0 else index * width - 1


def cells(tables):
    """Yield (table, setting, method, task, printed H, its formula) of every printed H."""
    for key, table in tables.items():
        if not key.startswith("table"):
            continue
        for setting, (method, task) in product(("full", "few_shot_4"), product(table.get("full", ()), range(4))):
            if setting not in table:
                continue
            row = table[setting][method]
            at = 3 * task if "single" in key else columns(task, "missing" in key)
            printed, acc_r, acc_f = row[at : at + 3]
            yield key, setting, method, task, printed, h_mean(acc_r, drop(table["pretrain"]["Accf"][task], acc_f))


def test_published_h_means_follow_the_formula_with_three_exceptions(shared):
    tables = json.loads((shared / "oracles/forget_published_tables.json").read_text())
    found = list(cells(tables))
    wrong = [(key[:6], method.rstrip("*"), task) for key, _, method, task, got, want in found if abs(got - want) > 0.02]
    tasks = {"100-5": 0, "100-20": 0, "60-20": 2}
    listed = [(table, method, tasks[task]) for table, method, task, _ in tables["consistency"]["exceptions"]]
    assert wrong == listed == [("table2", "LwF", 0), ("table3", "GS-LoRA++", 0), ("table5", "MAS", 2)]
    assert len(found) == tables["consistency"]["checked_cells"] == 308
    assert len(found) - len(wrong) == tables["consistency"]["matching_within_0.02"]


def test_accuracy_by_hand():
    """3 of 4 right: 75 %, with Wilson's 95 % interval of 30.1 to 95.4 %."""
    got = accuracy(torch.tensor([1, 2, 0, 0]), torch.tensor([1, 2, 0, 1]))
    assert got.value == 75.0
    assert (got.low, got.high) == pytest.approx((30.06, 95.44), abs=0.01)
    assert got == pytest.approx([100 * x for x in wilson_interval(3, 4)])


def test_no_image_has_no_accuracy():
    none = torch.zeros(0, dtype=torch.long)
    with pytest.raises(DataError, match="at least one image"):
        accuracy(none, none)


def test_class_accuracies_and_worst_drops_by_hand():
    labels = torch.tensor([0, 0, 1, 1, 3])
    before = class_accuracy(labels, labels, 5)
    after = class_accuracy(torch.tensor([0, 1, 2, 2, 4]), labels, 5)
    assert before[[0, 1, 3]].tolist() == [100, 100, 100] and after[[0, 1, 3]].tolist() == [50, 0, 0]
    assert before[[2, 4]].isnan().all() and after[[2, 4]].isnan().all()
    assert worst_drops(before, after, range(5), 2) == [ClassDrop(1, 100.0, 0.0), ClassDrop(3, 100.0, 0.0)]
    assert [one.label for one in worst_drops(before, after, [0, 1, 2])] == [1, 0]
    assert worst_drops(before, after, [0])[0].drop == 50.0


def test_gold_gap_by_hand():
    """Gaps 2, 10 and 0 points: 0.98 * 0.90 * 1 = 0.882, mean 4."""
    found = gold_gap({"forget": 2.0, "retain": 80.0, "test": 70.0}, {"forget": 0.0, "retain": 90.0, "test": 70.0})
    assert found.gaps == {"forget": 2.0, "retain": 10.0, "test": 0.0}
    assert (found.tow, found.mean) == pytest.approx((0.882, 4.0))
    same = gold_gap({"forget": 1.0}, {"forget": 1.0})
    assert (same.tow, same.mean) == (1.0, 0.0)


@pytest.mark.parametrize(("ours", "gold"), [({"forget": 1.0}, {"retain": 1.0}), ({}, {})])
def test_gold_gap_needs_the_same_accuracies(ours, gold):
    with pytest.raises(DataError, match="measure both alike"):
        gold_gap(ours, gold)


LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def test_a_request_is_measured_by_hand():
    """Kept 0 and 1 (1 without data), forgotten 2, earlier 3."""
    split = TaskSplit(remain=(0, 1), forget=(2,), old=(3,), missing=(1,))
    start = torch.tensor([0, 0, 1, 1, 2, 0, 3, 0])
    after = torch.tensor([0, 0, 1, 0, 0, 0, 0, 0])
    table = acc_table(LABELS, after, split, pretrained=LABELS, start=start)
    assert (table.acc_r.value, table.acc_f.value, table.acc_o.value, table.acc_m.value) == (75, 0, 0, 50)
    assert (table.acc_r_pretrained, table.acc_f_pretrained) == (100, 100)
    assert (table.acc_r_start, table.acc_f_start) == (100, 50)
    assert (table.drop, table.drop_start) == (100, 50)
    assert (table.h, table.h_start) == pytest.approx((2 * 75 * 100 / 175, 2 * 75 * 50 / 125))
    row = table.row()
    assert row["acc_m"] == 50 and row["acc_r_low"] == table.acc_r.low and row["h"] == table.h
    assert all(isinstance(value, float) and math.isfinite(value) for value in row.values())


def test_a_first_request_has_no_earlier_classes():
    table = acc_table(LABELS, LABELS, TaskSplit((0, 1, 2), (3,)), pretrained=LABELS, start=LABELS)
    assert table.acc_o is None and table.acc_m is None
    assert table.h == table.h_start == 0.0
    assert "acc_o" not in table.row() and "acc_m_low" not in table.row()


@given(st.floats(0.01, 100.0), st.floats(0.01, 100.0))
def test_an_h_mean_lies_between_and_is_symmetric(kept, lost):
    value = h_mean(kept, lost)
    assert min(kept, lost) * (1 - 1e-9) <= value <= max(kept, lost) * (1 + 1e-9)
    assert value == pytest.approx(h_mean(lost, kept))
    assert value == pytest.approx(h_mean(kept, lost, "continual"), rel=1e-6)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_the_accuracy_is_the_mean_over_images_of_the_class_accuracies(pairs):
    predicted, labels = (torch.tensor(side) for side in zip(*pairs, strict=True))
    each = class_accuracy(predicted, labels, 4)
    whole = accuracy(predicted, labels)
    weights = torch.bincount(labels, minlength=4).double() / len(labels)
    assert whole.value == pytest.approx(float((each.nan_to_num() * weights).sum()))
    assert 0 <= whole.low <= whole.value <= whole.high <= 100
