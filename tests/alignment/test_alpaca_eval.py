"""AlpacaEval's parser, swap rule and win rates against its own stored judgements and leaderboards."""

from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postgrad.alignment.alpaca_eval import (
    is_swapped,
    preference,
    shown_preference,
    stored_preference,
    win_rate,
    won,
)
from postgrad.errors import DataError


@pytest.fixture(scope="module")
def annotations(shared: Path) -> list[dict[str, Any]]:
    with gzip.open(shared / "data/llm/alpaca_eval2_raw_sample.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_preference_by_hand() -> None:
    """p(m) = 0.6, p(M) = 0.2: the first is preferred with 3/4, so the preference is 2 - 3/4."""
    top = {"m": math.log(0.6), "M": math.log(0.2), "The": math.log(0.1)}
    assert shown_preference(top) == pytest.approx(1.25)
    assert shown_preference({"m": -0.1}) == 1 and shown_preference({"M": -0.1}) == 2
    assert shown_preference({"m": -0.1, "M": -1000.0}) == 1
    assert math.isnan(shown_preference({"A": -0.1})) and math.isnan(shown_preference({}))


def test_swap_turns_the_preference_around() -> None:
    swapped = next(text for text in map(str, range(100)) if is_swapped(text))
    direct = next(text for text in map(str, range(100)) if not is_swapped(text))
    top = {"m": math.log(0.6), "M": math.log(0.2)}
    assert preference(direct, top) == pytest.approx(1.25)
    assert preference(swapped, top) == pytest.approx(1.75)
    assert 400 < sum(is_swapped(str(i)) for i in range(1000)) < 600
    assert any(is_swapped(str(i)) != is_swapped(str(i), seed=1) for i in range(20))


def test_every_stored_preference_is_reproduced(annotations: list[dict[str, Any]]) -> None:
    """Formula and swap rule together; a wrong order would show as 3 - x."""
    stored = np.array([row["preference"] for row in annotations])
    np.testing.assert_allclose([stored_preference(row) for row in annotations], stored, atol=1e-8)
    assert len(stored) == 1840


def test_the_judge_favours_the_second_place(annotations: list[dict[str, Any]]) -> None:
    """Mean probability of the output shown first; the full set has 0.456."""
    shown = [3 - row["preference"] if is_swapped(row["instruction"]) else row["preference"] for row in annotations]
    assert 2 - np.mean(shown) == pytest.approx(0.456, abs=0.005)


def test_damaged_annotation_is_named() -> None:
    with pytest.raises(DataError, match=r"top_logprobs, found \['instruction'\]"):
        stored_preference({"instruction": "hi"})


@pytest.mark.parametrize("version", [1, 2])
def test_every_published_win_rate_is_reproduced(shared: Path, version: int) -> None:
    folder = shared / "data/llm"
    with (folder / f"alpaca_eval{version}_leaderboard.csv").open(encoding="utf-8") as file:
        published = {row[""]: row for row in csv.DictReader(file)}
    matrix = np.load(folder / f"alpaca_eval{version}_matrix.npz")
    checked = 0
    for name, preferences in zip(matrix["models"].tolist(), matrix["preference"], strict=True):
        if name not in published:
            continue
        row, ours = published[name], win_rate(preferences)
        assert ours.rate == pytest.approx(float(row["win_rate"]), abs=5e-5), name
        assert ours.standard_error == pytest.approx(float(row["standard_error"]), abs=5e-5), name
        assert ours.discrete_rate == pytest.approx(float(row["discrete_win_rate"]), abs=5e-5), name
        counts = [int(row[key]) for key in ("n_wins", "n_wins_base", "n_draws", "n_total")]
        assert [ours.num_wins, ours.num_losses, ours.num_ties, ours.num_total] == counts, name
        checked += 1
    assert checked == {1: 52, 2: 57}[version]


def test_win_rate_by_hand() -> None:
    """Wins 1, 0, 0.5, 0.5: mean 1/2, sd sqrt(1/6), two ties."""
    ours = win_rate([2, 1, 1.5, 0, math.nan])
    assert ours == pytest.approx((50, 100 * math.sqrt(1 / 6 / 4), 50, 1, 1, 2))
    assert ours.num_total == 4
    with pytest.raises(DataError, match="add 1 to a probability"):
        won([0.3])
    with pytest.raises(DataError, match="found 1"):
        win_rate([2, math.nan])
