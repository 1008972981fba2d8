"""One process at a time works on a service folder: two would each train without the other's request."""

import fcntl
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from postgrad.errors import ArtefactError

LOCK = ".lock"


@dataclass
class _Lock:
    """An open lock file, and how many in this process count on it."""

    handle: int
    holders: int = 1


_locks: dict[Path, _Lock] = {}


def hold(folder: Path) -> Callable[[], None]:
    """Hold a service folder for this process, which may hold it already; give what lets go of it again.

    When the process ends in any way, the system lets go.

    Raises:  ArtefactError: another process holds the folder, or it cannot be written in.
    """
    key = folder.resolve()
    lock = _locks.get(key)
    if lock is not None and os.fstat(lock.handle).st_nlink > 0:  # 0: the folder was deleted and made anew
        lock.holders += 1
    else:
        lock = _locks[key] = _Lock(_open(folder))
    return partial(_release, key, lock)


def _open(folder: Path) -> int:
    """Open and lock the file, and write into it who has it."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ArtefactError(
            f"{folder}: cannot be written in: {error.strerror}. Mend the path or its rights."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace") or "another process"
        os.close(handle)
        raise ArtefactError(f"{folder} is in use by {holder}. Wait for it or stop it, then try again.") from None
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return handle


def _release(key: Path, lock: _Lock) -> None:
    lock.holders -= 1
    if lock.holders == 0:
        os.close(lock.handle)
        if _locks.get(key) is lock:
            del _locks[key]
