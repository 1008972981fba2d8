"""What every method promises, checked alike for each entry of METHODS on its tiny case in cases.py."""

import hashlib
import html
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cases import case

from postgrad.__main__ import main
from postgrad.core.config import dump_config, load_config
from postgrad.core.report import Report, print_report, read_metrics
from postgrad.core.runtime import progress
from postgrad.errors import Interrupted
from postgrad.methods import METHODS, config_class, method

# What tells of this day and this machine; everything else a run leaves must be the same bytes.
OF_THE_DAY = {
    "timing.jsonl", "stages.jsonl", "environment.json", "report.html", "sections.json", ".lock",
    "ledger.jsonl", "ledger.head", "certificates",
}  # fmt: skip

every_method = pytest.mark.parametrize("name", METHODS)
Output = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Straight:
    """A method's tiny case, run from start to end without a stop."""

    name: str
    config: Any
    folder: Path
    report: Report
    num_advances: int


class Killed(BaseException):
    """Stands for a process that dies: nothing is meant to catch it."""


@pytest.fixture(scope="module", params=METHODS)
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Run a method once for all tests that look at what it leaves."""
    name = request.param
    inputs = tmp_path_factory.mktemp(f"{name}-inputs")
    folder = tmp_path_factory.mktemp(name)
    config = case(name, inputs)
    calls: list[int] = []
    with inside(folder), at_each_advance(lambda: calls.append(1)):
        report = method(name).run(config)
    return Straight(name, config, folder, report, len(calls))


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder: cases name their run folder relative to it, so that no path differs between runs."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def at_each_advance(action: Callable[[], object]) -> Iterator[None]:
    """Do something whenever a progress bar moves, which every method does between its pieces of work."""
    with pytest.MonkeyPatch.context() as patch:
        advance = progress.advance

        def advance_and_act(self: progress, n: int = 1, note: str = "") -> None:
            advance(self, n, note)
            action()

        patch.setattr(progress, "advance", advance_and_act)
        yield


def contents(folder: Path) -> dict[str, str]:
    """Hash every file that must not differ between two runs of one config."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    kept = [path for path in files if not OF_THE_DAY & set(path.parts)]
    return {str(path): hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in kept}


def run_until(name: str, config: Any, calls: int, stop: Callable[[], None]) -> None:
    """Run a method and stop it when its progress moved `calls` times."""
    left = [calls]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            stop()

    with at_each_advance(count):
        method(name).run(config)


def terminate() -> None:
    """Send the signal that asks a run to stop; where none listens, stop as it would."""
    if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, None):
        raise Interrupted("nobody listens for signals here")
    os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    """Die without a word."""
    raise Killed


@every_method
def test_settings_round_trip(name: str, tmp_path: Path) -> None:
    for config in (config_class(name)(), case(name, tmp_path)):
        path = tmp_path / "recipe.toml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(type(config), path) == config


@every_method
def test_a_dry_run_shows_config_and_plan_and_writes_nothing(name: str, tmp_path: Path, capsys: Output) -> None:
    config = case(name, tmp_path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_config(config), encoding="utf-8")
    work = tmp_path / "work"
    work.mkdir()
    with inside(work):
        assert main([name, str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"# postgrad {name}\n{dump_config(config)}")
    assert list(work.iterdir()) == []
    planned = method(name).plan(config)
    assert planned and all(isinstance(value, str | int | float) for value in planned.values())


@every_method
def test_flags_reach_every_setting(name: str, capsys: Output) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    for line in dump_config(config_class(name)()).splitlines():
        if " = " in line:
            assert line.split(" = ")[0].replace("_", "-") in out


def test_the_report_is_complete(straight: Straight, capsys: Output) -> None:
    folder, report = straight.folder / straight.report.folder, straight.report
    assert report.method == straight.name and report.results
    written = json.loads((folder / "result.json").read_text())
    assert written == {"method": straight.name, "results": dict(report.results)}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert straight.name in page and "<html" in page and not re.search(r"(src|href)=.http|<script|@import", page)
    for section in report.sections:
        assert section.title in html.unescape(page)
    print_report(report)
    assert straight.name in capsys.readouterr().out
    assert load_config(type(straight.config), folder / "config.toml") == straight.config
    assert json.loads((folder / "environment.json").read_text())["device"]


def test_the_loss_falls(straight: Straight) -> None:
    if vars(method(straight.name)).get("LOSS", True) is None:
        pytest.skip(f"{straight.name} has no loss")
    losses = [row["loss"] for row in read_metrics(straight.folder / straight.report.folder) if "loss" in row]
    assert len(losses) >= 20, f"the case of {straight.name} logs {len(losses)} steps; 20 are needed"
    assert sum(losses[-3:]) < sum(losses[:3]), losses


def test_the_same_seed_gives_the_same_bytes(straight: Straight, tmp_path: Path) -> None:
    with inside(tmp_path):
        again = method(straight.name).run(straight.config)
    assert dict(again.results) == dict(straight.report.results)
    assert contents(tmp_path) == contents(straight.folder)


def test_a_stopped_and_a_killed_run_end_as_one_never_stopped(straight: Straight, tmp_path: Path) -> None:
    assert straight.num_advances >= 3, f"{straight.name} must show its progress between pieces of work"
    third = straight.num_advances // 3
    with inside(tmp_path):
        with pytest.raises(Interrupted):
            run_until(straight.name, straight.config, third, terminate)
        with pytest.raises(Killed):
            run_until(straight.name, straight.config, third, kill)
        report = method(straight.name).run(straight.config)
    assert dict(report.results) == dict(straight.report.results)
    assert contents(tmp_path) == contents(straight.folder)


def test_a_finished_run_is_not_run_again(straight: Straight) -> None:
    before = contents(straight.folder)
    with inside(straight.folder), at_each_advance(kill):
        again = method(straight.name).run(straight.config)
    assert dict(again.results) == dict(straight.report.results)
    assert contents(straight.folder) == before


def test_a_folder_that_holds_another_run_is_refused(straight: Straight, capsys: Output) -> None:
    runtime = replace(straight.config.runtime, seed=straight.config.runtime.seed + 1)
    other = dump_config(replace(straight.config, runtime=runtime))
    (straight.folder / "other.toml").write_text(other, encoding="utf-8")
    try:
        with inside(straight.folder):
            assert main([straight.name, "other.toml"]) == 2
    finally:
        (straight.folder / "other.toml").unlink()
    assert "runtime.seed" in capsys.readouterr().err
