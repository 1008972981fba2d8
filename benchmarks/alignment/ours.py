"""postgrad's side: the methods' own steps, batches, reference store and training loop."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.alignment.data import PAD, real_tokens
from benchmarks.alignment.setting import LR, Measured, Meter, Setting, make_model
from postgrad.alignment import dpo, reward, sft
from postgrad.alignment.comparisons import Comparisons
from postgrad.core import segments
from postgrad.core.batches import TreeBatches, eval_batches, tree_batches
from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from postgrad.core.loop import train
from postgrad.core.precision import autocast
from postgrad.core.rows import Tree
from postgrad.core.runtime import Job, start


def shared_groups(setting: Setting, folder: Path) -> dict[str, Any]:
    """Give the settings every method has; all else stays at its default."""
    optim = OptimConfig(lr=LR, schedule="constant", warmup=0.0)
    every = {"log_every": 1, "eval_every": 0, "save_every": 0}
    train_config = TrainConfig(batch_size=setting.batch, micro_tokens=setting.micro_tokens, optim=optim, **every)
    precision = "bf16" if setting.device == "cuda" else "fp32"
    runtime = RuntimeConfig(
        folder=str(folder), seed=setting.seed, device=setting.device, precision=precision, quiet=True
    )
    return {
        "model": ModelConfig(path="drawn"),
        "data": DataConfig(row_length=0),
        "train": train_config,
        "runtime": runtime,
    }


def order(setting: Setting, trees: list[Tree]) -> list[int]:
    """List the rows as postgrad takes them, step by step; the peers are given this order."""
    batches = TreeBatches(
        trees=trees, steps=len(trees) // setting.batch, batch_size=setting.batch, micro_tokens=setting.micro_tokens,
        row_length=0, layout="tree", pad_id=PAD, seed=setting.seed, rank=0, world=1,
    )  # fmt: skip
    return [i for step in range(len(batches)) for i in batches.items(step)]


def run(setting: Setting, trees: list[Tree], folder: Path) -> Measured:
    """Train on every row once."""
    groups = shared_groups(setting, folder)
    method: Any = {"dpo": dpo, "reward": reward, "sft": sft}[setting.task]
    config = {
        "dpo": lambda: dpo.DPOConfig(**groups),
        "reward": lambda: reward.RewardConfig(center=0.0, **groups),
        "sft": lambda: sft.SFTConfig(**groups),
    }[setting.task]()
    job = start(config, method.check, setting.task)
    meter = Meter(setting, real_tokens(trees))
    model = make_model(setting, segments.NAME)
    batch = partial(
        eval_batches, row_length=0, micro_tokens=setting.micro_tokens, layout="tree", pad_id=PAD, device=job.device
    )
    loss_fn = _loss_fn(setting, config, model, trees, batch, job, meter)
    batches = tree_batches(trees, config.train, job, data=config.data, layout="tree", pad_id=PAD)
    _warm_up(model, batches, loss_fn, job)

    def end(step: int) -> Mapping[str, float]:
        meter.stop()
        return {}

    meter.start()
    train(model, _OneEpoch(batches, len(trees) // setting.batch), loss_fn, end, config.train, job)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    meter.found.losses = [row["loss"] for row in rows if "loss" in row]
    return meter.found


class _OneEpoch:
    """The first steps of a stream of batches."""

    def __init__(self, batches: TreeBatches, steps: int) -> None:
        self._batches, self._steps = batches, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> list[Any]:
        return self._batches[step]


def _loss_fn(
    setting: Setting, config: Any, model: Any, trees: list[Tree], batch: Callable[..., Any], job: Job, meter: Meter
) -> Callable[..., Any]:
    if setting.task == "sft":
        return partial(sft.sft_step, model, trees, False)
    if setting.task == "reward":
        gold = torch.tensor([[1.0, 0.0]] * len(trees))
        zeros = torch.zeros(len(trees))
        data = Comparisons(trees, gold, zeros, zeros.long(), torch.zeros(len(trees), 2), {})
        return partial(reward.reward_step, config, model, data)
    data = dpo.PairData(trees, [str(i) for i in range(len(trees))], torch.ones(len(trees)))
    with torch.no_grad(), autocast(job):
        for num in (setting.batch, setting.batch // 2):  # two widths: FlexAttention then compiles for every width
            dpo.answer_logprobs(model, 1.0, batch(trees[:num])[0].to(job.device))
    meter.start()
    data = dpo.with_reference(config, model, data, batch, job)
    meter.stop(reference=True)
    return partial(dpo.dpo_step, config, model, data)


def _warm_up(model: Any, batches: TreeBatches, loss_fn: Callable[..., Any], job: Job) -> None:
    """Run micro-batches of two widths forward and back, and forget them."""
    model.train()
    for rows in (batches[0][0], batches[0][-1], batches[1][0]):
        with autocast(job):
            loss = loss_fn(rows.to(job.device), 0)
        loss.sum.backward()
        model.zero_grad()
