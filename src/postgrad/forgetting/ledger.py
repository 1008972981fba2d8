"""The ledger of a service: a file of JSON lines that only grows, each line chained to the one before by its hash.

ledger.jsonl is written a line at a time, each flushed to disk. ledger.head says how many lines there are and ends in
which hash: it is written after each line, so that lines taken off the end are missed. Of a writer killed at work there
remains at most a line without its newline, which is dropped, or a head that is one line behind.

What this shows: any edit by somebody who does not rewrite both files to the end. Against that, sign ledger.head, or
note the hash of an entry where the writer cannot reach it, as a printed certificate does.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from postgrad.core.files import flush, write_json, write_text
from postgrad.errors import ArtefactError
from postgrad.forgetting.entries import (
    GENESIS,
    BakeBody,
    BaseBody,
    Body,
    Entry,
    Finding,
    canonical,
    digest,
    entry_line,
    entry_problem,
    make_entry,
    read_entry,
)
from postgrad.forgetting.states import State, states

__all__ = ["BASE", "HEAD", "LEDGER", "BaseState", "Ledger", "State", "current_base", "states", "utc_now", "write_base"]

LEDGER = "ledger.jsonl"
HEAD = "ledger.head"
BASE = "base.json"
LOCK_WAIT_S = 30.0
_REMEDY = "The ledger was altered or damaged: restore it from a copy, and do not rely on what it says."


def utc_now() -> datetime:
    """Tell the time."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Ledger:
    """The ledger of one service folder."""

    folder: Path
    clock: Callable[[], datetime] = utc_now

    @classmethod
    def open(cls, folder: Path, clock: Callable[[], datetime] = utc_now) -> "Ledger":
        """Open a service's ledger; where there is none yet, the first entry makes it.

        Raises:  ArtefactError: what is there is not sound.
        """
        ledger = cls(folder, clock)
        ledger.check()
        return ledger

    @property
    def path(self) -> Path:
        """Name the file."""
        return self.folder / LEDGER

    def check(self) -> None:
        """Check every line, the chain, the head and the order of states.

        Raises:  ArtefactError: with the first entry and field that is wrong.
        """
        self.entries()

    def entries(self) -> list[Entry]:
        """Read all entries, checked; without a line that a killed writer left half written.

        Raises:  ArtefactError: with the first entry and field that is wrong.
        """
        with _locked(self.path, fcntl.LOCK_SH):
            return self._read()[0]

    def problems(self) -> list[Finding]:
        """Say what is wrong with the files: the first wrong line or head, and a half-written line as a warning."""
        with _locked(self.path, fcntl.LOCK_SH):
            lines, rest = _lines(self.path)
            problem = _problem(lines, _head(self.folder))
        if problem:
            return [problem]
        torn = Finding(LEDGER, "end", "a newline", f"half a line of {len(rest)} bytes, of a killed writer", "warning")
        return [torn] if rest else []

    def append(self, body: Body) -> Entry:
        """Add an entry at the end; other writers wait for their turn.

        Raises:  ArtefactError: the ledger is not sound, the entry cannot follow, or the disk refuses. Nothing is
                 written then.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.path, fcntl.LOCK_EX) as handle:
            entries, size = self._read()
            previous = entries[-1].hash if entries else GENESIS
            moment = self.clock().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            entry = make_entry(len(entries), previous, moment, body)
            states([*entries, entry])
            if entries:
                self._write_head(entries[-1])  # it may be one behind
            _write(handle, self.path, size, entry_line(entry) + b"\n")
            self._write_head(entry)
        return entry

    def _read(self) -> tuple[list[Entry], int]:
        """Read the entries and the size of their lines in bytes."""
        lines, _ = _lines(self.path)
        if problem := _problem(lines, _head(self.folder)):
            raise ArtefactError(f"{self.folder}: {problem}. {_REMEDY}")
        entries = [read_entry(line) for line in lines]
        try:
            states(entries)
        except ArtefactError as error:
            raise ArtefactError(f"{self.path}, {error}") from error
        return entries, sum(len(line) + 1 for line in lines)

    def _write_head(self, entry: Entry) -> None:
        head = canonical({"hash": entry.hash, "num_entries": entry.index + 1}).decode("ascii")
        if not (self.folder / HEAD).is_file() or (self.folder / HEAD).read_text("ascii", "replace") != head + "\n":
            write_text(self.folder / HEAD, head + "\n")


class BaseState(NamedTuple):
    """The base now in use."""

    base_hash: str
    """Of the tensors' hashes by name."""
    record_hash: str
    """Of the bytes of base.json."""


