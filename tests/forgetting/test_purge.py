"""Purging from the command line: only what is named and confirmed, once, whatever stops the run."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from forget_runs import Killed
from forgotten import Made, forgotten

from postgrad.__main__ import main
from postgrad.core.config import RuntimeConfig, dump_config
from postgrad.errors import ArtefactError, ConfigError, DataError, Interrupted
from postgrad.forgetting import deletion
from postgrad.forgetting import purge as module
from postgrad.forgetting.deletion import NOTED, unlinked
from postgrad.forgetting.entries import PurgeBody
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.purge import PurgeConfig, check, plan, run
from postgrad.forgetting.verification import hash_files, verify_service

NUM_FILES = 3


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return forgotten(tmp_path)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{number}.png" for number in range(NUM_FILES)]
    for file in found:
        file.write_bytes(b"somebody")
    return found


@pytest.fixture
def config(made: Made, files: list[Path], tmp_path: Path) -> PurgeConfig:
    return PurgeConfig(
        service=str(made.service), request="first", files=tuple(map(str, files)), delete=True,
        runtime=RuntimeConfig(folder=str(tmp_path / "run"), device="cpu", quiet=True),
    )  # fmt: skip


def purged(folder: Path) -> list[PurgeBody]:
    return [entry.body for entry in Ledger(folder).entries() if isinstance(entry.body, PurgeBody)]


def there(files: list[Path]) -> list[bool]:
    return [file.exists() for file in files]


def test_named_files_are_deleted_and_entered(config: PurgeConfig, made: Made, files: list[Path]) -> None:
    other = files[0].with_name("other.png")
    other.write_bytes(b"somebody else")
    report = run(config)
    assert report.results == {"files_deleted": 3} and there(files) == [False] * 3 and other.exists()
    (body,) = purged(made.service)
    assert (body.request, body.num_files) == ("first", 3) and verify_service(made.service) == []
    assert run(config).results == report.results and len(purged(made.service)) == 1
    with pytest.raises(ArtefactError, match="'first' were purged before"):
        run(replace(config, files=(str(other),), runtime=replace(config.runtime, folder=config.runtime.folder + "2")))
    assert other.exists()


def test_nothing_is_deleted_unconfirmed(config: PurgeConfig, made: Made, files: list[Path], tmp_path: Path) -> None:
    doubtful = replace(config, delete=False)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_config(doubtful), encoding="utf-8")
    old = hash_files(made.service)
    with pytest.raises(ConfigError, match=r"delete: 3 files would be deleted for good and nothing was.*--delete"):
        run(doubtful)
    assert main(["purge", str(recipe), "--dry-run"]) == 0 and main(["purge", str(recipe)]) == 2
    assert hash_files(made.service) == old and all(there(files)) and not (tmp_path / "run").exists()


def test_the_plan_says_what_would_go(config: PurgeConfig) -> None:
    found = plan(replace(config, delete=False))
    assert found == {
        "request": "first, frozen", "files to delete": 3, "bytes to delete": 24, "deleted already": 0,
        "confirmed": "no: --delete is missing",
    }  # fmt: skip
    assert plan(config)["confirmed"] == "yes"
    with pytest.raises(ArtefactError, match="no request 'frist' was applied"):
        plan(replace(config, request="frist"))


def test_a_rehearsal_deletes_nothing(config: PurgeConfig, made: Made, files: list[Path], tmp_path: Path) -> None:
    old = hash_files(made.service)
    report = run(replace(config, delete=False, rehearse=True))
    assert report.results == {"files_deleted": 0} and all(there(files))
    changed = {name for name, value in hash_files(made.service).items() if old.get(name) != value}
    assert changed <= {".lock"} and len(purged(tmp_path / "run" / "service")) == 1


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_purge_goes_on(
    config: PurgeConfig, made: Made, files: list[Path], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    left = [after]

    def dying(path: Path) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        unlinked(path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "unlinked", dying)
        run(config)
    assert there(files) == [False] * after + [True] * (NUM_FILES - after)
    assert (made.service / NOTED).is_file() and not purged(made.service)
    assert plan(config)["deleted already"] == after
    assert run(config).results == {"files_deleted": 3} and not any(there(files))
    assert len(purged(made.service)) == 1 and not (made.service / NOTED).exists() and verify_service(made.service) == []


def test_killed_after_the_entry_it_is_not_entered_twice(
    config: PurgeConfig, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(deletion, "remove", die)
        run(config)
    assert run(config).results == {"files_deleted": 3}
    assert len(purged(made.service)) == 1 and not (made.service / NOTED).exists()


def test_a_signal_stops_between_two_files(
    config: PurgeConfig, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(path: Path) -> None:
        unlinked(path)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(module, "unlinked", stopping)
        run(config)
    assert there(files) == [False, True, True]
    assert run(config).results == {"files_deleted": 3}


def test_what_cannot_be_meant_is_refused(config: PurgeConfig, made: Made, files: list[Path], tmp_path: Path) -> None:
    for changes, message in (
        ({"service": str(tmp_path)}, r"service: expected a service folder with ledger\.jsonl"),
        ({"request": ""}, r"request, files: expected the id of a request .* found '' and 3 files"),
        ({"files": ()}, r"request, files: .* found 'first' and 0 files"),
        ({"rehearse": True}, "delete, rehearse: a rehearsal deletes nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(replace(config, **changes))  # type: ignore[arg-type]
    (tmp_path / "link.png").symlink_to(files[0])
    again = replace(config, runtime=replace(config.runtime, overwrite=True))
    for wrong in (str(tmp_path), str(tmp_path / "x.png"), str(made.service / "base.json"), str(tmp_path / "link.png")):
        with pytest.raises(DataError, match=r"(expected a file to delete, found none|the service's own files)"):
            run(replace(again, files=(str(files[0]), wrong)))
    with pytest.raises(DataError, match="each once"):
        run(replace(again, files=(str(files[0]), str(files[0]))))
    assert all(there(files)) and not purged(made.service)
