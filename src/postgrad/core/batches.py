"""From trees to the micro-batches of every optimizer step: order, ranks, widths of rows.

Letters: S sequences.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from postgrad.core.config import DataConfig, TrainConfig
from postgrad.core.precision import check_precision
from postgrad.core.rows import CPU_MULTIPLE, GPU_MULTIPLE, Layout, Rows, Tree, pack
from postgrad.core.runtime import Job, stage_seed
from postgrad.errors import ConfigError

CPU = torch.device("cpu")
CALL_COST = 512
"""What one attention call costs beside its work, in query-key pairs (measured on a CPU, 8 heads)."""


def micro_batches(
    trees: Sequence[Tree],
    index: Sequence[int],
    *,
    row_length: int,
    micro_tokens: int,
    layout: Layout,
    pad_id: int,
    device: torch.device = CPU,
) -> list[Rows]:
    """Split trees into micro-batches of about ``micro_tokens`` packed tokens, longest trees first.

    ``row_length`` is the least width of a row; 0 takes what attention on the device is cheapest with. On a CPU: rows
    as narrow as the longest tree, or all trees in one row that is attended tree by tree. On a GPU, whose block masks
    skip what no token sees: all trees in one row.
    """
    order = sorted(index, key=lambda i: (-_width(trees[i], layout), i))
    on_gpu = device.type == "cuda"
    multiple = GPU_MULTIPLE if on_gpu else CPU_MULTIPLE
    batches: list[Rows] = []
    at = 0
    while at < len(order):
        width = max(row_length, _width(trees[order[at]], layout))
        end, tokens = at, 0
        while end < len(order) and (end == at or tokens + _load(trees[order[end]], layout, width) <= micro_tokens):
            tokens += _load(trees[order[end]], layout, width)
            end += 1
        members = sorted(order[at:end])
        if not row_length and layout == "tree":
            width = tokens if on_gpu else _cheaper_width([trees[i] for i in members], width)
        batches.append(pack(trees, members, row_length=width, layout=layout, pad_id=pad_id, multiple=multiple))
        at = end
    return batches


def _cheaper_width(trees: Sequence[Tree], narrow: int) -> int:
    """Weigh many narrow rows under a dense mask against one long row attended tree by tree (core/segments.py)."""
    total = sum(tree.num_tokens for tree in trees)
    dense = -(-total // narrow) * narrow**2
    exact = sum(len(t.prompt) ** 2 + sum(len(a) * (len(t.prompt) + len(a)) for a in t.answers) for t in trees)
    calls = sum(1 + len(tree.answers) for tree in trees)
    return total if exact + CALL_COST * calls < dense else narrow


def _width(tree: Tree, layout: Layout) -> int:
    """Give the tokens a row needs to hold the tree."""
    if layout == "tree" or not tree.answers:
        return tree.num_tokens
    return len(tree.prompt) + max(map(len, tree.answers))


def _load(tree: Tree, layout: Layout, width: int) -> int:
    """Give the tokens a tree takes of a micro-batch: a whole row a sequence in the flat layout."""
    return tree.num_tokens if layout == "tree" else tree.num_sequences * width


@dataclass(frozen=True)
class TreeBatches:
    """Random access to the micro-batches of every optimizer step; nothing to save or to replay on resume."""

    trees: Sequence[Tree]
    steps: int
    batch_size: int
    micro_tokens: int
    row_length: int
    layout: Layout
    pad_id: int
    seed: int
    rank: int
    world: int
    device: torch.device = CPU

    def __len__(self) -> int:
        """Optimizer steps in all."""
        return self.steps

    def items(self, step: int) -> list[int]:
        """List the trees of a step over all ranks: the step's slice of one endless stream of shuffled epochs."""
        return items_of(step, self.batch_size, len(self.trees), self.seed)

    def __getitem__(self, step: int) -> list[Rows]:
        """Pack this rank's share of a step; trees are dealt by length so that ranks work alike."""
        dealt = sorted(self.items(step), key=lambda i: (-self.trees[i].num_tokens, i))
        mine = dealt[self.rank :: self.world]
        if not mine:
            return []
        batches = micro_batches(
            self.trees,
            mine,
            row_length=self.row_length,
            micro_tokens=self.micro_tokens,
            layout=self.layout,
            pad_id=self.pad_id,
            device=self.device,
        )
        return [rows.to(self.device) for rows in batches]


def items_of(step: int, batch_size: int, num: int, seed: int) -> list[int]:
    """List the items of a step over all ranks: its slice of one endless stream of shuffled epochs."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(epoch_order(num, seed, place // num)[place % num]) for place in places]


@lru_cache(maxsize=4)
def epoch_order(num: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle an epoch: a permutation that the seed and the epoch alone decide."""
    return np.random.Generator(np.random.Philox(stage_seed(seed, "order", epoch))).permutation(num)


def check_train(train: TrainConfig) -> None:
    """Refuse numbers no training can use."""
    for name, value in (("batch_size", train.batch_size), ("micro_tokens", train.micro_tokens)):
        if value < 1:
            raise ConfigError(f"train.{name} must be >= 1, got {value}.")
    check_precision(train.precision)
    if train.max_steps == 0 and not train.epochs > 0:
        raise ConfigError(f"train.epochs must be > 0 unless train.max_steps is set, got {train.epochs}.")


def num_steps(num_items: int, config: TrainConfig) -> int:
    """Count the optimizer steps of a run."""
    return config.max_steps or max(1, round(config.epochs * num_items / config.batch_size))


def tree_batches(
    trees: Sequence[Tree], config: TrainConfig, job: Job, *, data: DataConfig, layout: Layout, pad_id: int
) -> TreeBatches:
    """Batch trees for training: a permutation an epoch keyed by the seed, split over ranks and micro-batches."""
    return TreeBatches(
        trees=trees,
        steps=num_steps(len(trees), config),
        batch_size=config.batch_size,
        micro_tokens=config.micro_tokens,
        row_length=data.row_length,
        layout=layout,
        pad_id=pad_id,
        seed=job.seed,
        rank=job.rank,
        world=job.world,
        device=job.device,
    )


def eval_batches(
    trees: Sequence[Tree],
    *,
    row_length: int,
    micro_tokens: int,
    layout: Layout,
    pad_id: int,
    device: torch.device = CPU,
) -> list[Rows]:
    """Batch trees once each, for scoring and evaluation; ``Rows.index`` says which."""
    return micro_batches(
        trees,
        range(len(trees)),
        row_length=row_length,
        micro_tokens=micro_tokens,
        layout=layout,
        pad_id=pad_id,
        device=device,
    )


def sequence_values(
    trees: Sequence[Tree], batches: Iterable[Rows], function: Callable[[Rows], Tensor]
) -> list[list[float]]:
    """Compute one value a sequence and hand them back tree by tree, in the order of ``trees``.

    Args: function: rows -> [S], for instance ``partial(sequence_logprobs, model)``.
    """
    values: list[list[float]] = [[] for _ in trees]
    for rows in batches:
        flat = function(rows).float().tolist()
        at = 0
        for i in rows.index:
            values[i] = flat[at : at + trees[i].num_sequences]
            at += trees[i].num_sequences
    return values
