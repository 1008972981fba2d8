"""Which baselines there are, their numbers, and what a user may change.

Source:  numbers and schedules of GS-LoRA's released code (arXiv 2403.11530), from its ImageNet100 script, whose head is
         linear as classifiers' here are. Its face scripts have l2 0.1, ewc 10, mas 0.005, der 0.01 and derpp 0.005,
         0.005 at lr 1e-3, fdr 50, lwf kd 0.5 and remain 10, scrub gamma 0.99, scrub_s gamma 0.99 and smoothing 0.1.
         Others: SCRUB's notebooks have gamma 1, alpha 0.5 and 3 of 10 epochs that forget; SSD's code has alpha 10, for
         ViT 5 as here, for faces 50 with lambda 0.1, and relabels for 3 epochs; SalUn takes half of the weights and 10
         epochs.
Differs: numbers of neggrad are ours. The lower half alone trains in lirf; the official ratio of 50.66 % counts a norm
         and a head that it does not use, without them it is 50.39 % of the Face Transformer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from postgrad.core.config import nearest
from postgrad.errors import ConfigError
from postgrad.forgetting.baselines_parts import Trains
from postgrad.forgetting.baselines_steps import (
    Objective,
    der_logits_objective,
    der_objective,
    fdr_objective,
    fdr_probabilities_objective,
    lirf_objective,
    lwf_objective,
    lwf_official_objective,
    neggrad_objective,
    penalised_objective,
    relabel_objective,
    retain_objective,
    scrub_objective,
)

Need = Literal["", "retain", "both", "attention", "l2", "ewc", "mas", "mask"]
"""What is computed of the original model before training: its outputs on images, importances, or a mask."""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """How baselines train; one config serves them all."""

    epochs: int = 0
    """Passes over the retained images; 0 = the method's own."""
    lr: float = 0.0
    """Highest learning rate; 0 = the method's own."""
    weight_decay: float = -1.0
    """Decoupled weight decay of matrices; -1 = the method's own."""
    batch_size: int = 48
    """Images of each set a step, over all ranks."""
    micro_images: int = 0
    """Images a forward pass; 0 = all of a rank's share of the step."""
    numbers: tuple[str, ...] = ()
    """Numbers in the methods' formulas, as "ssd.alpha=50"; BASELINES lists them."""
    labels: Literal["kept", "official"] = "kept"
    """Random labels are kept classes, or, as in the official code, the first classes of all."""
    trains: Literal["own", "all", "body", "lower", "last"] = "own"
    """Which weights train: the method's own choice, all, all but the head, the lower half, or the last blocks."""
    last_blocks: int = 1
    """Blocks that train, with the head, where trains is "last"."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    save_every: int = 100
    """Steps between checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """How a baseline trains."""

    objective: Objective | None
    """None: weights are changed once, without training."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """In the formula, by name. A bound of 0 stands for twice the logarithm of the number of classes."""
    epochs: int = 100
    """Passes over the retained images."""
    lr: float = 1e-4
    """Highest learning rate of AdamW."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices."""
    warmup: float = 0.0
    """Share of the steps over which the learning rate rises."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on from there; the cosine ends at a tenth."""
    trains: Trains = "body"
    """Which weights train."""
    need: Need = ""
    """What the objective asks of the original model."""
    sees_forget: bool = True
    """Whether there are images to forget in a step."""
    by_position: bool = False
    """Take the last columns of the logits for the kept classes, wherever these are."""
    rounds: int = 1
    """Trainings one after the other, each on passes over one set, then the other; 1 = both sets in each step."""


def _scrub(gamma: float, smoothing: float) -> Baseline:
    numbers = {"gamma": gamma, "alpha": 0.001, "temperature": 2.0, "smoothing": smoothing}
    return Baseline(
        objective=scrub_objective, numbers=numbers, weight_decay=5e-4, schedule="constant", need="both", rounds=10
    )


_KEEP = Baseline(objective=retain_objective, lr=3e-4, warmup=0.05, trains="all", sees_forget=False)
_LWF = Baseline(objective=lwf_objective, numbers={"kd": 0.5, "remain": 10.0, "temperature": 2.0}, need="retain")
_DER = Baseline(objective=der_objective, numbers={"lambda": 0.01, "replay": 0.0}, need="retain")
_FDR = Baseline(objective=fdr_objective, numbers={"lambda": 40.0}, lr=1e-3, need="retain")
_LIRF = Baseline(
    objective=lirf_objective,
    numbers={"a": 0.1, "temperature": 10.0, "attention": 300.0, "distil": 10.0, "replay": 5.0},
    trains="lower",
    need="attention",
)

BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {
        "gold": _KEEP,
        "retrain": _KEEP,
        "finetune": replace(_KEEP, epochs=10, lr=1e-4, warmup=0.0),
        "neggrad": Baseline(
            objective=neggrad_objective, numbers={"forget": 0.2, "bound": 0.0}, epochs=10, trains="all"
        ),
        "random_labels": Baseline(objective=relabel_objective, epochs=3, trains="all"),
        "scrub": _scrub(20.0, 0.0),
        "scrub_s": _scrub(10.0, 0.05),
        "ssd": Baseline(objective=None, numbers={"alpha": 5.0, "lambda": 1.0, "whole": 0.0}, trains="all"),
        "salun": Baseline(
            objective=relabel_objective, numbers={"share": 0.5}, epochs=10, weight_decay=0.0, trains="all", need="mask"
        ),
        "l2": Baseline(objective=penalised_objective, numbers={"lambda": 0.05}, need="l2"),
        "ewc": Baseline(objective=penalised_objective, numbers={"lambda": 3.0}, need="ewc"),
        "mas": Baseline(objective=penalised_objective, numbers={"lambda": 0.002}, need="mas"),
        "lwf": _LWF,
        "lwf_official": replace(_LWF, objective=lwf_official_objective),
        "der": _DER,
        "der_logits": replace(_DER, objective=der_logits_objective),
        "derpp": replace(_DER, numbers={"lambda": 0.01, "replay": 0.5}),
        "fdr": _FDR,
        "fdr_probabilities": replace(_FDR, objective=fdr_probabilities_objective),
        "lirf": _LIRF,
        "lirf_official": replace(_LIRF, by_position=True),
    }
)


def check_baselines(config: BaselineConfig) -> None:
    """Refuse settings that make no sense."""
    if config.batch_size < 1 or config.micro_images < 0 or config.epochs < 0 or config.lr < 0:
        raise ConfigError(
            "expected batch_size of 1 or more and micro_images, epochs and lr of 0 or more, found "
            f"{config.batch_size}, {config.micro_images}, {config.epochs} and {config.lr}."
        )
    for entry in config.numbers:
        _parse(entry)


def settled(name: str, config: BaselineConfig) -> Baseline:
    """Look up a baseline and put the config's choices in the place of its own.

    Raises: ConfigError: no such baseline, number or value.
    """
    check_baselines(config)
    if name not in BASELINES:
        hint = nearest(name, BASELINES)
        near = f"; nearest is {hint!r}" if hint else ""
        raise ConfigError(f"expected a baseline, found {name!r}{near}. There are {', '.join(BASELINES)}.")
    own = BASELINES[name]
    if name == "salun" and config.weight_decay > 0:
        raise ConfigError(
            "weight_decay: expected 0 for salun, since decay reaches weights outside its mask; found "
            f"{config.weight_decay}."
        )
    changed = {number: value for who, number, value in map(_parse, config.numbers) if who == name}
    return replace(
        own,
        numbers={**own.numbers, **changed},
        epochs=config.epochs or own.epochs,
        lr=config.lr or own.lr,
        weight_decay=own.weight_decay if config.weight_decay < 0 else config.weight_decay,
        trains=own.trains if config.trains == "own" else config.trains,
    )


def _parse(entry: str) -> tuple[str, str, float]:
    """Read "ssd.alpha=50"."""
    key, _, text = entry.partition("=")
    name, _, number = key.strip().partition(".")
    if name not in BASELINES or number not in BASELINES[name].numbers:
        known = {who: [f"{who}.{which}" for which in baseline.numbers] for who, baseline in BASELINES.items()}
        there = known.get(name, []) or [entry for entries in known.values() for entry in entries]
        raise ConfigError(
            f"numbers: expected entries like 'ssd.alpha=50', found {entry!r}. There are {', '.join(there)}."
        )
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"numbers: expected a finite number after '=', found {entry!r}.")
    return name, number, value
