"""Figures of a judge, worked out by hand, and the gates that stop a worthless one."""

import math

import pytest

from postgrad.alignment.judge_report import check_quality, measure
from postgrad.errors import GateError


def row_of(prompt: str, a: str, b: str, p_ab: float, p_ba: float) -> dict[str, object]:
    return {
        "prompt_id": prompt, "response_a": a, "response_b": b, "p_ab": p_ab, "p_ba": p_ba,
        "score_ab": [p_ab, 1 - p_ab], "score_ba": [p_ba, 1 - p_ba],
    }  # fmt: skip


def test_figures_by_hand() -> None:
    """Prompt 1: a wins in both orders and is longer; first shown wins in both. Prompt 2: b, shorter, wins."""
    rows = [
        row_of("1", "long", "x", 1.0, 1.0),
        row_of("1", "long", "y", 1.0, 0.0),
        row_of("2", "long", "z", 0.0, 0.0),
        row_of("3", "long", "z", math.nan, 0.0),
    ]
    found = measure(rows)
    assert (found.num_pairs, found.num_prompts) == (4, 3)
    assert found.consistency.value == pytest.approx((0.5 + 1) / 2)
    assert found.p_first.value == pytest.approx(((0.5 + 1.0) / 2 + 0.5) / 2)
    assert found.decided.value == pytest.approx((0.5 + 1) / 2)
    assert found.longer_wins.value == pytest.approx((1 + 0) / 2)
    assert found.unreadable.value == pytest.approx(1 / 3)


def always_first(num: int) -> list[dict[str, object]]:
    return [{**row_of(str(i), "aa", "b", 1.0, 0.0), "judge": "m"} for i in range(num)]


def test_a_gate_closes_only_when_surely_right() -> None:
    """Wilson's upper end of 0 of n is z^2 / (n + z^2), z^2 = 3.84: below 0.25 from n = 12 on."""
    check_quality(always_first(11), min_consistency=0.25, max_unreadable=0.5)
    with pytest.raises(GateError, match="looks at positions"):
        check_quality(always_first(12), min_consistency=0.25, max_unreadable=0.5)
    check_quality([], min_consistency=0.25, max_unreadable=0.5)


def test_many_pairs_of_one_prompt_are_one_piece_of_evidence() -> None:
    rows = [{**row, "prompt_id": "same"} for row in always_first(500)]
    check_quality(rows, min_consistency=0.25, max_unreadable=0.5)
