"""Rows to forget and rows to keep, batched side by side, in two phases."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from postgrad.core.batches import TreeBatches, micro_batches, num_steps
from postgrad.core.config import TrainConfig
from postgrad.core.rows import Layout, Rows, Tree
from postgrad.core.runtime import Job, stage_seed
from postgrad.forgetting.text_losses import Share


class Packing(NamedTuple):
    """How rows are laid out for a model."""

    layout: Layout
    pad_id: int
    row_length: int
    micro_tokens: int


class Part(NamedTuple):
    """A micro-batch of both kinds of rows, and what it is to be divided by."""

    rows: Rows
    share: Share


@dataclass(frozen=True)
class BothBatches:
    """Steps that see retained rows and rows to forget, packed together; satisfies `core.loop.Batches`."""

    retain: TreeBatches
    forget: TreeBatches

    @property
    def trees(self) -> list[Tree]:
        """All rows, those to keep first."""
        return [*self.retain.trees, *self.forget.trees]

    def __len__(self) -> int:
        """Optimizer steps in all."""
        return len(self.forget)

    def __getitem__(self, step: int) -> list[Part]:
        """Pack this rank's share of a step."""
        own, trees = self.retain, self.trees
        kept = own.items(step)
        index = [*kept, *(len(own.trees) + i for i in self.forget.items(step))]
        tokens = sum(sum(trees[i].supervised[1:]) for i in kept)
        dealt = sorted(index, key=lambda i: (-trees[i].num_tokens, i))[own.rank :: own.world]
        batches = micro_batches(
            trees, dealt, row_length=own.row_length, micro_tokens=own.micro_tokens, layout=own.layout,
            pad_id=own.pad_id, device=own.device,
        )  # fmt: skip
        share = Share(tokens, len(index) - len(kept), 0.0)
        return [Part(rows.to(own.device), share._replace(part=len(rows.index) / len(index))) for rows in batches]


class Phase(NamedTuple):
    """A part of the training."""

    name: str
    steps: int
    sparse: bool
    """Whether group norms count."""


def phases(train: TrainConfig, num: int, until: float) -> list[Phase]:
    """Split the steps into those in which group norms count and the rest; a phase without steps is left out.

    Args: num: rows to forget. until: share of the steps in which the norms count.
    """
    steps = num_steps(num, forget_steps(train, num))
    first = min(steps, math.ceil(until * steps))
    both = Phase("sparse", first, True), Phase("rest", steps - first, False)
    return [phase for phase in both if phase.steps]


def forget_steps(train: TrainConfig, num: int) -> TrainConfig:
    """Lower the batch size to the number of rows to forget."""
    return replace(train, batch_size=min(train.batch_size, num))


def both_batches(
    trees: tuple[Sequence[Tree], Sequence[Tree]], kept: int, train: TrainConfig, packing: Packing, job: Job,
    phase: Phase,
) -> BothBatches:  # fmt: skip
    """Batch rows to forget, each with `kept` retained ones; an epoch is a pass over the rows to forget.

    Args: trees: to keep, and to forget.
    """
    retain, forget = trees
    size, steps = forget_steps(train, len(forget)).batch_size, phase.steps

    def stream(part: Sequence[Tree], num: int, name: str) -> TreeBatches:
        return TreeBatches(
            trees=part, steps=steps, batch_size=num, micro_tokens=train.micro_tokens, row_length=packing.row_length,
            layout=packing.layout, pad_id=packing.pad_id, seed=stage_seed(job.seed, name, phase.name), rank=job.rank,
            world=job.world, device=job.device,
        )  # fmt: skip

    return BothBatches(stream(retain, size * kept, "retain"), stream(forget, size, "forget"))
