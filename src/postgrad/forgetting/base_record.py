"""base.json and its successor: the record of the base stays what the ledger says, whatever stops the process.

A bake first lays the new record into bases/, under the hash of its bytes; then the ledger's entry makes it the base's,
and only then does it take the place of base.json. Stopped before the entry, nothing has changed. Stopped after it,
base.json is that of the base before, which `mend_record` sees and puts right.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from postgrad.core.files import atomic_path, remove
from postgrad.errors import ArtefactError
from postgrad.forgetting.entries import BakeBody, BaseBody, Entry
from postgrad.forgetting.ledger import BASE, BaseState, current_base, write_base

BASES = "bases"
Kind = Literal["classes", "boxes", "texts"]
"""What a base is for: a classifier, a detector, a language model."""
BOXES = "bbox_"
"""In the names of the layers by which detectors of the DETR family place their boxes."""


def prepare_record(folder: Path, name: str, tensors: Mapping[str, str], classes: Sequence[str]) -> BaseState:
    """Lay the record of a base to come beside the one in use, and keep that as well."""
    place = folder / BASES
    base = write_base(place / "next", name, tensors, classes)
    old = (folder / BASE).read_bytes()
    _write(place / f"{hashlib.sha256(old).hexdigest()}.json", old)
    _write(place / f"{base.record_hash}.json", (place / "next" / BASE).read_bytes())
    remove(place / "next")
    return base


def install_record(folder: Path, base: BaseState) -> None:
    """Put a record that was prepared in place of base.json."""
    _write(folder / BASE, (folder / BASES / f"{base.record_hash}.json").read_bytes())


def mend_record(folder: Path, entries: Sequence[Entry]) -> None:
    """Bring to an end what a stopped bake began, and remove what it prepared without an entry.

    Raises:  ArtefactError: base.json is neither the record that the ledger asks for nor an earlier one.
    """
    bodies = [entry.body for entry in entries if isinstance(entry.body, BaseBody | BakeBody)]
    known = {body.record_hash for body in bodies}
    base = current_base(entries)
    found = hash_file(folder / BASE)
    if found != base.record_hash:
        if (found and found not in known) or hash_file(folder / BASES / f"{base.record_hash}.json") != base.record_hash:
            raise ArtefactError(
                f"{folder / BASE}: expected SHA-256 {base.record_hash}, as the ledger says, found "
                f"{found or 'no file'}. Restore it from a copy, and do not rely on what it says."
            )
        install_record(folder, base)
    for path in (folder / BASES).iterdir() if (folder / BASES).is_dir() else ():
        if path.stem not in known:
            remove(path)


def read_classes(folder: Path) -> tuple[str, ...]:
    """Read the base's classes from base.json.

    Raises:  ArtefactError: it cannot be read.
    """
    return tuple(map(str, _record(folder)["classes"]))


def read_kind(folder: Path) -> Kind:
    """Say what a service's base is for: only a language model has no classes, only a detector layers for boxes.

    Raises:  ArtefactError: the record cannot be read.
    """
    if not read_classes(folder):
        return "texts"
    return "boxes" if any(BOXES in name for name in _record(folder)["tensors"]) else "classes"


def read_name(folder: Path) -> str:
    """Read the base's name from base.json; "" where that cannot be read."""
    try:
        return str(json.loads((folder / BASE).read_bytes())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def hash_file(path: Path) -> str:
    """Hash a file's bytes; "" where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / BASE).read_bytes())
        if not isinstance(record["classes"], list) or not isinstance(record["tensors"], dict):
            raise TypeError("classes and tensors")
        return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{folder / BASE}: expected the record of a service's base, which cannot be read: {error!r}. Give the "
            "service folder, such as runs/forget/service, or restore the file."
        ) from error


def _write(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
