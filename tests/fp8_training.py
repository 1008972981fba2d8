"""A small model trained by the loop in FP8, for the tests of levels; as a script, one rank of such a run.

python fp8_training.py FOLDER LEVEL REDUCTION      writes what this rank found, as FOLDER/rank<r>.pt
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fp8_ranks import leave, start_ranks
from torch import Tensor, nn
from toy_training import toy_job

from postgrad.core import distributed
from postgrad.core.config import OptimConfig, PrecisionConfig, TrainConfig
from postgrad.core.loop import Loss, LossFunction, train
from postgrad.core.report import Report
from postgrad.core.runtime import stage_seed

STEPS, BATCH, WIDTH = 6, 8, 32


class Small(nn.Module):
    """Two layers that are wide enough, one that is not, an embedding and a norm."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(11, WIDTH)
            self.norm = nn.LayerNorm(WIDTH)
            self.up = nn.Linear(WIDTH, 2 * WIDTH)
            self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
            self.head = nn.Linear(WIDTH, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x)


@dataclass(frozen=True)
class TokenBatches:
    """Tokens drawn for each step, split over ranks."""

    rank: int = 0
    world: int = 1
    steps: int = STEPS

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int, /) -> Sequence[Tensor]:
        noise = torch.Generator().manual_seed(stage_seed(0, "tokens", step))
        tokens = torch.randint(11, (BATCH, 12), generator=noise)
        return torch.split(tokens[self.rank :: self.world], 2)


def next_token(model: nn.Module) -> LossFunction:
    """Predict the sum of this token and the last, modulo 11."""

    def loss_fn(tokens: Tensor, step: int) -> Loss:
        target = (tokens[:, 1:] + tokens[:, :-1]) % 11
        logits = model(tokens[:, 1:])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        return Loss(loss, float(target.numel()))

    return loss_fn


def settings(level: str, **precision: Any) -> TrainConfig:
    own = PrecisionConfig(level=level, min_size=16, **precision)  # type: ignore[arg-type]
    optim = OptimConfig(lr=0.01, weight_decay=0.1, beta2=0.95, clip=0.5)
    return TrainConfig(log_every=1, save_every=2, optim=optim, precision=own)


def train_small(
    folder: Path,
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    rank: int = 0,
    world: int = 1,
) -> tuple[nn.Module, Report]:
    """Train on this rank."""
    model = model or Small()
    job = toy_job(folder, rank, world)
    report = train(model, TokenBatches(rank, world), loss_fn or next_token(model), None, config, job)
    return model, report


def ranks(folder: Path, world: int, level: str, reduction: str = "a2a") -> list[dict[str, Any]]:
    """Train on many ranks, each a process."""
    folder.mkdir(exist_ok=True)
    return start_ranks(folder, world, __file__, level, reduction)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, level, reduction = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    distributed.init_ranks(torch.device("cpu"))
    rank, world = distributed.rank(), distributed.world()
    config = replace(settings(level, reduction=reduction))
    trained, _ = train_small(folder / "run", config, rank=rank, world=world)
    torch.save({name: param.detach() for name, param in trained.named_parameters()}, folder / f"rank{rank}.pt")
    leave()
