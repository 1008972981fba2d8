"""Parity: names of candidates, pairs that differ in nothing else, one set of tokens, gates, what comes apart."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, PrecisionConfig, RuntimeConfig, diff_config
from postgrad.core.runtime import Job
from postgrad.errors import ConfigError, DataError, Diverged, GateError
from postgrad.fp8 import parity, pretrain
from postgrad.fp8.parity import ParityConfig, check, one_run, plan, precision_of, run
from postgrad.fp8.parity_report import REFERENCE
from postgrad.fp8.pretrain import PretrainConfig

TEXT = "the quick brown fox jumps over the lazy dog and the dog sleeps on\n"


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave report.html out: drawing it takes longer than these runs."""
    monkeypatch.setattr("postgrad.core.runtime.write_report", lambda report, title: None)


def config(folder: Path, **more: Any) -> ParityConfig:
    """Runs of eight steps, a second each."""
    (folder / "text.txt").write_text(TEXT * 40)
    usual = PretrainConfig().train
    train = replace(
        usual, max_steps=8, batch_size=4, log_every=2, eval_every=4, optim=replace(usual.optim, lr=1e-2)
    )  # fmt: skip
    one = PretrainConfig(
        model=ModelConfig(tiny_width=48, tiny_layers=1),
        data=DataConfig(path=str(folder / "text.txt"), max_length=32),
        train=train,
    )
    runtime = RuntimeConfig(folder=str(folder / "run"), seed=5, quiet=True)
    return replace(ParityConfig(candidates=("O2",), num_seeds=2, pretrain=one, runtime=runtime), **more)


def job(folder: Path) -> Job:
    """A job in a folder."""
    import torch

    return Job("parity", folder, 5, torch.device("cpu"), torch.float32, 0, 1, True)


def test_names_become_settings() -> None:
    """Parts add up; the rest stays as the runs have it."""
    base = PrecisionConfig(min_size=32, watch_every=7)
    assert precision_of("O1", base) == replace(base, level="O1")
    assert precision_of("e4m3_v", base) == replace(base, level="O2", state="e4m3_v")
    everything = precision_of("O3+stochastic+delayed+measured+native", base)
    assert everything == PrecisionConfig(
        level="O3", rounding="stochastic", scaling="delayed", scales="jit", reduction="native", min_size=32,
        watch_every=7,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": ("O22",)}, "'O22' has an unknown part 'O22'; nearest is 'O2'"),
        ({"candidates": ("stochastic",)}, r"names no level; write for instance 'O2\+stochastic'"),
        ({"candidates": ("O2", "O2")}, "expected different names"),
        ({"candidates": ()}, "expected different names, one at least"),
        ({"num_seeds": 0}, "num_seeds must be >= 1"),
        ({"bar": 0.0}, "bar > 0"),
        ({"pretrain": PretrainConfig(runtime=RuntimeConfig(seed=1))}, "pretrain.runtime is set by parity"),
        ({"pretrain": PretrainConfig(eval_blocks=-1)}, "eval_blocks"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """The message says what to write instead."""
    with pytest.raises(ConfigError, match=message):
        check(config(tmp_path, **change))


def test_a_level_of_all_runs_is_refused(tmp_path: Path) -> None:
    good = config(tmp_path)
    train = replace(good.pretrain.train, precision=PrecisionConfig(level="O1"))
    with pytest.raises(ConfigError, match="set by parity: use --candidates"):
        check(replace(good, pretrain=replace(good.pretrain, train=train)))


def test_pairs_differ_in_number_formats_alone(tmp_path: Path) -> None:
    """A reference and its candidate have one seed; seeds follow one another; the tokens are those of all."""
    settings, at = config(tmp_path), job(tmp_path / "run")
    pair = [one_run(settings, at, name, 6) for name in (REFERENCE, "e4m3_v")]
    assert [line.split(":")[0] for line in diff_config(*pair)] == [
        "train.precision.level", "train.precision.state", "runtime.folder",
    ]  # fmt: skip
    assert pair[0].runtime.seed == 6 and pair[0].data.path == str(tmp_path / "run")
    assert parity.seeds(settings) == [5, 6]


def test_run(tmp_path: Path) -> None:
    """Four runs below one folder on one set of tokens; a second call hands back what the first found."""
    settings = config(tmp_path)
    report = run(settings)
    assert run(settings).results == report.results
    folders = sorted(str(path.parent.relative_to(tmp_path / "run")) for path in tmp_path.rglob("*/*/*/result.json"))
    assert folders == [f"seed-{seed}/{name}" for seed in (5, 6) for name in ("O2", "reference")]
    assert [path.parent.parent.name for path in tmp_path.rglob("train.bin")] == ["run"]
    losses = {}
    for place in folders:
        losses[place] = json.loads((tmp_path / "run" / place / "result.json").read_text())["results"]["loss"]
    gaps = [100 * (losses[f"seed-{s}/O2"] / losses[f"seed-{s}/reference"] - 1) for s in (5, 6)]
    assert report.results["gap_percent_O2"] == pytest.approx(sum(gaps) / 2)
    assert all(0 < abs(gap) < 5 for gap in gaps), "FP8 rounds, and not by much"
    first = [json.loads((tmp_path / "run" / f"seed-5/{name}/metrics.jsonl").read_text().splitlines()[0])["loss"]
             for name in ("reference", "O2")]  # fmt: skip
    assert first[0] == pytest.approx(first[1], rel=0.02), "both begin with the same weights and blocks"


def test_the_gate(tmp_path: Path) -> None:
    """A bar that nothing meets: an error only where one is asked for, each time, and the report is written."""
    settings = config(tmp_path, bar=1e-9, num_seeds=1)
    assert run(settings).results["verdict"] == "no parity"
    gated = replace(settings, gate="refuse", runtime=replace(settings.runtime, folder=str(tmp_path / "gated")))
    for _ in range(2):
        with pytest.raises(GateError, match="expected parity, found 'no parity'"):
            run(gated)
    assert (tmp_path / "gated" / "result.json").is_file()


def test_a_run_that_comes_apart_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as a gap without end, with its curve up to there."""
    whole = pretrain.run

    def torn(settings: PretrainConfig) -> Any:
        if settings.train.precision.level == "off":
            return whole(settings)
        folder = Path(settings.runtime.folder)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"step": 2, "loss": 5.0}\n{"step": 4, "eval/loss": 4.0}\n')
        raise Diverged("Step 5: not finite")

    monkeypatch.setattr(pretrain, "run", torn)
    report = run(config(tmp_path, num_seeds=1))
    assert report.results["verdict"] == "no parity" and report.results["gap_percent_O2"] == float("inf")


def test_something_has_to_be_held_out(tmp_path: Path) -> None:
    good = config(tmp_path)
    data = replace(good.pretrain.data, held_out=0.0)
    with pytest.raises(DataError, match="at least 33 held-out tokens to compare on, found 0"):
        run(replace(good, pretrain=replace(good.pretrain, data=data)))


def test_plan_counts_all_runs(tmp_path: Path) -> None:
    """Two seeds of a reference and three candidates, eight steps each."""
    found = plan(config(tmp_path, candidates=ParityConfig().candidates))
    assert found["runs"] == 8 and found["optimizer steps of all runs"] == 64 and found["optimizer steps"] == 8
    assert OptimConfig().beta2 != PretrainConfig().train.optim.beta2 == 0.95
    assert not (tmp_path / "run").exists()
