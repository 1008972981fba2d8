"""Class orders, splits, schedules and published settings: the reference lists, exactly."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.errors import ConfigError
from postgrad.forgetting.schedules import (
    COCO_IDS,
    PRESETS,
    TaskSplit,
    alpha_schedule,
    class_order,
    coco_class_order,
    lora_gain,
    paper_lr,
    retrain_lr,
    single_split,
    task_splits,
)


@pytest.fixture(scope="module")
def case(shared):
    return json.loads((shared / "oracles/forget_schedule.json").read_text())


def test_orders_equal_the_reference(case):
    assert list(class_order()) == case["face_class_order_seed1337"]
    assert list(coco_class_order()) == case["coco_class_order_seed123"]
    assert len(COCO_IDS) == 80


@pytest.mark.parametrize(("key", "num_missing"), [("face_4x20", 0), ("face_4x20_missing5", 5)])
def test_splits_equal_the_reference(case, key, num_missing):
    splits = task_splits(class_order(), 80, 20, 4, num_missing)
    assert len(splits) == len(case[key])
    for split, want in zip(splits, case[key], strict=True):
        assert list(split.forget) == want["forget"]
        assert list(split.old) == want["old"]
        assert list(split.missing) == want["missing"]
        assert list(split.remain) == want.get("remain", list(split.remain))


@pytest.mark.parametrize("num", [5, 10, 50, 90])
def test_single_splits_equal_the_reference(case, num):
    split = single_split(class_order(), num)
    assert list(split.forget) == case[f"single_100-{num}_forget"]
    assert split.old == split.missing == ()
    assert [*split.remain, *split.forget] == case["face_class_order_seed1337"]


def test_replayed_classes_are_kept_and_have_data():
    split = TaskSplit(remain=(4, 1, 2), forget=(3,), missing=(4,))
    assert split.replayed == (1, 2)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 3), st.integers(0, 3))
def test_a_split_deals_out_every_class_once(per, num, num_missing, spare):
    first = num_missing + 1 + per * (num - 1) + spare
    order = class_order(first + per, 0)
    splits = task_splits(order, first, per, num, num_missing)
    for split in splits:
        assert [*split.remain, *split.forget, *split.old] == list(order)
        assert set(split.missing) <= set(split.remain) and split.replayed
    for before, after in pairwise(splits):
        assert after.old == before.forget + before.old


@pytest.mark.parametrize(
    ("first", "per", "num", "missing"), [(90, 20, 1, 0), (80, 20, 5, 0), (80, 20, 4, 20), (80, 0, 1, 0), (80, 20, 0, 0)]
)
def test_splits_that_do_not_fit_are_refused(first, per, num, missing):
    with pytest.raises(ConfigError, match="found 100 classes"):
        task_splits(class_order(), first, per, num, missing)


def test_learning_rates_equal_the_reference(case):
    want = case["lr_gs_lora"]["lr_by_epoch"]
    assert [paper_lr(epoch) for epoch in range(100)] == pytest.approx(want, rel=1e-9, abs=1e-15)
    retrain = case["lr_retrain"]
    assert [retrain_lr(epoch) for epoch in range(12)] == pytest.approx(retrain["lr_by_epoch_first12"], rel=1e-9)
    assert retrain_lr(99) == pytest.approx(retrain["last"], rel=1e-9)


def test_alpha_by_kind():
    single, missing = alpha_schedule("paper-single"), alpha_schedule("warmup", 30, 0.015)
    assert [single(epoch) for epoch in (0, 19, 20, 99)] == [0, 0, 0.01, 0.01]
    assert [missing(epoch) for epoch in (0, 29, 30, 99)] == [0, 0, 0.015, 0.015]
    assert [alpha_schedule("paper-continual")(epoch) for epoch in (0, 99)] == [1e-4, 1e-4]
    assert alpha_schedule("paper-single", 1, 0.5)(1) == 0.5
    assert alpha_schedule("paper-single", 0)(0) == 0.01
    assert alpha_schedule("constant", value=0.2)(0) == 0.2


@pytest.mark.parametrize(
    ("kind", "start", "value", "told"),
    [
        ("warmup", 3, None, "a value and a start"),
        ("warmup", None, 0.1, "a value and a start"),
        ("constant", None, None, "a value;"),
        ("constant", 2, 0.1, "has no start, found 2"),
        ("paper-continual", 2, None, "has no start, found 2"),
    ],
)
def test_alpha_that_is_half_said_is_refused(kind, start, value, told):
    with pytest.raises(ConfigError, match=told):
        alpha_schedule(kind, start, value)


def test_first_and_later_draws_of_a_equal_the_reference(case):
    want = case["lora_A_init_bound"]
    gains = [lora_gain(task) for task in (0, 1)]
    assert [gain / math.sqrt(512) for gain in gains] == pytest.approx(want["example_fan_in_512"], rel=1e-6)
    # A block's two A have r * fan_in values each, of variance gain^2 / (3 fan_in); B is 0.
    norms = [gain * math.sqrt(2 * 8 / 3) for gain in gains]
    expected = [want["expected_block_norm_at_first_init_face"], want["expected_block_norm_after_reinit_face"]]
    assert norms == pytest.approx(expected, rel=1e-9)
    assert want["measured_block_norms_one_random_init"] == pytest.approx([norms[0]] * 6, rel=0.02)


def test_presets_give_each_request_its_objective():
    shots = PRESETS["continual-face-4shot"]
    assert [shots.objective(task).beta for task in range(4)] == [0.3, 0.4, 0.28, 0.2]
    assert [shots.objective(task).weight_forget for task in range(4)] == [0.015, 0.06, 0.025, 0.012]
    assert shots.objective(1).bound_prototype == 50
    assert [PRESETS["continual-face"].objective(task).weight_forget for task in range(4)] == [0.01] * 4
    with pytest.raises(ConfigError, match="has 4 requests, found request 5"):
        shots.objective(4)


def test_presets_hold_the_published_values():
    single, deep = PRESETS["single-face"], PRESETS["single-face-12"]
    assert (single.bound, single.beta, single.alpha, single.alpha_start) == (110, (0.05,), 0.01, 20)
    assert (deep.beta, deep.weight_forget, deep.weight_retain) == ((0.03,), (0.001,), 0.001)
    assert [PRESETS[name].weight_retain for name in PRESETS if name != "single-face-12"] == [0.0] * 8
    detector = PRESETS["continual-detector"]
    assert (detector.bound, len(detector.beta), detector.lr, detector.epochs) == (15, 7, 3e-4, 30)
    assert {(preset.rank, preset.lora_alpha) for preset in PRESETS.values()} == {(8, 1)}
    with pytest.raises(TypeError):
        PRESETS["mine"] = single
