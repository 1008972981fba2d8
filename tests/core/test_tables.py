"""Rows from every kind of place, and what is said when there are none."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from postgrad.core.store import seal, write_shard
from postgrad.core.tables import load_table
from postgrad.errors import ArtefactError, DataError

ROWS = [{"prompt": f'say "{i}",\nplease é', "response": str(i)} for i in range(4)]


def write(folder: Path, name: str) -> Path:
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".csv":
        quoted = ["prompt,response", *('"' + r["prompt"].replace('"', '""') + '",' + r["response"] for r in ROWS)]
        path.write_text("\n".join(quoted), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_files(tmp_path: Path, name: str) -> None:
    path = str(write(tmp_path, name))
    assert load_table(path) == ROWS
    assert load_table(path, limit=2) == ROWS[:2]


def test_json_with_splits(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": ROWS[:1], "test": ROWS[1:]}))
    assert load_table(str(path), "test") == ROWS[1:]
    with pytest.raises(DataError, match=r"a\.json: expected split 'dev', found train, test"):
        load_table(str(path), "dev")


def test_folder_of_parquet_by_split(tmp_path: Path) -> None:
    for name, rows in {
        "train-00000-of-2": ROWS[:1],
        "train-00001-of-2": ROWS[1:2],
        "test-00000-of-1": ROWS[2:],
    }.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    assert load_table(str(tmp_path), "train") == ROWS[:2]
    assert load_table(str(tmp_path), "test") == ROWS[2:]
    with pytest.raises(DataError, match=r"named after split 'validation', found \['test-00000-of-1.parquet'"):
        load_table(str(tmp_path), "validation")


def test_folder_of_parquet_without_splits(tmp_path: Path) -> None:
    write(tmp_path, "b.parquet")
    assert load_table(str(tmp_path)) == ROWS


def test_store_is_checked(tmp_path: Path) -> None:
    path = write_shard(tmp_path, 0, ROWS, pa.schema([("prompt", pa.string()), ("response", pa.string())]))
    seal(tmp_path, stage="s", settings={}, parents={}, counts={})
    assert load_table(str(tmp_path), limit=3) == ROWS[:3]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ArtefactError, match=r"part-00000\.parquet is damaged"):
        load_table(str(tmp_path))


def test_saved_data_sets(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "many")
    assert load_table(str(tmp_path / "one")) == ROWS
    assert load_table(str(tmp_path / "many"), "test") == ROWS[:1]
    with pytest.raises(DataError, match="expected split 'dev', found train, test"):
        load_table(str(tmp_path / "many"), "dev")


def test_missing_files_suggest_their_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "prompts.jsonl")
    with pytest.raises(DataError, match=r"found no .*promts\.jsonl. Nearest in .*: prompts\.jsonl\."):
        load_table(str(tmp_path / "promts.jsonl"))
    with pytest.raises(DataError, match=r"Nearest in .*: prompts\.jsonl\."):
        load_table(str(tmp_path / "prompts.parquet"))
    with pytest.raises(DataError, match=r"The folder .*nowhere does not exist either"):
        load_table(str(tmp_path / "nowhere" / "a.json"))
    with pytest.raises(DataError, match="found an empty text"):
        load_table("")


def test_a_data_set_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, split: str) -> None:
        raise ConnectionError(f"cannot reach the hub for {path}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"no file or folder some/name, and the hub .*split 'train' .*cannot reach"):
        load_table("some/name")


def test_a_data_set_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: datasets.Dataset.from_list(ROWS))
    assert load_table("some/name") == ROWS
    assert load_table("some/name", limit=1) == ROWS[:1]
    assert load_table("some/name", limit=99) == ROWS


def test_a_split_may_have_a_compound_name(tmp_path: Path) -> None:
    for name, rows in {"train_sft-00000-of-1": ROWS[:1], "test_sft-00000-of-1": ROWS[1:]}.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    assert load_table(str(tmp_path), "train_sft") == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"a": 1}\n\n{"a": \n',
            r"a\.jsonl, line 3: expected one JSON object, found '\{\"a\":' \(Expecting value",
        ),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl, line 2: expected a JSON object, found list"),
        ("a.jsonl", "\n\n", r"a\.jsonl is empty: expected rows"),
        ("a.jsonl", "", r"a\.jsonl is empty: expected rows, found 0 bytes"),
        ("a.json", '[{"a": 1},\n oops]', r"a\.json, line 2, column 2: expected JSON.*must end in \.jsonl"),
        ("a.json", "[]", r"a\.json is empty"),
        ("a.json", "[3]", r"a\.json, row 1: expected a JSON object, found int"),
        ("a.json", '{"a": 3}', r"a\.json: expected a list of objects, found dict"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a\.csv, line 3: expected 2 cells, found more"),
        ("a.csv", "a,b\n1\n", r"a\.csv, line 2: expected 2 cells, found fewer"),
        ("a.csv", 'a,b\n"1,2\n', r"a\.csv, after line 1: expected comma-separated cells"),
        ("a.csv", "a,b\n", r"a\.csv is empty"),
        ("a.parquet", "PAR1", r"a\.parquet: expected a parquet file"),
        ("a.txt", "x", r"a\.txt: expected a file ending in \.jsonl, \.json, \.parquet, \.csv, found \.txt"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_table(str(tmp_path / name))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match=r"a\.jsonl: expected UTF-8 text, found byte 7"):
        load_table(str(tmp_path / "a.jsonl"))


def test_a_folder_with_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"a saved data set in it, found \['notes\.txt'\]"):
        load_table(str(tmp_path))
