import json
import os
import random
import re
import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from postgrad.core import run_folder, runtime
from postgrad.core.config import RuntimeConfig
from postgrad.core.report import Report
from postgrad.core.runtime import Job, finish, finished, progress, stage_seed, start, stop_on_signals, stop_requested
from postgrad.errors import ConfigError, Interrupted


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """A method's config."""

    runtime: RuntimeConfig = RuntimeConfig()
    """Runtime."""


def toy(folder: Path, seed: int = 0) -> ToyConfig:
    return ToyConfig(runtime=RuntimeConfig(folder=str(folder), seed=seed, device="cpu"))


def fine(config: ToyConfig) -> None:
    """Find nothing wrong."""


def test_a_run_from_start_to_finish(tmp_path: Path) -> None:
    job = start(toy(tmp_path / "run", seed=5), fine, "toy")
    assert job == Job("toy", tmp_path / "run", 5, torch.device("cpu"), torch.float32, 0, 1, quiet=False)
    assert finished(job) is None
    report = Report("toy", job.folder, {"loss": 0.5})
    assert finish(job, report) is report
    assert json.loads((job.folder / "result.json").read_text()) == {"method": "toy", "results": {"loss": 0.5}}
    assert finished(start(toy(tmp_path / "run", seed=5), fine, "toy")) == report


def test_the_folder_defaults_to_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = start(ToyConfig(), fine, "toy")
    assert job.folder == Path("runs/toy") and (tmp_path / "runs" / "toy" / "config.toml").exists()
    finish(job, Report("toy", job.folder, {}))


def test_the_check_comes_first(tmp_path: Path) -> None:
    def check(config: ToyConfig) -> None:
        raise ConfigError("size must be > 0")

    with pytest.raises(ConfigError, match="size"):
        start(toy(tmp_path / "run"), check, "toy")
    assert not (tmp_path / "run").exists()


def test_stages_run_within_a_run(tmp_path: Path) -> None:
    """Nested folders, one after the other; a stage that fails leaves the others alone."""
    outer = start(toy(tmp_path), fine, "align")
    for name in ("sft", "reward"):
        stage = start(toy(tmp_path / name), fine, name)
        assert {outer.folder.resolve(), stage.folder.resolve()} <= set(run_folder._locks)
        finish(stage, Report(name, stage.folder, {}))
        assert stage.folder.resolve() not in run_folder._locks
    with pytest.raises(ConfigError):
        start(toy(tmp_path / "sft", seed=1), fine, "sft")
    assert start(toy(tmp_path / "dpo"), fine, "dpo").world == 1
    start(toy(tmp_path / "dpo"), fine, "dpo")
    finish(outer, Report("align", outer.folder, {}))


def test_the_seed_sets_every_generator(tmp_path: Path) -> None:
    drawn = []
    for _ in range(2):
        start(toy(tmp_path, seed=2**40 + 3), fine, "toy")
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert drawn[0] == drawn[1]


def test_stage_seeds_are_stable_and_apart() -> None:
    assert stage_seed(0, "order", 1) == 3560704936019802908
    assert stage_seed(0, "order", np.int64(1)) == stage_seed(0, "order", 1)
    seeds = {stage_seed(0), stage_seed(1), stage_seed(0, "a"), stage_seed(0, "a", "b"), stage_seed(0, "ab")}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_gpu_is_named(tmp_path: Path) -> None:
    config = ToyConfig(runtime=RuntimeConfig(folder=str(tmp_path), device="cuda"))
    with pytest.raises(ConfigError, match=r"runtime.device: 'cuda' is asked for, but torch .* finds no CUDA device"):
        start(config, fine, "toy")


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match=r"rank 1 .* finds 1\. Start at most 1"):
        runtime._choose_device(RuntimeConfig())


def test_deterministic_kernels_are_asked_for(tmp_path: Path) -> None:
    config = toy(tmp_path)
    start(config, fine, "toy")
    assert torch.are_deterministic_algorithms_enabled()
    start(ToyConfig(runtime=replace(config.runtime, deterministic=False, folder=str(tmp_path / "b"))), fine, "toy")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_signal_asks_once_and_stops_the_second_time() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        assert not stop_requested()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_requested()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_nobody_looked_at_is_not_lost() -> None:
    reached = False
    with pytest.raises(Interrupted), stop_on_signals():
        with stop_on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
        reached = True  # the inner block leaves it to the outer one
    assert reached
    with stop_on_signals():
        assert not stop_requested()


def test_signals_are_left_alone_in_other_threads() -> None:
    errors = []

    def work() -> None:
        try:
            with stop_on_signals():
                pass
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


def job(quiet: bool = False, rank: int = 0) -> Job:
    return Job("toy", Path("x"), 0, torch.device("cpu"), torch.float32, rank, 1, quiet)


def test_progress_prints_a_line_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(job(), 200, "toy", done=100) as bar:
        for _ in range(100):
            bar.advance(note="loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert re.fullmatch(r"toy 120/200, \S+/s, \d:\d\d:\d\d left, loss 0.5", lines[0])


def test_progress_is_silent_when_asked_and_on_other_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    for silent in (job(quiet=True), job(rank=1)):
        with progress(silent, 1, "toy") as bar:
            bar.advance()
    assert capsys.readouterr().err == ""


def test_progress_shows_one_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress(job(), 10, "outer") as bar, progress(job(), 2, "inner") as inner:
        bar.advance(3, note="loss 0.25")
        inner.advance()
    shown = capsys.readouterr().err
    assert "outer" in shown and "loss 0.25" in shown and "inner 1/2" in shown and "3/10" in shown
    assert not progress._bar_shown
