"""Rows of every part: split, held against one another, tokenised, refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from texts import write

from postgrad.core.config import DataConfig
from postgrad.core.data import hold_out, load_examples
from postgrad.core.text import byte_tokenizer
from postgrad.errors import DataError
from postgrad.forgetting.text_rows import (
    PARAPHRASED,
    WRONG,
    Answers,
    Sources,
    read_texts,
    tokenised,
    with_facts,
)

NONE = Sources("", "", "", 0.2, aside=True)
PATH = DataConfig(path="", held_out=0.25, max_length=64)


def files(folder: Path, *sizes: int) -> Sources:
    """Write files of rows that differ."""
    names = [write(folder / f"{first}.jsonl", num, 100 * first) for first, num in enumerate(sizes)]
    return Sources(*names, *[""] * (3 - len(names)), 0.5, aside=True)


def test_a_share_of_one_file_is_forgotten(tmp_path: Path) -> None:
    """Every row is in one of the three parts; what is set aside is what `postgrad sft` sets aside."""
    data = replace(PATH, path=write(tmp_path / "all.jsonl", 200))
    rows = read_texts(NONE, data, 3).rows
    ids = [{example.id for example in rows[part]} for part in ("forget", "retain", "held_out")]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 200
    assert 15 <= len(ids[0]) <= 45 and 35 <= len(ids[2]) <= 65
    assert rows["held_out"] == hold_out(load_examples(data).items, 0.25, 3)[1]
    assert read_texts(replace(NONE, aside=False), data, 3).rows["held_out"] == []


def test_files_say_what_is_what(tmp_path: Path) -> None:
    sources = replace(files(tmp_path, 5, 9, 4), utility=(write(tmp_path / "world.jsonl", 3, 900),))
    texts = read_texts(sources, PATH, 0)
    sizes = {name: len(part) for name, part in texts.rows.items()}
    assert sizes == {"forget": 5, "retain": 9, "held_out": 4, "earlier": 0, "world": 3}
    assert texts.counts["to forget: kept"] == 5 and texts.counts["never seen: kept"] == 4
    clash = replace(sources, utility=(write(tmp_path / "retain.jsonl", 3, 900),))
    with pytest.raises(DataError, match=r"names differ from .*retain.*Rename it"):
        read_texts(clash, PATH, 0)


def test_invented_facts_stand_in_for_files(tmp_path: Path) -> None:
    found = with_facts(NONE, DataConfig(), tmp_path, 0)
    assert Path(found.forget).is_file() and Path(found.retain).is_file() and Path(found.held_out).is_file()
    given = replace(NONE, forget="mine")
    assert with_facts(given, DataConfig(), tmp_path, 0) == given
    assert with_facts(NONE, DataConfig(path="mine"), tmp_path, 0) == NONE


def test_the_same_row_counts_once(tmp_path: Path) -> None:
    sources = files(tmp_path, 5, 9)
    path = Path(sources.forget)
    path.write_text(path.read_text() * 2)
    texts = read_texts(sources, PATH, 0)
    assert len(texts.rows["forget"]) == 5 and texts.counts["to forget: same row again"] == 5


@pytest.mark.parametrize(("starts", "sides"), [((0, 3, 50), "to keep"), ((0, 50, 3), "never seen"), ((50, 0, 3), "")])
def test_rows_on_two_sides_are_refused(tmp_path: Path, starts: tuple[int, int, int], sides: str) -> None:
    """What is kept may not be what is forgotten, nor may what was never seen be either."""
    names = [write(tmp_path / f"{k}.jsonl", 5, start) for k, start in enumerate(starts)]
    with pytest.raises(DataError, match=rf"{sides} to differ, found 2 on both sides, the first 'what is 3'"):
        read_texts(Sources(*names, 0.5, aside=True), PATH, 0)


def test_nothing_to_keep_is_refused(tmp_path: Path) -> None:
    """An empty file, and one question alone of which a share is forgotten."""
    sources = files(tmp_path, 5, 1)
    Path(sources.retain).write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_texts(sources, PATH, 0)
    with pytest.raises(DataError, match=r"expected rows to (keep|forget), found none"):
        read_texts(NONE, replace(PATH, path=write(tmp_path / "one.jsonl", 1)), 0)


def test_unknown_columns_are_refused(tmp_path: Path) -> None:
    sources = files(tmp_path, 5, 9)
    Path(sources.forget).write_text('{"text": "somebody"}\n')
    with pytest.raises(DataError, match=r"found columns text; accepted: .*question \+ answer"):
        read_texts(sources, PATH, 0)


def test_what_was_forgotten_earlier_is_not_kept(tmp_path: Path) -> None:
    """It is measured in a part of its own; forgetting it again is refused, with the request's name."""
    sources = replace(files(tmp_path, 5, 9), aside=False)
    rows = read_texts(sources, PATH, 0).rows
    texts = read_texts(sources, PATH, 0, {rows["retain"][2].id: "before", "other": "before"})
    assert len(texts.rows["retain"]) == 8 and texts.rows["earlier"] == [rows["retain"][2]]
    with pytest.raises(DataError, match="found 1, the first 'what is 1' by request 'before'"):
        read_texts(sources, PATH, 0, {rows["forget"][1].id: "before"})


