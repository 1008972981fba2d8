"""Rows from wherever they lie: files, folders, artefact stores, saved data sets, the hub."""

import csv
import json
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from postgrad.core.store import is_sealed, read_store
from postgrad.errors import DataError

Row = dict[str, Any]
SPLITS = ("train", "validation", "valid", "val", "dev", "test")


def load_table(path: str, split: str = "train", limit: int = 0) -> list[Row]:
    """Read rows from a .jsonl, .json, .parquet or .csv file, a folder, or a hub data set.

    A folder is an artefact store, a data set saved with save_to_disk, or parquet files (those named after the split
    where any is named after a split).

    Args:
        limit: the first rows only; 0 = all.
    Raises:
        DataError: nothing there, nothing in it, or not readable; the message names the line where there is one.
    """
    if not path:
        raise DataError("expected data.path to name a file, a folder or a hub data set, found an empty text")
    place = Path(path).expanduser()
    if place.is_dir():
        rows = _read_folder(place, split, limit)
    elif place.is_file():
        rows = _read_file(place, split, limit)
    else:
        rows = _read_hub(path, split, limit)
    if not rows:
        raise DataError(f"{path} is empty: expected rows, found none")
    return rows[:limit] if limit else rows


def _read_file(path: Path, split: str, limit: int) -> list[Row]:
    readers: dict[str, Callable[[Path, str, int], list[Row]]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".parquet": _read_parquet,
        ".csv": _read_csv,
    }
    if path.suffix not in readers:
        raise DataError(f"{path}: expected a file ending in {', '.join(readers)}, found {path.suffix or 'no ending'}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: expected rows, found 0 bytes")
    try:
        return readers[path.suffix](path, split, limit)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found byte {error.start} that is not. Convert it.") from error


def _read_jsonl(path: Path, split: str, limit: int) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: expected one JSON object, found {line[:60].rstrip()!r} "
                    f"({error.msg} at column {error.colno}). Mend or remove the line."
                ) from error
            rows.append(_object(row, f"{path}, line {number}"))
            if len(rows) == limit:
                break
    return rows


def _read_json(path: Path, split: str, limit: int) -> list[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: expected JSON, found {error.msg}. A file with one "
            "object a line must end in .jsonl."
        ) from error
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        value = _choose_split(value, split, str(path))
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects, found {type(value).__name__}")
    return [_object(row, f"{path}, row {number}") for number, row in enumerate(value, start=1)]


def _read_csv(path: Path, split: str, limit: int) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            return [_whole(row, reader, path) for row in reader]
        except csv.Error as error:
            raise DataError(f"{path}, after line {reader.line_num}: expected comma-separated cells: {error}") from error


def _whole(row: Row, reader: "csv.DictReader[str]", path: Path) -> Row:
    """Refuse a row with more or fewer cells than the header; the reader marks both with None."""
    if None in row or None in row.values():
        raise DataError(
            f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} cells, found "
            f"{'more' if None in row else 'fewer'}. Quote cells that hold commas or line breaks."
        )
    return row


def _read_parquet(path: Path, split: str, limit: int) -> list[Row]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: expected a parquet file: {error}") from error
    rows: list[Row] = (table.slice(0, limit) if limit else table).to_pylist()
    return rows


def _read_folder(path: Path, split: str, limit: int) -> list[Row]:
    if is_sealed(path):
        return read_store(path)
    if any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        return _read_saved(path, split)
    files = sorted(path.glob("*.parquet"))
    named = [file for file in files if _names_split(file, split)]
    if not named and any(_names_split(file, other) for file in files for other in SPLITS):
        raise DataError(f"{path}: expected parquet files named after split {split!r}, found {[f.name for f in files]}")
    if not files:
        found = sorted(child.name for child in path.iterdir())[:10]
        raise DataError(f"{path}: expected parquet files, a store or a saved data set in it, found {found}")
    return [row for file in named or files for row in _read_file(file, split, limit)]


def _names_split(file: Path, split: str) -> bool:
    return re.search(rf"(^|[-_.]){re.escape(split)}([-_.]|$)", file.stem) is not None


def _read_saved(path: Path, split: str) -> list[Row]:
    from datasets import Dataset, load_from_disk

    try:
        data = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a data set saved with save_to_disk: {error}") from error
    rows: list[Row] = (data if isinstance(data, Dataset) else _choose_split(data, split, str(path))).to_list()
    return rows


def _read_hub(path: str, split: str, limit: int) -> list[Row]:
    """Load a hub data set, when the name can be one; else say which files lie near."""
    place = Path(path).expanduser()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or place.suffix in (".jsonl", ".json", ".parquet", ".csv"):
        raise DataError(f"expected a file, a folder or a hub data set, found no {path}.{_near(place)}")
    from datasets import load_dataset

    try:
        data = load_dataset(path, split=split)
        rows: list[Row] = (data.select(range(min(limit, len(data)))) if limit else data).to_list()
    except Exception as error:  # the hub client raises errors of many libraries
        raise DataError(
            f"no file or folder {path}, and the hub did not give a data set of that name with split {split!r} "
            f"({type(error).__name__}: {error}).{_near(place)}"
        ) from error
    return rows


def _near(path: Path) -> str:
    """Suggest names like the one that is missing."""
    folder = path.parent
    if not folder.is_dir():
        return f" The folder {folder} does not exist either."
    names = sorted(child.name for child in folder.iterdir())
    near = get_close_matches(path.name, names, n=3) or get_close_matches(path.stem, names, n=3, cutoff=0.4)
    return f" Nearest in {folder}: {', '.join(near)}." if near else ""


def _choose_split(splits: Any, split: str, path: str) -> Any:
    if split not in splits:
        raise DataError(f"{path}: expected split {split!r}, found {', '.join(splits)}. Set data.split.")
    return splits[split]


def _object(value: object, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected a JSON object, found {type(value).__name__}")
    return value
