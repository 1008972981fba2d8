"""The lock of a service folder: one process, which may hold it several times."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from postgrad.errors import ArtefactError
from postgrad.forgetting.service_lock import LOCK, hold


def is_free(folder: Path) -> bool:
    """Try the lock as another process would."""
    handle = os.open(folder / LOCK, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def test_it_is_held_until_the_last_one_lets_go(tmp_path: Path) -> None:
    first, second = hold(tmp_path), hold(tmp_path / ".")
    assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    first()
    assert not is_free(tmp_path)
    second()
    assert is_free(tmp_path)
    hold(tmp_path)()
    assert is_free(tmp_path)


def test_a_folder_made_anew_is_another_one(tmp_path: Path) -> None:
    folder = tmp_path / "service"
    folder.mkdir()
    old = hold(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    new = hold(folder)
    old()
    assert not is_free(folder)
    new()
    assert is_free(folder)


def test_a_folder_that_another_holds_is_refused(tmp_path: Path) -> None:
    handle = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ArtefactError, match="in use by another process"):
        hold(tmp_path)
    os.write(handle, b"process 7 on moon")
    with pytest.raises(ArtefactError, match="in use by process 7 on moon"):
        hold(tmp_path)
    os.close(handle)
    hold(tmp_path)()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="cannot be written in: No such file"):
        hold(tmp_path / "none")
