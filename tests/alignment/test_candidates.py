"""What can be compared, from every source, and how responses are paired."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.alignment.candidates import choose_pairs, load_candidates
from postgrad.core.config import DataConfig
from postgrad.core.items import prompt_id
from postgrad.core.store import seal, write_shard
from postgrad.errors import DataError


@given(num=st.integers(2, 12), limit=st.integers(1, 80), seed=st.integers(0, 2**62))
def test_pairs_are_drawn_once_each_from_all(num: int, limit: int, seed: int) -> None:
    every = choose_pairs(num, "all", limit, seed)
    assert len(every) == num * (num - 1) // 2 and choose_pairs(num, "first", limit, seed) == [(0, 1)]
    drawn = choose_pairs(num, "random", limit, seed)
    assert len({frozenset(pair) for pair in drawn}) == len(drawn) == min(limit, len(every))
    assert drawn == choose_pairs(num, "random", limit, seed)


def test_which_response_comes_first_is_drawn_too() -> None:
    firsts = sum(choose_pairs(2, "random", 1, seed) == [(0, 1)] for seed in range(400))
    assert 150 < firsts < 250


def test_pairs_of_a_file_keep_their_models(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "response_a": "x", "response_b": "y", "model_a": "m1", "model_b": "m2"},
        {"prompt": "Hi", "response_a": "same", "response_b": "same"},
        {"prompt": "Hi", "response_a": "", "response_b": "y"},
        {"prompt": " ", "response_a": "x", "response_b": "y"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load_candidates(DataConfig(path=str(tmp_path / "p.jsonl")))
    (item,) = loaded.items
    assert (item.responses, item.models) == (("x", "y"), ("m1", "m2"))
    assert loaded.counts == {
        "read": 4,
        "kept": 1,
        "dropped: fewer than two distinct responses": 2,
        "dropped: empty message": 1,
    }


def test_a_sample_run_is_read_with_the_policy_that_wrote_it(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    schema = pa.schema(
        [(n, pa.string()) for n in ("prompt_id", "prompt_messages", "response", "policy_hash")] + [("k", pa.int64())]
    )
    rows = [
        {
            "prompt_id": prompt_id(messages),
            "prompt_messages": json.dumps(messages),
            "k": k,
            "response": text,
            "policy_hash": "abc",
        }
        for k, text in enumerate(["x", "x", "", "y", "z"])
    ]
    write_shard(tmp_path / "responses", 0, rows, schema)
    seal(tmp_path / "responses", stage="sample", settings={}, parents={}, counts={})
    (item,) = load_candidates(DataConfig(path=str(tmp_path))).items
    assert (item.responses, item.models) == (("x", "y", "z"), ("abc",) * 3)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "accepted: prompt"),
        ({"response_a": "x", "response_b": "y"}, "response_a"),
        ({"prompt": "Hi", "responses": ["x", "x"]}, "two unlike responses"),
        ({"prompt": "Hi", "response_a": 3, "response_b": "y"}, "row 1"),
    ],
)
def test_data_without_anything_to_compare_is_refused(tmp_path: Path, row: dict[str, object], words: str) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=words):
        load_candidates(DataConfig(path=str(tmp_path / "p.jsonl")))