def write_base(folder: Path, name: str, tensors: Mapping[str, str], classes: Sequence[str]) -> BaseState:
    """Write base.json, which names the base and lists its tensors' hashes and its classes."""
    record = {"name": name, "tensors": dict(sorted(tensors.items())), "classes": list(classes)}
    write_json(folder / BASE, record)
    return BaseState(digest(record["tensors"]), hashlib.sha256((folder / BASE).read_bytes()).hexdigest())


def current_base(entries: Sequence[Entry]) -> BaseState:
    """Find the base now in use: that of the first entry, or of the last bake.

    Raises:  ArtefactError: the ledger is empty.
    """
    for entry in reversed(entries):
        if isinstance(entry.body, BaseBody):
            return BaseState(entry.body.base_hash, entry.body.record_hash)
        if isinstance(entry.body, BakeBody):
            return BaseState(entry.body.new_base_hash, entry.body.record_hash)
    raise ArtefactError("the ledger is empty: expected its first entry to name the base. Begin the service anew.")


def _lines(path: Path) -> tuple[list[bytes], bytes]:
    """Split the file into whole lines and what follows the last newline."""
    *lines, rest = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    return lines, rest


def _head(folder: Path) -> tuple[int, str] | Finding:
    """Read the number of entries and the last hash on record; none before the first entry."""
    path = folder / HEAD
    if not path.is_file():
        return 0, GENESIS
    data = path.read_bytes()
    try:
        table = json.loads(data)
        head = int(table["num_entries"]), str(table["hash"])
    except (ValueError, KeyError, TypeError) as error:
        return Finding(HEAD, "content", "the number of entries and the last hash", f"{data[:60]!r} ({error!r})")
    form = canonical({"hash": head[1], "num_entries": head[0]}) + b"\n"
    return head if data == form else Finding(HEAD, "content", form.decode().strip(), repr(data[:120]))


def _problem(lines: Sequence[bytes], head: tuple[int, str] | Finding) -> Finding | None:
    """Find the first line that is wrong, or a head that does not fit the lines."""
    hashes = [GENESIS]
    for index, line in enumerate(lines):
        if problem := entry_problem(line, index, hashes[-1], LEDGER):
            return problem
        hashes.append(read_entry(line).hash)
    if isinstance(head, Finding):
        return head
    num, last = head
    if num not in (len(lines), len(lines) - 1):
        return Finding(HEAD, "num_entries", f"{len(lines)}, the entries of {LEDGER}", str(num))
    if last != hashes[num]:
        return Finding(HEAD, "hash", f"{hashes[num]}, that of entry {num - 1}", last)
    return None


def _write(handle: int, path: Path, size: int, line: bytes) -> None:
    """Put a line after the whole ones, on disk; take it back if the disk refuses."""
    new = size == 0
    try:
        os.ftruncate(handle, size)
        os.lseek(handle, size, os.SEEK_SET)
        written = os.write(handle, line)
        if written < len(line):
            raise OSError(f"only {written} of {len(line)} bytes fit on the disk")
        os.fsync(handle)
    except OSError as error:
        os.ftruncate(handle, size)
        raise ArtefactError(
            f"{path}: the entry could not be written: {error}. Make room; nothing was added."
        ) from error
    if new:
        flush(path.parent)


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[int]:
    """Hold the ledger, for reading with others or for writing alone; a reader of no file holds nothing."""
    writes = kind == fcntl.LOCK_EX
    if not writes and not path.is_file():
        yield -1
        return
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT if writes else os.O_RDONLY, 0o644)
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be opened: {error.strerror}. Mend the permissions.") from error
    try:
        _wait(handle, kind, path)
        yield handle
    finally:
        os.close(handle)


def _wait(handle: int, kind: int, path: Path) -> None:
    """Take the lock, which lasts until the file is closed, however the process ends."""
    end = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise ArtefactError(
                    f"{path}: another process has held it for {LOCK_WAIT_S:g} s. Wait for it or stop it."
                ) from None
        time.sleep(0.01)
