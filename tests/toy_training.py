"""A tiny training run for the tests of the loop; as a script, one process of such a run.

python toy_training.py FOLDER            trains; with TOY_KILL=n the process kills itself while it writes checkpoint n
python toy_training.py FOLDER ranks      what test_distributed looks at, on every rank
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from postgrad.core import checkpoint, distributed
from postgrad.core.config import OptimConfig, TrainConfig
from postgrad.core.loop import Evaluate, Loss, LossFunction, train
from postgrad.core.report import Report
from postgrad.core.runtime import Job, stage_seed

NUM_ITEMS, BATCH, STEPS = 10, 8, 7  # the second epoch begins within step 1
CONFIG = TrainConfig(log_every=3, eval_every=4, save_every=2, optim=OptimConfig(lr=0.01, weight_decay=0.1))


class Toy(nn.Module):
    """A regression with dropout, a layer that nothing uses, and one that is frozen."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Linear(3, width)
            self.frozen = nn.Linear(width, width)
            self.last = nn.Linear(width, 1)
            self.unused = nn.Linear(2, 2)
        self.drop = nn.Dropout(0.1)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(self.drop(self.first(x)))))[:, 0]


@dataclass(frozen=True)
class ToyBatches:
    """Items in an order keyed by the epoch, split over ranks and micro-batches."""

    micro: int = BATCH
    steps: int = STEPS
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int, /) -> Sequence[Tensor]:
        places = range(step * BATCH, (step + 1) * BATCH)
        items = [self._order(place // NUM_ITEMS)[place % NUM_ITEMS] for place in places][self.rank :: self.world]
        return [_items()[items[i : i + self.micro]] for i in range(0, len(items), self.micro)]

    def _order(self, epoch: int) -> list[int]:
        noise = torch.Generator().manual_seed(stage_seed(0, "order", epoch))
        return torch.randperm(NUM_ITEMS, generator=noise).tolist()


def _items() -> Tensor:
    return torch.randn(NUM_ITEMS, 3, generator=torch.Generator().manual_seed(1))


def toy_loss(model: nn.Module) -> LossFunction:
    """Squared error to the sum of the inputs."""

    def loss_fn(batch: Tensor, step: int) -> Loss:
        error = model(batch) - batch.sum(1)
        metrics = {"distance": (error.detach().abs().sum(), float(len(batch)))}
        return Loss(error.square().sum(), len(batch), metrics, num_tokens=3 * len(batch))

    return loss_fn


def toy_evaluate(model: nn.Module) -> Evaluate:
    """Mean squared error, and the step it was asked at."""
    return lambda step: {"error": (model(_items()) - _items().sum(1)).square().mean().item(), "at": step}


def toy_job(folder: Path, rank: int = 0, world: int = 1) -> Job:
    folder.mkdir(exist_ok=True)
    return Job("toy", folder, 0, torch.device("cpu"), torch.float32, rank, world, quiet=True)


def train_toy(
    folder: Path,
    model: nn.Module | None = None,
    batches: ToyBatches | None = None,
    loss_fn: LossFunction | None = None,
    config: TrainConfig = CONFIG,
) -> Report:
    """Train in one process."""
    model = model or Toy()
    batches = ToyBatches() if batches is None else batches
    return train(model, batches, loss_fn or toy_loss(model), toy_evaluate(model), config, toy_job(folder))


def _kill_at_checkpoint(number: int) -> None:
    """Kill this process in the middle of writing a checkpoint: files are there, the name is not."""
    written = 0
    replace = checkpoint._replace_folder

    def replace_or_die(temporary: Path, path: Path) -> None:
        nonlocal written
        written += 1
        if written == number:
            (temporary / "manifest.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        replace(temporary, path)

    checkpoint._replace_folder = replace_or_die


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_folder = Path(sys.argv[1])
    if "ranks" in sys.argv:
        from rank_checks import check_ranks

        check_ranks(run_folder)
    else:
        _kill_at_checkpoint(int(os.environ.get("TOY_KILL", "0")))
        train_toy(run_folder)
    distributed.destroy_ranks()
