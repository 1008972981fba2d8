"""Parity: the same pretraining in full precision and in FP8, over paired seeds, and how far they come apart.

Source:    FP8-LM (arXiv 2310.18313), table 6 and figures 4 and 8: FP8 follows full precision, and what does not.
Differs:   a verdict by numbers. A candidate passes when the mean gap of its last held-out loss to the reference is at
           most `bar` percent and no larger than the spread of the reference over seeds. Two recipes that the paper
           found to fail run beside it: where they do not fail, the run is too short or too easy to tell anything.

    postgrad parity                                                    # O2 and two controls, three seeds, tiny
    postgrad parity --candidates O1 O2 O2+stochastic --num-seeds 5

A pair shares its first weights, the order of its data and its steps; nothing but number formats differs. Every run is
one of `postgrad pretrain` with a folder below this one; a stopped comparison goes on in the run and step where it was.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from postgrad.core.blocks import spread_blocks
from postgrad.core.config import DataConfig, PrecisionConfig, RuntimeConfig, nearest
from postgrad.core.documents import load_corpus
from postgrad.core.report import Report, read_metrics
from postgrad.core.runtime import Job, finish, finished, start
from postgrad.errors import ConfigError, DataError, Diverged, GateError
from postgrad.fp8 import pretrain
from postgrad.fp8.parity_report import CONTROLS, PARITY, REFERENCE, Curve, comparison
from postgrad.fp8.pretrain import PretrainConfig

LOSS = None
PARTS: dict[str, dict[str, Any]] = {
    "O1": {"level": "O1"},
    "O2": {"level": "O2"},
    "O3": {"level": "O3"},
    "e4m3_v": {"level": "O2", "state": "e4m3_v"},
    "e4m3_master": {"level": "O2", "state": "e4m3_master"},
    "bf16_master": {"level": "O2", "state": "bf16_master"},
    "stochastic": {"rounding": "stochastic"},
    "delayed": {"scaling": "delayed"},
    "measured": {"scales": "jit"},
    "native": {"reduction": "native"},
    "full": {"products": "full"},
}
"""What the parts of a candidate's name set in PrecisionConfig."""


@dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """One pretraining, many ways to round it."""

    candidates: tuple[str, ...] = ("O2", *CONTROLS)
    """O1, O2, O3, e4m3_v, e4m3_master, bf16_master; after a +: full, stochastic, delayed, measured, native."""
    num_seeds: int = 3
    """Runs of each kind; the first has runtime.seed, each further one the next."""
    bar: float = 0.3
    """Largest mean gap of a held-out loss to the reference that counts as parity, in percent."""
    gate: Literal["warn", "refuse"] = "warn"
    """Whether a comparison without parity ends in an error, for scripts; its report is written in either case."""
    pretrain: PretrainConfig = PretrainConfig(
        eval_blocks=128,
        data=DataConfig(max_length=128),
        train=replace(PretrainConfig().train, max_steps=400, batch_size=16, eval_every=40),
    )
    """Every run; its level, seed and folder are set here."""
    runtime: RuntimeConfig = RuntimeConfig()


def precision_of(name: str, base: PrecisionConfig) -> PrecisionConfig:
    """Turn a candidate's name into settings.

    Raises:  ConfigError: a part that is not known, or none that names a level.
    """
    settings: dict[str, Any] = {}
    for part in name.split("+"):
        if part not in PARTS:
            guess = nearest(part, PARTS)
            hint = f"; nearest is {guess!r}" if guess else ""
            raise ConfigError(f"candidates: {name!r} has an unknown part {part!r}{hint}. Known: {', '.join(PARTS)}.")
        settings |= PARTS[part]
    if "level" not in settings:
        raise ConfigError(f"candidates: {name!r} names no level; write for instance 'O2+{name}'.")
    return replace(base, **settings)


