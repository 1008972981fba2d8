"""Artefact stores: folders of parquet shards under a manifest with their hashes.

A stage writes shards one by one, each whole or absent, and seals the folder at the end. A stage that was killed finds
with `has_shard` what it has already written. The bytes depend on the content alone: no times, no paths.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from postgrad.core.files import atomic_path, write_json
from postgrad.core.items import content_hash
from postgrad.errors import ArtefactError

__all__ = [
    "content_hash",
    "has_shard",
    "is_sealed",
    "read_manifest",
    "read_store",
    "seal",
    "shard_path",
    "store_hash",
    "write_shard",
]

MANIFEST = "manifest.json"
SHARD = re.compile(r"part-(\d{5})\.parquet")
Row = dict[str, Any]
_REMEDY = "Restore it, or remove the folder and run the stage that writes it again."


def shard_path(folder: Path, index: int) -> Path:
    """Name a shard."""
    return folder / f"part-{index:05d}.parquet"


def write_shard(folder: Path, index: int, rows: Sequence[Row], schema: pa.Schema) -> Path:
    """Write one shard, atomically.

    Raises:
        ArtefactError: the store is sealed, a row does not fit the schema, or the disk refuses.
    """
    path = shard_path(folder, index)
    if is_sealed(folder):
        raise ArtefactError(
            f"{folder} is sealed, so {path.name} cannot be written: its hash is on record. Write to another folder, "
            "or run with --runtime.overwrite to begin anew."
        )
    try:
        table = pa.Table.from_pylist(list(rows), schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ArtefactError(f"{path}: a row does not fit the columns {schema.names}: {error}") from error
    try:
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")
    except OSError as error:
        raise ArtefactError(
            f"{path} could not be written: {error}. Nothing half-written is left; make room or mend the "
            "permissions, and the same command continues from the shards that are whole."
        ) from error
    return path


def has_shard(folder: Path, index: int) -> bool:
    """Say whether a shard is already written; what is there is whole."""
    return shard_path(folder, index).is_file()


def seal(
    folder: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    counts: Mapping[str, int],
) -> str:
    """Write the manifest: no more shards, and from now on every reader checks the hashes.

    Args:
        settings: what the content depends on (JSON values).
        parents: name -> hash of each store or model this one was made from.
        counts: rows and prompts read, kept, dropped.

    Returns: the hash of the store.
    Raises:
        ArtefactError: a shard number is missing, or the store is sealed with other content.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = _shards(folder)
    missing = sorted({*range(len(paths))} - {int(path.stem[5:]) for path in paths})
    if missing:
        raise ArtefactError(
            f"{folder}: expected shards 0 to {len(paths) - 1}, found no {shard_path(folder, missing[0]).name}. Run "
            "the stage again; it writes what is missing."
        )
    shards = [_describe(path) for path in paths]
    content = {
        "format": "postgrad store 1",
        "stage": stage,
        "settings": dict(settings),
        "parents": dict(parents),
        "counts": dict(counts),
        "shards": shards,
    }
    content = json.loads(json.dumps(content, allow_nan=False))  # tuples become lists, as they will be when read
    store = content_hash(content)
    if is_sealed(folder) and store_hash(folder) != store:
        raise ArtefactError(
            f"{folder} is already sealed with other content (hash {store_hash(folder)}, now {store}). Write to "
            "another folder, or run with --runtime.overwrite to begin anew."
        )
    write_json(folder / MANIFEST, {"hash": store, **content})
    return store


def is_sealed(folder: Path) -> bool:
    """Say whether the store is finished."""
    return (folder / MANIFEST).is_file()


def store_hash(folder: Path) -> str:
    """Give the hash of a sealed store: of its shards, settings and parents."""
    return str(read_manifest(folder)["hash"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a sealed store.

    Raises:
        ArtefactError: not sealed, not a manifest, or altered.
    """
    path = folder / MANIFEST
    if not path.is_file():
        state = f"{len(_shards(folder))} shards of an unfinished stage" if folder.is_dir() else "no such folder"
        raise ArtefactError(
            f"expected a sealed store in {folder}, found no {MANIFEST} ({state}). Run the stage that writes it; it "
            "continues where it stopped."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        claimed = manifest.pop("hash")
        actual = content_hash(manifest)
        names = [shard["name"] for shard in manifest["shards"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{path} is not the manifest of a store ({error!r}). {_REMEDY}") from error
    if claimed != actual or not all(SHARD.fullmatch(name) for name in names):
        raise ArtefactError(f"{path} was altered: it claims hash {claimed} and has {actual}. {_REMEDY}")
    return {"hash": actual, **manifest}


def read_store(folder: Path, columns: Sequence[str] | None = None) -> list[Row]:
    """Read all rows of a sealed store, in order, checking every shard against its hash.

    Raises:
        ArtefactError: not sealed, a shard is missing or damaged, or a column does not exist.
    """
    rows: list[Row] = []
    for shard in read_manifest(folder)["shards"]:
        path = folder / shard["name"]
        if not path.is_file():
            raise ArtefactError(f"{path} is missing; the manifest lists {shard['rows']} rows in it. {_REMEDY}")
        data = path.read_bytes()
        actual = hashlib.sha256(data).hexdigest()
        if actual != shard["sha256"]:
            raise ArtefactError(
                f"{path} is damaged: expected sha256 {shard['sha256'][:16]}..., found {actual[:16]}... {_REMEDY}"
            )
        file = pq.ParquetFile(pa.BufferReader(data))
        missing = [name for name in columns or () if name not in file.schema_arrow.names]
        if missing:
            raise ArtefactError(f"{path}: expected columns {missing}, found {file.schema_arrow.names}")
        rows += file.read(columns=None if columns is None else list(columns)).to_pylist()
    return rows


def _shards(folder: Path) -> list[Path]:
    """List the shards in order; leftovers of killed writers have other names."""
    return sorted(path for path in folder.iterdir() if SHARD.fullmatch(path.name))


def _describe(path: Path) -> dict[str, str | int]:
    data = path.read_bytes()
    try:
        rows = pq.ParquetFile(pa.BufferReader(data)).metadata.num_rows
    except pa.ArrowInvalid as error:
        raise ArtefactError(f"{path} is damaged ({error}). Remove it; the same command writes it again.") from error
    return {"name": path.name, "rows": rows, "sha256": hashlib.sha256(data).hexdigest()}
