"""Purging: only named files are deleted, and a stopped purge is gone on with."""

from pathlib import Path

import pytest
from forget_runs import Killed
from forgotten import Made, forgotten, load

from postgrad.core.vision_models import classifier_hash
from postgrad.errors import ArtefactError, DataError
from postgrad.forgetting import deletion
from postgrad.forgetting import service as module
from postgrad.forgetting.entries import PurgeBody
from postgrad.forgetting.service import Service
from postgrad.forgetting.verification import verify_service


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return forgotten(tmp_path / "given")


@pytest.fixture
def service(made: Made) -> Service:
    return Service.open(made.service, load(made.model), "base")


def die(*_: object) -> None:
    raise Killed


def sound(made: Made) -> bool:
    return verify_service(made.service, tensors=classifier_hash(load(made.model))) == []


def test_purging_deletes_the_files_that_were_named(service: Service, made: Made, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file in files:
        file.write_bytes(b"somebody")
    with pytest.raises(DataError, match="one of the service's own"):
        service.purge("first", [files[0], made.service / "base.json"])
    with pytest.raises(DataError, match="found none"):
        service.purge("first", [tmp_path / "x.png"])
    with pytest.raises(ArtefactError, match="no request 'x'"):
        service.purge("x", files)
    assert all(file.is_file() for file in files)
    entry = service.purge("first", files[:2])
    assert isinstance(entry.body, PurgeBody) and entry.body.num_files == 2
    assert [file.is_file() for file in files] == [False, False, True] and sound(made)
    with pytest.raises(ArtefactError, match="purged before"):
        service.purge("first", files[2:])
    with pytest.raises(DataError, match="one file or more"):
        service.purge("second", [files[2], files[2]])


def test_a_stopped_purge_is_gone_on_with(
    service: Service, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for file in files:
        file.write_bytes(b"somebody")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "enter", die)
        service.purge("first", files)
    again = Service.open(made.service, load(made.model), "base")
    files[1].write_bytes(b"somebody, restored")
    with pytest.raises(DataError, match="Name them again"):
        again.purge("first", files[:1])
    entry = again.purge("first", files)
    assert isinstance(entry.body, PurgeBody) and entry.body.num_files == 2 and not files[1].exists()
    assert not (made.service / "purge.json").exists() and sound(made)


def test_a_note_left_after_the_entry_is_removed(
    service: Service, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(b"somebody")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(deletion, "remove", die)
        service.purge("first", [tmp_path / "a.png"])
    assert (made.service / "purge.json").is_file()
    again = Service.open(made.service, load(made.model), "base")
    assert not (made.service / "purge.json").exists() and again.ledger.entries()[-1].kind == "purge"