def check(config: ParityConfig) -> None:
    """Refuse settings that contradict each other."""
    pretrain.check(config.pretrain)
    for name in config.candidates:
        precision_of(name, config.pretrain.train.precision)
    if not config.candidates or len(set(config.candidates)) < len(config.candidates):
        raise ConfigError(f"candidates: expected different names, one at least, found {config.candidates}.")
    if config.num_seeds < 1 or not config.bar > 0:
        raise ConfigError(f"num_seeds must be >= 1 and bar > 0, got {config.num_seeds} and {config.bar}.")
    if config.pretrain.runtime != RuntimeConfig():
        raise ConfigError("pretrain.runtime is set by parity for all runs: use --runtime.")
    if config.pretrain.train.precision.level != "off":
        raise ConfigError("pretrain.train.precision.level is set by parity: use --candidates.")


def plan(config: ParityConfig) -> dict[str, str | int | float]:
    """Say what a comparison would do: its runs, and one of them."""
    check(config)
    one = pretrain.plan(replace(config.pretrain, runtime=config.runtime))
    num = config.num_seeds * (1 + len(config.candidates))
    return {"runs": num, "optimizer steps of all runs": num * int(one["optimizer steps"]), **one}


def seeds(config: ParityConfig) -> list[int]:
    """List the seeds of the pairs."""
    return [config.runtime.seed + i for i in range(config.num_seeds)]


def one_run(config: ParityConfig, job: Job, name: str, seed: int) -> PretrainConfig:
    """Give the settings of a run: those of all, but for its number formats, its seed and its folder."""
    train = config.pretrain.train
    if name != REFERENCE:
        train = replace(train, precision=precision_of(name, train.precision))
    folder = str(job.folder / f"seed-{seed}" / name)
    runtime = replace(config.runtime, folder=folder, seed=seed, overwrite=False)
    data = replace(config.pretrain.data, path=str(job.folder))  # the tokens, made once for all
    return replace(config.pretrain, data=data, train=train, runtime=runtime)


def measure(config: PretrainConfig) -> Curve:
    """Run one pretraining, or what is left of it; of one that came apart, keep the curve up to there."""
    diverged = ""
    try:
        loss = float(pretrain.run(config).results["loss"])
    except Diverged as error:
        loss, diverged = math.inf, str(error)
    train: dict[int, float] = {}
    held: dict[int, float] = {}
    for row in read_metrics(Path(config.runtime.folder)):
        for key, curve in (("loss", train), ("eval/loss", held)):
            if isinstance(value := row.get(key), float):
                curve[int(str(row["step"]))] = value
    return Curve(loss, train, held, diverged)


def prepare(config: ParityConfig, job: Job) -> None:
    """Make the tokens that all runs read.

    Raises:  DataError: nothing is held out to compare on.
    """
    base = config.pretrain
    corpus = load_corpus(base.data, base.text_column, pretrain.choose_tokenizer(base), job)
    if not spread_blocks(corpus.held, base.data.max_length, 1):
        raise DataError(
            f"expected at least {base.data.max_length + 1} held-out tokens to compare on, found "
            f"{len(corpus.held.tokens)}. Give more text, raise data.held_out or lower data.max_length."
        )


def run(config: ParityConfig) -> Report:
    """Run every pair and put them side by side."""
    job = start(config, check, "parity")
    report = finished(job)
    if report is None:
        prepare(config, job)
        curves: dict[str, list[Curve]] = {name: [] for name in (REFERENCE, *config.candidates)}
        for seed in seeds(config):
            for name, found in curves.items():
                found.append(measure(one_run(config, job, name, seed)))
        results, sections = comparison(curves, seeds(config), config.bar)
        report = finish(job, Report("parity", job.folder, results, sections))
    if config.gate == "refuse" and report.results["verdict"] != PARITY:
        raise GateError(
            f"{report.folder}: expected parity, found {report.results['verdict']!r}; report.html says what came apart."
        )
    return report
