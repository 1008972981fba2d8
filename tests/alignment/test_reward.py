"""Reward losses by hand and by property, accuracy by slices, and short runs on pairs and on sets."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postgrad.alignment.comparisons import accuracy_minus_length, accuracy_tables, comparisons, judge, to_table
from postgrad.alignment.reward import (
    RewardConfig,
    all_pairs_loss,
    check,
    plackett_luce_loss,
    plan,
    reward_loss,
    run,
)
from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from postgrad.core.items import Pair, ResponseSet
from postgrad.core.text import byte_tokenizer
from postgrad.errors import ConfigError, DataError

NAN = math.nan
USER = ({"role": "user", "content": "hi"},)
scores = st.lists(st.floats(-10, 10), min_size=3, max_size=3)


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave report.html out: drawing it takes longer than these runs."""
    monkeypatch.setattr("postgrad.core.runtime.write_report", lambda report, title: None)


def pairs_file(folder: Path, num: int) -> str:
    """Pairs in which the answer with more a's is better, margins 1 and 2."""
    rows = [
        {"prompt": f"word {i}", "chosen": "aaa" + "b" * (i % 3), "rejected": "bbb" + "c" * (i % 2), "margin": 1 + i % 2}
        for i in range(num)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sets_file(folder: Path, num: int) -> str:
    """Sets of up to three answers, better with more a's; one with equal scores, one with equal texts."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"word {i}", "responses": ["bbb", "aab", "aaa"][: 2 + i % 2], "scores": [0.0, 2.0, 3.0][: 2 + i % 2]}
        for i in range(num)
    ]
    rows.append({"prompt": "even", "responses": ["a", "b"], "scores": [1.0, 1.0]})
    rows.append({"prompt": "same", "responses": ["a", "a"], "scores": [1.0, 2.0]})
    path = folder / "sets.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(folder: Path, path: str, **more: Any) -> RewardConfig:
    """A run of 20 steps in a second or two."""
    base = RewardConfig(
        model=ModelConfig(tiny_width=32),
        data=DataConfig(path=path, row_length=0, held_out=0.25),
        train=TrainConfig(max_steps=20, batch_size=8, log_every=5, optim=OptimConfig(lr=5e-3)),
        runtime=RuntimeConfig(folder=str(folder), quiet=True),
    )
    return replace(base, **more)


def test_pair_loss_by_hand() -> None:
    """Scores 2 and 1: -log s(1) = 0.313262; margin 0.5: -log s(0.5) = 0.474077; centre 0.01 * 3^2 = 0.09.

    p = 0.8: 0.8 * 0.313262 + 0.2 * 1.313262 = 0.513262.
    """
    pair = torch.tensor([[2.0, 1.0]])
    assert reward_loss(pair).item() == pytest.approx(0.313262, abs=1e-6)
    assert reward_loss(pair, margin=torch.tensor([0.5])).item() == pytest.approx(0.474077, abs=1e-6)
    assert reward_loss(pair, center=0.01).item() == pytest.approx(0.403262, abs=1e-6)
    assert reward_loss(pair, torch.tensor([0.8])).item() == pytest.approx(0.513262, abs=1e-6)


def test_set_losses_by_hand() -> None:
    """Scores 2, 1, 0 in the order of gold.

    All pairs: (0.313262 + 0.126928 + 0.313262) / 3 = 0.251151. Plackett-Luce: (0.407606 + 0.313262) / 2 = 0.360434.
    """
    row, gold = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.5, 0.9, 0.1]])
    assert all_pairs_loss(row, gold).item() == pytest.approx(0.251151, abs=1e-6)
    assert plackett_luce_loss(row, gold).item() == pytest.approx(0.360434, abs=1e-6)


@pytest.mark.parametrize("loss", [all_pairs_loss, plackett_luce_loss])
def test_two_answers_are_a_pair(loss: Any) -> None:
    """With K = 2 both set losses are Bradley-Terry, whichever column is better."""
    row = torch.tensor([[0.3, -1.2], [0.3, -1.2]])
    gold = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = reward_loss(torch.tensor([[0.3, -1.2], [-1.2, 0.3]]))
    torch.testing.assert_close(loss(row, gold), expected)


@pytest.mark.parametrize("loss", [all_pairs_loss, plackett_luce_loss])
def test_absent_answers_do_not_matter(loss: Any) -> None:
    """A column of NaN gold changes neither loss nor gradient, which stay finite; no order gives no loss."""
    row = torch.tensor([[0.3, -1.2, 99.0]], requires_grad=True)
    padded = loss(row, torch.tensor([[0.0, 1.0, NAN]]))
    padded.sum().backward()
    torch.testing.assert_close(padded, loss(row[:, :2], torch.tensor([[0.0, 1.0]])))
    assert row.grad is not None and row.grad[0, 2] == 0 and row.grad.isfinite().all()
    assert all_pairs_loss(row, torch.tensor([[1.0, 1.0, NAN]])).item() == 0


@given(scores, st.floats(-5, 5), st.permutations(range(3)))
def test_set_losses_ignore_shift_and_order(row: list[float], shift: float, order: list[int]) -> None:
    """Adding a constant to all scores, or listing answers differently, changes nothing."""
    values, gold = torch.tensor([row], dtype=torch.float64), torch.tensor([[0.1, 0.7, 0.4]], dtype=torch.float64)
    for loss in (all_pairs_loss, plackett_luce_loss):
        base = loss(values, gold)
        torch.testing.assert_close(loss(values + shift, gold), base)
        torch.testing.assert_close(loss(values[:, order], gold[:, order]), base)


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(0, 1))
def test_swapping_sides_swaps_the_label(a: float, b: float, p: float) -> None:
    """The loss of (a, b) with p is that of (b, a) with 1 - p."""
    left = reward_loss(torch.tensor([[a, b]]), torch.tensor([p]))
    torch.testing.assert_close(left, reward_loss(torch.tensor([[b, a]]), torch.tensor([1 - p])), atol=1e-5, rtol=1e-5)


def test_accuracy_by_turn_and_margin() -> None:
    """Four pairs: right, wrong, tied, right, and one without an order, which does not count."""
    pairs = [
        Pair("1", USER, "long one", "no", margin=1.0, turn=1),
        Pair("2", USER, "yes", "no", margin=1.0, turn=2),
        Pair("3", USER, "yes", "yep", margin=3.0, turn=2),
        Pair("4", USER, "ok", "no way", margin=3.0, turn=1),
        Pair("5", USER, "a", "b", p=0.5, margin=3.0, turn=1),
    ]
    data = comparisons(pairs, byte_tokenizer(), DataConfig())
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [2.0, 1.0], [0.0, 9.0]])
    judged = judge(data, values)
    assert judged.better.tolist() == [1.0, 0.0, 0.5, 2.0] and judged.turn.tolist() == [1, 2, 2, 1]
    overall, by_margin = accuracy_tables(judged, num_buckets=2)
    found = {row[0]: (row[1], row[2], row[5]) for row in overall.rows}
    # The length rule is right on the first and second pair, tied on the third, wrong on the fourth.
    assert found == {"all": (4, 0.625, 0.625), "turn 1": (2, 1.0, 0.5), "turn 2": (2, 0.25, 0.75)}
    assert {row[0]: row[2] for row in by_margin.rows} == {"1 to 2": 0.5, "2 to 3": 0.75}


def test_pairs_of_one_prompt_are_one_observation() -> None:
    """Three answers make three pairs; the interval is over the two prompts, not the six pairs."""
    sets = [ResponseSet(str(i), USER, ("a", "bb", "ccc"), (0.0, 1.0, 2.0)) for i in range(2)]
    data = comparisons(sets, byte_tokenizer(), DataConfig())
    judged = judge(data, torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]))
    row = accuracy_tables(judged, num_buckets=1)[0].rows[0]
    assert row[:3] == ("all", 6, 0.5)
    assert row[3] == pytest.approx(0.5 - 1.96 * math.sqrt(0.5) / math.sqrt(2), abs=1e-3)


def test_lead_over_the_length_rule() -> None:
    """Three prompts of one pair; the rule is right on the first, the model on the first two: (0 + 1 + 0) / 3.

    The differences have standard deviation sqrt(1 / 3), so the interval is 1/3 +- 1.96 * sqrt(1/3) / sqrt(3).
    """
    answers = (("long", "no"), ("no", "long"), ("no", "long"))
    pairs = [Pair(str(i), USER, better, worse) for i, (better, worse) in enumerate(answers)]
    data = comparisons(pairs, byte_tokenizer(), DataConfig())
    judged = judge(data, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    expected = (1 / 3, 1 / 3 - 1.959964 / 3, 1 / 3 + 1.959964 / 3)
    assert accuracy_minus_length(judged) == pytest.approx(expected, abs=1e-5)
    row = accuracy_tables(judged, num_buckets=1)[0].rows[0]
    assert row[5:] == pytest.approx((1 / 3, *expected), abs=1e-4)


def test_to_table() -> None:
    """Values fill a ragged table row by row."""
    table = to_table(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[True, True], [True, False]]))
    assert table.tolist() == [[1.0, 2.0], [3.0, 0.0]]


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_run_on_pairs(tmp_path: Path, margin: float) -> None:
    """Held-out accuracy beats chance and the length rule; tables and model are there."""
    report = run(config(tmp_path / "run", pairs_file(tmp_path, 48), margin=margin))
    assert report.results["accuracy"] > 0.9 > report.results["length_rule"]
    lead = report.results["accuracy"] - report.results["length_rule"]
    assert report.results["accuracy_minus_length"] == pytest.approx(lead)
    titles = [section.title for section in report.sections]
    assert "Held-out accuracy" in titles and "Held-out accuracy by margin" in titles and "Data" in titles
    assert (tmp_path / "run/model/model.safetensors").is_file()


@pytest.mark.parametrize("loss", ["all_pairs", "plackett_luce"])
def test_run_on_sets(tmp_path: Path, loss: Any) -> None:
    """Sets of unlike size train; those without an order are counted."""
    report = run(config(tmp_path / "run", sets_file(tmp_path, 40), loss=loss))
    assert report.results["accuracy"] > 0.8
    counts = dict(next(section.rows for section in report.sections if section.title == "Data"))
    dropped = {name.split(": ")[-1]: num for name, num in counts.items() if "dropped" in name}
    assert dropped == {"all scores equal": 1, "fewer than two distinct responses": 1}


def test_sets_without_scores_are_refused() -> None:
    """The message says what to run."""
    with pytest.raises(DataError, match="Score the set first"):
        comparisons([ResponseSet("x", USER, ("a", "b"))], byte_tokenizer(), DataConfig())


def test_plan_and_bad_settings(tmp_path: Path) -> None:
    """Counts without a run; contradictions are refused."""
    good = config(tmp_path / "run", pairs_file(tmp_path, 12))
    found = plan(good)
    assert found["rows read"] == 12 and found["optimizer steps"] == 20 and not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="margin applies to loss 'pairs' only"):
        check(replace(good, loss="all_pairs", margin=1.0))
    with pytest.raises(ConfigError, match=r"must be >= 0, got -1\.0"):
        check(replace(good, center=-1.0))
    with pytest.raises(ConfigError, match="num_buckets must be >= 1, got 0"):
        check(replace(good, num_buckets=0))


def test_length_columns_match_texts() -> None:
    """Lengths are in characters and stand beside their answers."""
    data = comparisons([Pair("1", USER, "four", "no")], byte_tokenizer(), DataConfig())
    assert np.array_equal(data.length.numpy(), [[4.0, 2.0]])
