"""What every rank of a group does in test_distributed; what it finds is written as JSON, a file a rank."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from toy_training import CONFIG, Toy, ToyBatches, toy_evaluate, toy_job, toy_loss

from postgrad.core import distributed, runtime
from postgrad.core.config import RuntimeConfig
from postgrad.core.loop import Loss, train
from postgrad.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """The least config."""

    runtime: RuntimeConfig = RuntimeConfig()
    """Where."""


def check_ranks(folder: Path) -> None:
    """Run every check in turn; each leaves what it found under its own name."""
    config = RankConfig(runtime=RuntimeConfig(folder=str(folder / "run"), quiet=True))
    job = runtime.start(config, lambda config: None, "toy")
    found: dict[str, Any] = {"rank": job.rank, "world": job.world}
    for check in (collectives, gradients, no_gradient, training, idle_rank, stop, error_on_one, error_of_first):
        found[check.__name__] = check(folder / check.__name__, job.rank)
    (folder / f"rank{job.rank}.json").write_text(json.dumps(found))
    distributed.barrier()


def collectives(folder: Path, rank: int) -> list[Any]:
    summed = distributed.sum_over_ranks(torch.tensor([1.0, rank])).tolist()
    gathered = distributed.gather_objects({"rank": rank})
    return [summed, distributed.broadcast_object(rank + 5), gathered, distributed.first_rank(lambda: rank)]


def gradients(folder: Path, rank: int) -> list[list[float]]:
    """Buckets of one parameter each, of mixed dtypes."""
    params = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    for i, param in enumerate(params):
        param.grad = torch.full_like(param, i + 10.0 * rank)
    before, distributed.BUCKET_BYTES = distributed.BUCKET_BYTES, 8
    distributed.all_reduce_gradients(params)
    distributed.BUCKET_BYTES = before
    return [param.grad.tolist() for param in params if param.grad is not None]


def no_gradient(folder: Path, rank: int) -> list[Any]:
    """One on both ranks, one on a single rank, one on none."""
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    params[0].grad = torch.ones(2)
    if rank == 1:
        params[1].grad = torch.tensor([3.0, 4.0])
    distributed.all_reduce_gradients(params)
    return [None if param.grad is None else param.grad.tolist() for param in params]


def training(folder: Path, rank: int) -> list[float]:
    """The same run as on one rank, but begun with other weights on the second."""
    model = Toy()
    model.drop.p = 0.0
    if rank == 1:
        nn.init.zeros_(model.first.weight)
    batches = ToyBatches(micro=2, rank=rank, world=2)
    report = train(model, batches, toy_loss(model), toy_evaluate(model), CONFIG, toy_job(folder, rank, 2))
    return [*model.first.weight.flatten().tolist(), float(report.results["error"])]


@dataclass(frozen=True)
class FirstOnly(ToyBatches):
    """All micro-batches on rank 0, none on the others."""

    def __getitem__(self, step: int, /) -> Sequence[Tensor]:
        return super().__getitem__(step) if self.rank == 0 else []


def idle_rank(folder: Path, rank: int) -> list[float]:
    model = Toy()
    model.drop.p = 0.0
    job = toy_job(folder, rank, 2)
    train(model, FirstOnly(rank=rank), toy_loss(model), None, replace(CONFIG, eval_every=0), job)
    return model.first.weight.flatten().tolist()


def stop(folder: Path, rank: int) -> str:
    """A signal to one rank stops both, after the same step."""
    model = Toy()

    def loss_fn(batch: Tensor, step: int) -> Loss:
        if step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy_loss(model)(batch, step)

    return raised(model, loss_fn, folder, rank)


def error_on_one(folder: Path, rank: int) -> str:
    """An error of one rank ends both."""
    model = Toy()

    def loss_fn(batch: Tensor, step: int) -> Loss:
        if step == 2 and rank == 1:
            raise DataError("row 17 is broken")
        return toy_loss(model)(batch, step)

    return raised(model, loss_fn, folder, rank)


def error_of_first(folder: Path, rank: int) -> list[str]:
    """What only rank 0 looks at fails everywhere: here, a folder that holds another run."""
    found = []
    for seed in (0, 1):
        config = RankConfig(runtime=RuntimeConfig(folder=str(folder), seed=seed))
        try:
            runtime.start(config, lambda config: None, "toy")
            (folder / "metrics.jsonl").touch()
        except ConfigError as error:
            found.append(str(error))
    return found


def raised(model: nn.Module, loss_fn: Any, folder: Path, rank: int) -> str:
    try:
        batches = ToyBatches(rank=rank, world=2)
        train(model, batches, loss_fn, None, CONFIG, toy_job(folder, rank, 2))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
