"""Loaders: what is kept, what is counted, what is held out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from chats import talk
from hypothesis import given
from hypothesis import strategies as st

from postgrad.core.config import DataConfig
from postgrad.core.data import (
    Example,
    Loaded,
    Pair,
    Prompt,
    ResponseSet,
    hold_out,
    load_examples,
    load_pairs,
    load_prompts,
    load_sets,
    prompt_id,
)
from postgrad.core.store import seal, write_shard
from postgrad.errors import DataError


def saved(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> DataConfig:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(path=str(path), **settings)


def store(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_shard(folder, 0, rows, pa.Table.from_pylist(rows).schema)
    seal(folder, stage="test", settings={}, parents={}, counts={})


def test_examples_and_their_counts(tmp_path: Path) -> None:
    rows = [
        {"messages": list(talk("a", "b"))},
        {"messages": list(talk("a", "b", "c"))},
        {"messages": list(talk("a", " \n"))},
        {"messages": list(talk("a", "b")), "weight": 0.5},
        {"messages": []},
        {"messages": None},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]},
    ]
    loaded = load_examples(saved(tmp_path, rows))
    name = prompt_id(talk("a", "b"))
    assert loaded.items == [Example(name, talk("a", "b")), Example(name, talk("a", "b"), 0.5)]
    assert loaded.counts == {
        "read": 8,
        "kept": 2,
        "dropped: ends with the user": 1,
        "dropped: empty response": 1,
        "dropped: no messages": 2,
        "dropped: unknown role 'tool'": 1,
        "dropped: empty message": 1,
    }
    assert load_examples(saved(tmp_path, rows, limit=1)).counts == {"read": 1, "kept": 1}


def test_prompts_come_once(tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in ("a", "b", "a", "")]
    loaded = load_prompts(saved(tmp_path, rows))
    assert loaded.items == [Prompt(prompt_id(talk(text)), talk(text)) for text in "ab"]
    assert loaded.counts["dropped: same prompt again"] == loaded.counts["dropped: empty message"] == 1


def test_pairs_and_their_counts(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2, "p": 0.8},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "a", "rejected": ""},
        {"prompt": list(talk("q", "r", "s")), "chosen": "a", "rejected": "b"},
    ]
    loaded = load_pairs(saved(tmp_path, rows))
    assert [(pair.p, pair.margin, pair.turn) for pair in loaded.items] == [(0.8, 2.0, 1), (1.0, 0.0, 2)]
    assert loaded.items[1].prompt == talk("q", "r", "s")
    assert len({pair.id for pair in loaded.items}) == 2
    assert loaded.counts["dropped: chosen equals rejected"] == loaded.counts["dropped: empty response"] == 1
    with pytest.raises(DataError, match=r"rows.jsonl, row 1: expected p from 0 to 1 .* found p 1.5"):
        load_pairs(saved(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b", "p": 1.5}]))


def test_judged_pairs_keep_the_judge_s_probability(tmp_path: Path) -> None:
    base = {"prompt_messages": json.dumps(talk("q")), "response_a": "a", "response_b": "b", "margin": -1.0}
    rows = [
        {**base, "p_a": 0.25},
        {**base, "p_a": 0.75},
        {**base, "p_a": None},
        {**base, "p_a": 0.5, "response_b": "a"},
    ]
    store(tmp_path / "pairs", rows)
    for path in (tmp_path, tmp_path / "pairs"):
        loaded = load_pairs(DataConfig(path=str(path)))
        shown = [(pair.chosen, pair.rejected, pair.p, pair.margin) for pair in loaded.items]
        assert shown == [("b", "a", 0.75, 1.0), ("a", "b", 0.75, 1.0)]
        assert loaded.counts["dropped: no preference"] == loaded.counts["dropped: chosen equals rejected"] == 1


def sampled(num: int = 2) -> list[dict[str, Any]]:
    messages = talk("q")
    return [
        {
            "prompt_id": prompt_id(messages),
            "prompt_messages": json.dumps(messages),
            "k": k,
            "response": "" if k else "a",
        }
        for k in range(num)
    ]


def test_sampled_sets_join_their_scores_and_keep_empty_responses(tmp_path: Path) -> None:
    rows = sampled()
    store(tmp_path / "responses", rows[::-1])
    without = load_sets(DataConfig(path=str(tmp_path)))
    assert without.items == [ResponseSet(prompt_id(talk("q")), talk("q"), ("a", ""))]
    store(
        tmp_path / "scores", [{"prompt_id": row["prompt_id"], "k": row["k"], "score": -row["k"] + 0.5} for row in rows]
    )
    assert load_sets(DataConfig(path=str(tmp_path))).items[0].scores == (0.5, -0.5)
    assert load_sets(DataConfig(path=str(tmp_path / "responses"))).items[0].scores == (0.5, -0.5)


def test_sampled_sets_with_holes_are_refused(tmp_path: Path) -> None:
    store(tmp_path / "a" / "responses", sampled(3)[1:])
    with pytest.raises(DataError, match=r"expected responses 0 to 1 to prompt .* found responses \[1, 2\]"):
        load_sets(DataConfig(path=str(tmp_path / "a")))
    store(tmp_path / "b" / "responses", sampled(3))
    store(tmp_path / "b" / "scores", [{"prompt_id": sampled()[0]["prompt_id"], "k": 0, "score": 1.0}])
    with pytest.raises(DataError, match=r"each with a score, found responses \[0, 1, 2\] and 1 scores"):
        load_sets(DataConfig(path=str(tmp_path / "b")))


def test_sets_from_lists_and_from_rows(tmp_path: Path) -> None:
    lists = [
        {"prompt": "q", "responses": ["a", "", "b"], "scores": [1, 2, 3]},
        {"prompt": "r", "responses": ["c"], "scores": [4]},
        {"prompt": "s", "responses": [""], "scores": [4]},
    ]
    rows = [
        {"prompt": prompt, "response": text, "score": score}
        for prompt, text, score in (("q", "a", 1), ("r", "c", 4.0), ("q", "", 2), ("q", "b", "3"))
    ]
    expected = [
        ResponseSet(prompt_id(talk("q")), talk("q"), ("a", "b"), (1.0, 3.0)),
        ResponseSet(prompt_id(talk("r")), talk("r"), ("c",), (4.0,)),
    ]
    for data in (lists, rows):
        loaded = load_sets(saved(tmp_path, data))
        assert loaded.items == expected
        assert loaded.counts["dropped: empty response"] == (2 if data is lists else 1)
    assert load_sets(saved(tmp_path, lists, limit=1)).items == expected[:1]
    assert load_sets(saved(tmp_path, lists, limit=1)).counts["kept"] == 1
    bare = [{"prompt": "q", "response": "a"}, {"prompt": "q", "response": "b"}]
    assert load_sets(saved(tmp_path, bare)).items == [ResponseSet(prompt_id(talk("q")), talk("q"), ("a", "b"))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "responses": "a"}, r"row 1: column 'responses': expected a list, found str 'a'"),
        (
            {"prompt": "q", "responses": ["a"], "scores": [1, 2]},
            r"row 1: expected 1 scores, as many as responses, found 2",
        ),
        ({"prompt": "q", "responses": [7]}, r"row 1: column 'responses': expected text, found int '7'"),
        ({"prompt": "q", "responses": ["a"], "scores": ["x"]}, r"column 'score': expected a number, found str 'x'"),
        ({"prompt": "q", "responses": ["a"], "scores": [float("nan")]}, r"expected a finite score .* found nan"),
    ],
)
def test_bad_sets(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_sets(saved(tmp_path, [row]))


def test_a_score_for_some_responses_only_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": "a", "score": 1}, {"prompt": "q", "response": "b", "score": None}]
    with pytest.raises(DataError, match="expected a score for each response, found some without, to 'q'"):
        load_sets(saved(tmp_path, rows))


Loader = Callable[[DataConfig], Loaded[Any]]


@pytest.mark.parametrize(
    ("load", "accepted"),
    [
        (load_examples, r"messages \(list of .*instruction .*prompt \+ completion"),
        (load_prompts, r"prompt, instruction"),
        (load_pairs, r"prompt \+ chosen \+ rejected .*transcripts"),
        (load_sets, r"prompt \+ responses \(list\)"),
    ],
)
def test_wrong_columns_name_those_found_and_those_accepted(tmp_path: Path, load: Loader, accepted: str) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl: found columns label, text; accepted: {accepted}"):
        load(saved(tmp_path, [{"text": "x", "label": 1}]))


@pytest.mark.parametrize("load", [load_examples, load_prompts, load_pairs, load_sets])
def test_missing_and_empty_files(tmp_path: Path, load: Loader) -> None:
    with pytest.raises(DataError, match=r"Nearest in .*: data.json"):
        (tmp_path / "data.json").write_text("")
        load(DataConfig(path=str(tmp_path / "dat.json")))
    with pytest.raises(DataError, match=r"data.json is empty"):
        load(DataConfig(path=str(tmp_path / "data.json")))


def test_nothing_left_says_why(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": ""}, {"prompt": "q", "response": " "}, {"prompt": " ", "response": "a"}]
    with pytest.raises(DataError, match=r"found none among 3 \(empty response: 2, empty message: 1\)"):
        load_examples(saved(tmp_path, rows))


def test_a_wrong_type_names_its_row(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": 4}]
    with pytest.raises(DataError, match=r"rows.jsonl, row 2: column 'output': expected text, found int '4'"):
        load_examples(saved(tmp_path, rows))


def pairs(num: int) -> list[Pair]:
    return [
        Pair(f"{i}.{k}", talk(f"question {i}", *["a", "b"] * (k % 2)), "c", "d") for i in range(num) for k in range(4)
    ]


def test_hold_out_splits_by_conversation_not_by_row() -> None:
    train, held = hold_out(pairs(500), 0.1, 0)
    assert 120 <= len(held) <= 280 and len(train) + len(held) == 2000
    opening = [{pair.prompt[0]["content"] for pair in side} for side in (train, held)]
    assert not opening[0] & opening[1], "all turns and answers of a conversation on one side"
    assert hold_out(pairs(500), 0.1, 0) == (train, held)
    assert hold_out(pairs(500), 0.1, 1)[1] != held


def test_hold_out_does_not_depend_on_the_company() -> None:
    """A prompt held out of finetuning is held out of the reward model's pairs, too."""
    _, held = hold_out(pairs(500), 0.2, 0)
    examples = [Example(f"e{i}", talk(f"question {i}", "answer")) for i in range(0, 500, 3)]
    _, held_examples = hold_out(examples, 0.2, 0)
    openings = {pair.prompt[0]["content"] for pair in held}
    assert {e.messages[0]["content"] for e in held_examples} == openings & {e.messages[0]["content"] for e in examples}


@given(st.integers(2, 12), st.sampled_from([0.01, 0.5, 0.99, 1.0]), st.integers(0, 5))
def test_hold_out_leaves_no_side_empty(num: int, share: float, seed: int) -> None:
    train, held = hold_out(pairs(num), share, seed)
    assert train and held and len(train) + len(held) == num * 4


def test_hold_out_nothing() -> None:
    assert hold_out(pairs(3), 0.0, 0) == (pairs(3), [])
    assert hold_out([], 0.5, 0) == ([], [])


def test_real_preferences(shared: Path) -> None:
    loaded = load_pairs(DataConfig(path=str(shared / "data/llm/hh_harmless_test.parquet")))
    assert loaded.counts["read"] == 2312 and loaded.counts["kept"] == 2304
    assert max(pair.turn for pair in loaded.items) > 5
    first = loaded.items[0]
    assert [message["role"] for message in first.prompt] == ["user", "assistant", "user", "assistant", "user"]
    assert first.prompt[2]["content"] == "yep" and first.turn == 3
