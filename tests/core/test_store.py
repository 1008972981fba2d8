"""Stores: the same bytes for the same content, whole shards or none, damage named."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from postgrad.core.store import (
    content_hash,
    has_shard,
    is_sealed,
    read_manifest,
    read_store,
    seal,
    shard_path,
    store_hash,
    write_shard,
)
from postgrad.errors import ArtefactError

SCHEMA = pa.schema([("id", pa.string()), ("k", pa.int64()), ("scores", pa.list_(pa.float64()))])
ROWS = [{"id": "a", "k": k, "scores": [k / 2, -1.0]} for k in range(5)]


def fill(folder: Path) -> str:
    write_shard(folder, 0, ROWS[:3], SCHEMA)
    write_shard(folder, 1, ROWS[3:], SCHEMA)
    return seal(
        folder, stage="sample", settings={"seed": 1, "names": ("x",)}, parents={"policy": "f00"}, counts={"n": 5}
    )


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    assert not has_shard(tmp_path / "s", 0)
    store = fill(tmp_path / "s")
    assert has_shard(tmp_path / "s", 1) and is_sealed(tmp_path / "s")
    assert read_store(tmp_path / "s") == ROWS
    assert read_store(tmp_path / "s", ["k"]) == [{"k": k} for k in range(5)]
    manifest = read_manifest(tmp_path / "s")
    assert manifest["hash"] == store == store_hash(tmp_path / "s")
    assert manifest["parents"] == {"policy": "f00"} and manifest["settings"] == {"seed": 1, "names": ["x"]}
    assert [shard["rows"] for shard in manifest["shards"]] == [3, 2]


def test_the_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    assert fill(tmp_path / "a") == fill(tmp_path / "elsewhere")
    for name in ("part-00000.parquet", "part-00001.parquet", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "elsewhere" / name).read_bytes()
    write_shard(tmp_path / "b", 0, [{**ROWS[0], "k": 9}, *ROWS[1:3]], SCHEMA)
    write_shard(tmp_path / "b", 1, ROWS[3:], SCHEMA)
    other = seal(tmp_path / "b", stage="sample", settings={}, parents={}, counts={})
    assert other != store_hash(tmp_path / "a")


def test_sealing_twice_changes_nothing_and_other_content_is_refused(tmp_path: Path) -> None:
    store = fill(tmp_path)
    again = seal(
        tmp_path, stage="sample", settings={"seed": 1, "names": ["x"]}, parents={"policy": "f00"}, counts={"n": 5}
    )
    assert again == store
    with pytest.raises(ArtefactError, match="already sealed with other content"):
        seal(tmp_path, stage="sample", settings={"seed": 2}, parents={}, counts={})
    with pytest.raises(ArtefactError, match=r"is sealed, so part-00002.parquet cannot be written"):
        write_shard(tmp_path, 2, ROWS, SCHEMA)


def test_tampering_names_the_shard(tmp_path: Path) -> None:
    fill(tmp_path)
    shard = shard_path(tmp_path, 1)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtefactError, match=r"part-00001.parquet is damaged: expected sha256 .* found"):
        read_store(tmp_path)
    shard.unlink()
    with pytest.raises(ArtefactError, match=r"part-00001.parquet is missing; the manifest lists 2 rows"):
        read_store(tmp_path)


@pytest.mark.parametrize("damage", ["altered", "not json", "list", "foreign"])
def test_a_damaged_manifest_is_named(tmp_path: Path, damage: str) -> None:
    fill(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["counts"]["n"] = 6
    foreign = {"hash": content_hash({"shards": [{"name": "../x"}]}), "shards": [{"name": "../x"}]}
    texts = {"altered": json.dumps(manifest), "not json": "{", "list": "[]", "foreign": json.dumps(foreign)}
    path.write_text(texts[damage])
    with pytest.raises(ArtefactError, match=r"manifest.json (was altered|is not the manifest of a store)"):
        read_store(tmp_path)


def test_an_unfinished_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no such folder"):
        read_store(tmp_path / "none")
    write_shard(tmp_path, 0, ROWS, SCHEMA)
    with pytest.raises(ArtefactError, match=r"no manifest.json \(1 shards of an unfinished stage\)"):
        read_store(tmp_path)
    write_shard(tmp_path, 2, ROWS, SCHEMA)
    with pytest.raises(ArtefactError, match=r"expected shards 0 to 1, found no part-00001"):
        seal(tmp_path, stage="s", settings={}, parents={}, counts={})


def test_a_shard_cut_short_is_not_sealed(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, 0, ROWS, SCHEMA)
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ArtefactError, match=r"part-00000.parquet is damaged .*the same command writes it again"):
        seal(tmp_path, stage="s", settings={}, parents={}, counts={})


def test_rows_that_do_not_fit_the_schema_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ArtefactError, match=r"part-00000.parquet: a row does not fit the columns \['id', 'k', 'scores'\]"
    ):
        write_shard(tmp_path, 0, [{"id": "a", "k": "many"}], SCHEMA)
    fill(tmp_path)
    with pytest.raises(ArtefactError, match=r"expected columns \['q'\], found \['id', 'k', 'scores'\]"):
        read_store(tmp_path, ["k", "q"])


def test_a_full_disk_leaves_no_half_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(table: pa.Table, path: Path, compression: str) -> None:
        Path(path).write_bytes(b"PAR1 half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(ArtefactError, match=r"part-00000.parquet could not be written: .*No space left.*make room"):
        write_shard(tmp_path, 0, ROWS, SCHEMA)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_whole_shards_only(tmp_path: Path) -> None:
    """The second shard's writer is killed with half its bytes on disk; the rest of the stage goes on as usual."""
    code = f"""
import os, signal, sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
from postgrad.core.store import write_shard
folder, rows, schema = Path({str(tmp_path)!r}), {ROWS!r}, pa.schema(
    [("id", pa.string()), ("k", pa.int64()), ("scores", pa.list_(pa.float64()))])
write_shard(folder, 0, rows[:3], schema)
def die(table, path, compression):
    Path(path).write_bytes(b"PAR1 half")
    os.kill(os.getpid(), signal.SIGKILL)
pq.write_table = die
write_shard(folder, 1, rows[3:], schema)
"""
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "the test needs a leftover"
    assert has_shard(tmp_path, 0) and not has_shard(tmp_path, 1)
    write_shard(tmp_path, 1, ROWS[3:], SCHEMA)
    settings = {"seed": 1, "names": ["x"]}
    store = seal(tmp_path, stage="sample", settings=settings, parents={"policy": "f00"}, counts={"n": 5})
    assert read_store(tmp_path) == ROWS
    assert store == fill(tmp_path / "straight")
