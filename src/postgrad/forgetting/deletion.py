"""Delete the files that held a request's data, and enter in the ledger how many they were.

What is to be deleted is noted in the service folder first, so that the same call can go on where a process was stopped
midway. Only files that the caller names are deleted. Copies, backups and snapshots of a disk are beyond this.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from postgrad import __version__
from postgrad.core.files import remove, write_json
from postgrad.errors import ArtefactError, DataError
from postgrad.forgetting.entries import ApplyBody, Entry, PurgeBody

NOTED = "purge.json"


def unlinked(path: Path) -> None:
    """Delete a file; one that is gone already is fine."""
    path.unlink(missing_ok=True)


def purge_files(
    folder: Path,
    entries: Sequence[Entry],
    request: str,
    files: Sequence[Path],
    enter: Callable[[PurgeBody], Entry],
    unlink: Callable[[Path], object] = unlinked,
) -> Entry:
    """Delete files that held the data of a request.

    Args:    enter: adds an entry to the ledger.  unlink: deletes a file, which may be gone.
    Raises:  ArtefactError: no such request, or its data were purged before.
             DataError: a file that is none, stands there twice, or is one of the service's own.
    """
    paths, noted = [path.absolute() for path in files], _noted(folder, request)
    body = check_purge(folder, entries, request, files)
    every = sorted({*noted, *map(str, paths)})
    write_json(folder / NOTED, {"request": request, "files": every})
    for path in paths:
        unlink(path)
    if left := [path for path in every if Path(path).is_file() and path not in set(map(str, paths))]:
        raise DataError(f"{left} were named when the data of {request!r} began to be purged. Name them again.")
    entry = enter(
        PurgeBody(request=request, manifest_hash=body.manifest_hash, num_files=len(every), code_version=__version__)
    )
    remove(folder / NOTED)
    return entry


def check_purge(folder: Path, entries: Sequence[Entry], request: str, files: Sequence[Path]) -> ApplyBody:
    """Refuse what cannot be purged, and give the request's entry.

    Raises:  as `purge_files`.
    """
    bodies = [entry.body for entry in entries if isinstance(entry.body, ApplyBody) and entry.body.request == request]
    if not bodies:
        raise ArtefactError(f"no request {request!r} was applied, so there are no data of it to purge.")
    if request in _purged(entries):
        raise ArtefactError(f"the data of request {request!r} were purged before.")
    _check(folder, [path.absolute() for path in files], _noted(folder, request))
    return bodies[-1]


def forget_note(folder: Path, entries: Sequence[Entry]) -> None:
    """Remove the note of a purge that is in the ledger already."""
    if any(_noted(folder, request) for request in _purged(entries)):
        remove(folder / NOTED)


def _purged(entries: Sequence[Entry]) -> set[str]:
    return {entry.body.request for entry in entries if isinstance(entry.body, PurgeBody)}


def _noted(folder: Path, request: str) -> list[str]:
    """List what a stopped process was about to delete for this request."""
    if not (folder / NOTED).is_file():
        return []
    note = json.loads((folder / NOTED).read_bytes())
    return [str(path) for path in note["files"]] if note["request"] == request else []


def _check(folder: Path, paths: Sequence[Path], noted: Sequence[str]) -> None:
    for path in paths:
        if path.is_symlink() or not (path.is_file() or str(path) in noted):
            raise DataError(f"{path}: expected a file to delete, found none. Name the files themselves.")
        if path.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{path} is one of the service's own files, which are needed. Name files of data.")
    if not paths or len(set(paths)) < len(paths):
        raise DataError(f"expected one file or more to delete, each once; found {[str(path) for path in paths]}.")
