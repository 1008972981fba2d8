"""Files are whole or absent."""

import json
import os
from pathlib import Path

import pytest

from postgrad.core.files import atomic_path, sweep, write_json, write_text


def test_text_round_trips_with_its_newlines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    write_text(path, "one\r\ntwo\né")
    assert path.read_bytes() == "one\r\ntwo\né".encode()
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_second_write_replaces_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "long old text")
    write_text(path, "new")
    assert path.read_text() == "new"


def test_json_keeps_the_order_of_keys_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": "é"})
    assert path.read_text() == '{\n  "b": 1,\n  "a": "é"\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"b": 1, "a": "é"}


def test_an_error_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_rights_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    write_text(tmp_path / "ours", "")
    assert os.stat(tmp_path / "ours").st_mode == os.stat(ordinary).st_mode


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    left = deep / f".part.parquet.{'0' * 32}.tmp"
    left.write_text("half")
    (deep / f".model.{'f' * 32}.tmp").mkdir()
    others = [deep / ".notes.tmp", deep / "kept.tmp", tmp_path / ".lock"]
    for path in others:
        path.write_text("mine")
    sweep(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)
    assert not (deep / f".model.{'f' * 32}.tmp").exists()
