import fcntl
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from postgrad.core.config import RuntimeConfig, TrainConfig, load_config
from postgrad.core.report import Note, Plot, Report, Series, Table
from postgrad.core.run_folder import cut_log, read_result, release_folder, take_folder, write_result
from postgrad.errors import ArtefactError, ConfigError

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """A method's config."""

    size: int = 3
    """Its own setting."""
    train: TrainConfig = TrainConfig()
    """Training."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Runtime."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder that is let go of before the next test."""
    folder = tmp_path / "runs" / "toy"
    yield folder  # type: ignore[misc]
    release_folder(folder)


def test_the_record_runs_the_run_again(folder: Path) -> None:
    config = ToyConfig(size=7)
    take_folder(folder, config, "toy", CPU)
    text = (folder / "config.toml").read_text()
    assert text.startswith("# postgrad toy\n") and load_config(ToyConfig, folder / "config.toml") == config


def test_the_environment_is_written_and_holds_no_keys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret-7")
    monkeypatch.setattr("sys.argv", ["x/postgrad", "sft", "--data.path", "my file"])
    take_folder(folder, ToyConfig(), "toy", CPU)
    text = (folder / "environment.json").read_text()
    found = json.loads(text)
    assert found["torch"] == torch.__version__ and found["device"] == "cpu" and found["num_ranks"] == 1
    assert found["command"] == "postgrad sft --data.path 'my file'" and "secret-7" not in text
    commit = Path(__file__).parents[2] / ".git"
    assert bool(found["git_commit"]) == commit.exists()


def test_a_folder_of_another_config_is_refused_with_the_differences(folder: Path) -> None:
    take_folder(folder, ToyConfig(), "toy", CPU)
    (folder / "metrics.jsonl").touch()
    release_folder(folder)
    other = ToyConfig(size=4, train=TrainConfig(epochs=2.0))
    with pytest.raises(ConfigError, match=r"(?s)size: 3 -> 4\n  train.epochs: 1.0 -> 2.0\nChoose another .*overwrite"):
        take_folder(folder, other, "toy", CPU)
    with pytest.raises(ConfigError, match="method: toy -> sft"):
        take_folder(folder, ToyConfig(), "sft", CPU)
    (folder / "config.toml").write_text("# postgrad toy\nsise = 3\n")
    with pytest.raises(ConfigError, match=r"cannot be read: .*unknown key 'sise'"):
        take_folder(folder, ToyConfig(), "toy", CPU)


def test_a_run_that_left_nothing_gives_way(folder: Path) -> None:
    take_folder(folder, ToyConfig(), "toy", CPU)
    release_folder(folder)
    take_folder(folder, ToyConfig(size=4), "toy", CPU)
    assert "size = 4" in (folder / "config.toml").read_text()
    release_folder(folder)
    (folder / "config.toml").write_text("my own recipe")
    with pytest.raises(ConfigError, match="overwrite"):
        take_folder(folder, ToyConfig(), "toy", CPU)
    assert (folder / "config.toml").read_text() == "my own recipe"


def test_where_it_lies_and_what_it_prints_do_not_differ(folder: Path) -> None:
    take_folder(folder, ToyConfig(), "toy", CPU)
    before = (folder / "config.toml").read_text()
    take_folder(folder, ToyConfig(runtime=RuntimeConfig(folder="x", overwrite=True, quiet=True)), "toy", CPU)
    assert (folder / "config.toml").read_text() == before


def test_overwrite_empties_a_folder_of_another_config_only(folder: Path) -> None:
    take_folder(folder, ToyConfig(), "toy", CPU)
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("old")
    (folder / "link").symlink_to(folder.parent)
    overwrite = RuntimeConfig(overwrite=True)
    take_folder(folder, ToyConfig(runtime=overwrite), "toy", CPU)
    assert (folder / "model" / "weights").exists(), "the same config continues"
    take_folder(folder, ToyConfig(size=4, runtime=overwrite), "toy", CPU)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.toml", "environment.json"]
    assert "size = 4" in (folder / "config.toml").read_text() and folder.parent.is_dir()


def test_overwrite_spares_where_the_user_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_folder(folder, ToyConfig(), "toy", CPU)
    (folder / "metrics.jsonl").touch()
    other = ToyConfig(size=4, runtime=RuntimeConfig(overwrite=True))
    (folder / ".git").mkdir()
    with pytest.raises(ConfigError, match="git checkout"):
        take_folder(folder, other, "toy", CPU)
    (folder / ".git").rmdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="working folder"):
        take_folder(Path("."), other, "toy", CPU)


def test_a_folder_in_use_is_refused(folder: Path) -> None:
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as other:
        other.write("process 123 on mars")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)  # another open file: as if by another process
        with pytest.raises(ConfigError, match="in use by process 123 on mars"):
            take_folder(folder, ToyConfig(), "toy", CPU)
    take_folder(folder, ToyConfig(), "toy", CPU)  # it ended, however it did
    assert f"process {os.getpid()} on" in (folder / ".lock").read_text()


def test_a_run_that_failed_can_be_tried_again_in_the_same_process(folder: Path) -> None:
    take_folder(folder, ToyConfig(), "toy", CPU)
    take_folder(folder, ToyConfig(), "toy", CPU)
    with (folder / ".lock").open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_refused_folder_is_let_go_of(folder: Path) -> None:
    take_folder(folder, ToyConfig(), "toy", CPU)
    (folder / "metrics.jsonl").touch()
    release_folder(folder)
    with pytest.raises(ConfigError):
        take_folder(folder, ToyConfig(size=4), "toy", CPU)
    with (folder / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_deleted_meanwhile_is_taken_anew(folder: Path) -> None:
    take_folder(folder, ToyConfig(), "toy", CPU)
    (folder / ".lock").unlink()
    take_folder(folder, ToyConfig(), "toy", CPU)
    assert (folder / ".lock").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write in .*file/run: Not a directory"):
        take_folder(tmp_path / "file" / "run", ToyConfig(), "toy", CPU)


REPORT = Report(
    "toy",
    Path("set by the test"),
    {"rate": 0.25, "steps": 3, "name": "x", "missing": math.inf},
    (
        Table("t", ("a", "b"), ((1, "x"), (0.5, "y")), "n"),
        Plot("p", "x", "y", (Series("s", (1.0, 2.0), (3.0, 4.0), (2.0, 3.0), (4.0, 5.0), dashed=True),), log_x=True),
        Note("n", "text", "warning"),
    ),
)


def test_a_report_comes_back(tmp_path: Path) -> None:
    report = replace(REPORT, folder=tmp_path)
    assert read_result(tmp_path) is None
    write_result(report)
    assert read_result(tmp_path) == report
    assert json.loads((tmp_path / "result.json").read_text())["results"]["steps"] == 3


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    write_result(replace(REPORT, folder=tmp_path))
    (tmp_path / "sections.json").unlink()
    with pytest.raises(ArtefactError, match=r"(?s)result.json: expected the results .*Delete it"):
        read_result(tmp_path)


def test_a_log_is_cut_back(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    cut_log(log, 3)
    assert not log.exists()
    log.write_text('{"step": 2}\n{"note": "x"}\n{"step": 3}\n{"step": 4}\n{"ste')
    cut_log(log, 3)
    assert log.read_text() == '{"step": 2}\n{"note": "x"}\n{"step": 3}\n'
    log.write_bytes(b'{"step": 2}\n\x00\xff\x00\n7\n{"step": 3}')
    cut_log(log, 3)
    assert log.read_text() == '{"step": 2}\n'
