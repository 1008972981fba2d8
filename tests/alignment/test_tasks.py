"""The built-in tasks: hand values, properties of the score, deterministic files."""

from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.alignment.tasks import (
    KINDS,
    TaskSizes,
    corrupt,
    kind_of,
    make_prompt,
    perfect_answer,
    score,
    write_tasks,
)
from postgrad.errors import DataError

SMALL = TaskSizes(sft=60, candidates=40, set=30, held_out=20)


def ask(*turns: str) -> list[dict[str, str]]:
    """Return a conversation with the given user turns and an answer between them."""
    messages = [{"role": "user", "content": turns[0]}]
    for turn in turns[1:]:
        messages += [{"role": "assistant", "content": "xx"}, {"role": "user", "content": turn}]
    return messages


@pytest.mark.parametrize(
    ("turns", "response", "expected"),
    [
        (("copy lomak",), "lomak", 1.0),
        (("copy lomak",), "lomxx", 3 / 5),
        (("copy lomak",), "loma", 4 / 5),
        (("copy lomak",), "lomakk", 5 / 6),
        (("copy lomak",), "", 0.0),
        (("copy lomak",), "omak", 0.0),
        (("reverse lomak",), "kamol", 1.0),
        (("reverse lomak",), "lomak", 1 / 5),
        (("first of lomak 4 times",), "llll", 1.0),
        (("first of lomak 4 times",), "lll", 3 / 4),
        (("first of lomak 4 times",), "llllllll", 1 / 2),
        (("double mak",), "mmaakk", 1.0),
        (("double mak",), "makmak", 2 / 6),
        (("pick 5 from lomak",), "kklol", 1.0),
        (("pick 5 from lomak",), "kkzol", 4 / 5),
        (("d and p in turn 5 times",), "dpdpd", 1.0),
        (("d and p in turn 5 times",), "ddddd", 3 / 5),
        (("copy lomak", "same again"), "lomak", 1.0),
        (("reverse lomak", "same again"), "lomak", 1.0),
        (("copy lomak", "last 5 times"), "kkkkk", 1.0),
        (("copy lomak", "last 5 times"), "kkkxx", 3 / 5),
        (("copy bodig", "copy lomak"), "lomak", 1.0),
    ],
)
def test_score_by_hand(turns: tuple[str, ...], response: str, expected: float) -> None:
    assert score(ask(*turns), response) == pytest.approx(expected)


def test_score_refuses_other_prompts() -> None:
    with pytest.raises(DataError, match="built-in tasks"):
        score(ask("write a poem"), "roses")
    with pytest.raises(DataError, match="same again"):
        score(ask("same again"), "lomak")


@given(st.integers(0, 10**6))
def test_perfect_answers_score_one_and_spoiled_ones_less(seed: int) -> None:
    rng = Random(seed)
    messages = make_prompt(rng, error=(0.2, 0.8), slip=0.5)
    assert score(messages, perfect_answer(messages, rng)) == 1.0
    assert score(messages, corrupt(messages, rng, error=(1.0, 1.0), slip=0.0)) == 0.0
    assert score(messages, corrupt(messages, rng, error=(0.0, 0.0), slip=1.0)) < 1.0
    assert score(messages, corrupt(messages, rng, error=(0.0, 0.0), slip=0.0)) == 1.0


@given(st.integers(0, 10**6), st.text(max_size=20))
def test_score_stays_in_the_unit_interval(seed: int, response: str) -> None:
    assert 0.0 <= score(make_prompt(Random(seed), error=(0.2, 0.8), slip=0.1), response) <= 1.0


def test_demonstrations_are_as_wrong_as_asked() -> None:
    rng = Random(0)
    scores, gaps = [], []
    for _ in range(3000):
        messages = make_prompt(rng, error=(0.2, 0.8), slip=0.2)
        answer = corrupt(messages, rng, error=(0.2, 0.8), slip=0.2)
        scores.append(score(messages, answer))
        gaps.append(len(answer) - len(perfect_answer(messages, rng)))
    assert 0.45 < sum(scores) / len(scores) < 0.51
    assert abs(sum(gaps) / len(gaps)) < 0.03  # as often too long as too short


def test_every_kind_appears_and_a_quarter_has_two_turns() -> None:
    rng = Random(1)
    prompts = [make_prompt(rng, error=(0.2, 0.8), slip=0.1) for _ in range(2000)]
    assert {kind_of(prompt) for prompt in prompts} == {kind.name for kind in KINDS}
    assert 0.2 < sum(len(prompt) > 1 for prompt in prompts) / len(prompts) < 0.35


def users(messages: list[dict[str, str]]) -> tuple[str, ...]:
    """Return the user turns."""
    return tuple(message["content"] for message in messages if message["role"] == "user")


def test_files_are_deterministic_and_disjoint(tmp_path: Path) -> None:
    first = write_tasks(tmp_path / "a", 3, SMALL)
    again = write_tasks(tmp_path / "b", 3, SMALL)
    other = write_tasks(tmp_path / "c", 4, SMALL)
    for name in ("sft", "candidates", "set", "held_out"):
        assert first[name].read_bytes() == again[name].read_bytes()
        assert first[name].read_bytes() != other[name].read_bytes()
    rows = {name: pq.read_table(path).column("messages").to_pylist() for name, path in first.items()}
    assert {name: len(conversations) for name, conversations in rows.items()} == {
        "sft": 60, "candidates": 40, "set": 30, "held_out": 20,
    }  # fmt: skip
    prompts = {name: {users(row) for row in conversations} for name, conversations in rows.items()}
    names = sorted(prompts)
    assert all(not prompts[a] & prompts[b] for a in names for b in names if a < b)
    assert all(len(prompts[name]) == len(rows[name]) for name in ("candidates", "set", "held_out"))
    assert {row[-1]["role"] for row in rows["sft"]} == {"assistant"}
    assert {row[-1]["role"] for row in rows["set"]} == {"user"}
