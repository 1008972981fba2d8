"""Streams of tokens cut into blocks: random access to the micro-batches of every step.

Letters: N tokens of a stream, R rows, T tokens of a block and one more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from postgrad.core.batches import CPU, items_of, num_steps
from postgrad.core.config import TrainConfig
from postgrad.core.runtime import Job
from postgrad.errors import DataError


@dataclass(frozen=True)
class Stream:
    """The tokens of a split, end to end; on disk until they are read."""

    tokens: Integer[np.ndarray, " N"]
    num_documents: int
    num_bytes: int
    """Of the text, in UTF-8."""

    def num_blocks(self, length: int) -> int:
        """Count the blocks of so many targets; the last token of one is the first of the next."""
        return max(0, len(self.tokens) - 1) // length

    def blocks(self, index: Sequence[int], length: int) -> Int[Tensor, "R T"]:
        """Read blocks: `length` + 1 tokens each, all but the last an input, all but the first a target."""
        rows = [self.tokens[i * length : (i + 1) * length + 1] for i in index]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


@dataclass(frozen=True)
class BlockBatches:
    """Random access to the micro-batches of every optimizer step: blocks [R, T + 1] in the order of the seed."""

    stream: Stream
    length: int
    steps: int
    batch_size: int
    micro_rows: int
    seed: int
    rank: int
    world: int
    device: torch.device = CPU

    def __len__(self) -> int:
        """Optimizer steps in all."""
        return self.steps

    def items(self, step: int) -> list[int]:
        """List the blocks of a step over all ranks: its slice of one endless stream of shuffled epochs."""
        return items_of(step, self.batch_size, self.stream.num_blocks(self.length), self.seed)

    def __getitem__(self, step: int) -> list[Int[Tensor, "R T"]]:
        """Read this rank's share of a step."""
        mine = self.items(step)[self.rank :: self.world]
        return [self.stream.blocks(part, self.length).to(self.device) for part in cut(mine, self.micro_rows)]


def cut(index: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut a list into parts of a size; the last may be smaller."""
    return [index[at : at + size] for at in range(0, len(index), size)]


def block_batches(stream: Stream, length: int, config: TrainConfig, job: Job) -> BlockBatches:
    """Batch blocks for training: a permutation an epoch keyed by the seed, dealt to ranks, cut by micro_tokens.

    Raises:  DataError: the text is shorter than one block.
    """
    num = require_blocks(stream, length)
    return BlockBatches(
        stream=stream,
        length=length,
        steps=num_steps(num, config),
        batch_size=config.batch_size,
        micro_rows=max(1, config.micro_tokens // length),
        seed=job.seed,
        rank=job.rank,
        world=job.world,
        device=job.device,
    )


def require_blocks(stream: Stream, length: int) -> int:
    """Count the blocks of a stream that has to have one.

    Raises:  DataError: it has none.
    """
    num = stream.num_blocks(length)
    if num == 0:
        raise DataError(
            f"expected at least {length + 1} tokens to train on, one block, found {len(stream.tokens)}. Give more "
            "text, or lower data.max_length."
        )
    return num


def spread_blocks(stream: Stream, length: int, most: int) -> list[int]:
    """Choose at most so many blocks (0 = all), evenly spaced."""
    num = stream.num_blocks(length)
    return list(range(num)) if not most or num <= most else [i * num // most for i in range(most)]
