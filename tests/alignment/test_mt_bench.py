"""MT-bench: parsers against GPT-4's stored judgements, aggregates and the both-orders rule by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq
import pytest

from postgrad.alignment.mt_bench import (
    CATEGORIES,
    TEMPERATURES,
    WITH_REFERENCE,
    Comparison,
    Rating,
    Verdict,
    category,
    compare,
    order_agreement,
    parse_rating,
    parse_verdict,
    rate,
    winner,
)
from postgrad.errors import DataError


@pytest.fixture(scope="module")
def judgements(shared: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(shared / "data/llm/mtbench_gpt4_single.parquet").to_pylist()
    return rows


def test_every_stored_score_is_read_again(judgements: list[dict[str, object]]) -> None:
    assert len(judgements) == 800
    for row in judgements:
        score = parse_rating(str(row["judgment"]))
        assert (-1 if score is None else score) == row["score"]


@pytest.mark.parametrize(
    ("model", "turns", "overall"),
    [
        ("mistral-orpo-trl", (7.73125, 6.6), 7.165625),
        ("mistral-orpo-capybara", (7.125, 6.5125), 6.81875),
        ("mistral-orpo-mix", (6.43125, 5.575), 6.003125),
        ("mistral-orpo", (6.675, 5.037735849056604), 5.858934169278997),
    ],
)
def test_means_of_stored_models(
    judgements: list[dict[str, object]], model: str, turns: tuple[float, float], overall: float
) -> None:
    """One of mistral-orpo's 320 judgements has no rating: the mean of the turns would be 5.856."""
    ratings = [
        Rating(int(str(row["question_id"])), int(str(row["turn"])), parse_rating(str(row["judgment"])))
        for row in judgements
        if row["model"] == model
    ]
    result = rate(ratings)
    assert result.overall == pytest.approx(overall)
    assert tuple(result.by_turn.values()) == pytest.approx(turns)
    assert list(result.by_category) == list(CATEGORIES)
    assert result.num_unreadable == (model == "mistral-orpo")


def test_categories_match_the_questions(shared: Path) -> None:
    rows = pq.read_table(shared / "data/llm/mtbench_questions.parquet").to_pylist()
    assert len(rows) == 80
    assert all(category(row["question_id"]) == row["category"] for row in rows)
    references = pq.read_table(shared / "data/llm/mtbench_reference_gpt4.parquet").to_pylist()
    assert {category(row["question_id"]) for row in references} == WITH_REFERENCE
    assert tuple(TEMPERATURES) == CATEGORIES
    with pytest.raises(DataError, match="81 to 160, found 161"):
        category(161)


def test_ratings_as_judges_write_them() -> None:
    assert parse_rating("Rating: [[7.5]] or [[3]]") == 7.5
    assert parse_rating("Rating: [6]") == 6
    assert parse_rating("[[ten]] 8/10") is None


def test_verdicts_as_judges_write_them() -> None:
    texts = ("so [[A]]", "so [[B]]", "so [[C]]", "so A")
    assert [parse_verdict(text) for text in texts] == ["A", "B", "tie", "unreadable"]


def test_nothing_readable_is_not_a_number() -> None:
    result = rate([Rating(81, 1, None)])
    assert math.isnan(result.overall) and math.isnan(result.by_turn[1]) and result.num_unreadable == 1


def test_a_model_wins_only_if_both_orders_say_so() -> None:
    decided = {(a, b): winner(a, b) for a in get_args(Verdict) for b in get_args(Verdict) if winner(a, b) != "tie"}
    assert decided == {("A", "B"): "first", ("B", "A"): "second"}


def test_pairwise_counts_by_hand() -> None:
    """x wins one, loses one, ties two: (1 + 2/2) / 4."""
    rows = [
        Comparison("x", "y", "A", "B"),
        Comparison("x", "y", "B", "A"),
        Comparison("y", "x", "A", "A"),
        Comparison("x", "z", "tie", "tie"),
    ]
    result = compare(rows)
    assert (result["x"].num_wins, result["x"].num_losses, result["x"].num_ties) == (1, 1, 2)
    assert result["x"].win_rate == 0.5 and result["z"].win_rate == 0.5
    assert sum(r.num_wins for r in result.values()) == sum(r.num_losses for r in result.values())
    assert order_agreement(rows) == 0.75
    assert math.isnan(order_agreement([]))