def test_other_answers_are_read_as_tofu_has_them(tmp_path: Path) -> None:
    """The right one in other words if there is one; a text alone is a list of one; rows without are left out."""
    lines = [
        {"question": "a", "answer": "b", WRONG: ["c", "d"], PARAPHRASED: "it is b"},
        {"question": "e", "answer": "f", WRONG: "g"},
        {"question": "h", "answer": "i", WRONG: []},
    ]
    sources = files(tmp_path, 5, 9)
    Path(sources.forget).write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = read_texts(sources, PATH, 0)
    assert list(texts.answers.values()) == [Answers("it is b", ("c", "d")), Answers("f", ("g",))]
    found = tokenised(texts, byte_tokenizer(), PATH)
    assert list(found.asked) == ["forget"] and [tree.num_sequences for tree in found.asked["forget"]] == [3, 2]
    Path(sources.forget).write_text(json.dumps({"question": "a", "answer": "b", WRONG: [1]}))
    with pytest.raises(DataError, match=r"'perturbed_answer': expected a text or a list of texts, found '\[1\]'"):
        read_texts(sources, PATH, 0)


def test_a_row_to_forget_must_fit(tmp_path: Path) -> None:
    """What is cut off would not be forgotten; rows to keep may be shortened or dropped, and are counted."""
    texts = read_texts(files(tmp_path, 5, 9, 4), PATH, 0)
    tokenizer = byte_tokenizer()
    for truncate in ("drop", "end", "oldest"):
        with pytest.raises(DataError, match=r"every row to forget to fit whole, found .* has 20 tokens"):
            tokenised(texts, tokenizer, replace(PATH, max_length=20, truncate=truncate))
    short = replace(texts, rows={**texts.rows, "forget": texts.rows["forget"][:1]})
    found = tokenised(short, tokenizer, replace(PATH, max_length=22, truncate="drop"))
    assert list(found.rows) == ["forget", "retain", "held_out"]
    assert found.counts["to keep: used"] == len(found.retain) < 9
    assert len(found.forget) == 1 and found.refused == []
    with pytest.raises(DataError, match="nothing is left"):
        tokenised(short, tokenizer, replace(PATH, max_length=22, truncate="drop"), refuse=True)
    refused = tokenised(short, tokenizer, PATH, refuse=True).refused
    assert len(refused) == 1 and refused[0] != found.forget[0]


def test_a_share_is_of_rows_that_fit(tmp_path: Path) -> None:
    """What is too long is left out and counted; the ids are those of the rows that are used."""
    data = replace(PATH, path=write(tmp_path / "all.jsonl", 40), max_length=22, truncate="drop")
    texts = read_texts(replace(NONE, share=0.5), data, 3)
    found = tokenised(texts, byte_tokenizer(), data)
    left_out = found.counts["to forget: left out, longer than max_length"]
    assert 0 < left_out == len(texts.rows["forget"]) - len(found.forget) and len(found.samples) == len(found.forget)
    with pytest.raises(DataError, match="nothing is left"):
        tokenised(texts, byte_tokenizer(), replace(data, max_length=5))
