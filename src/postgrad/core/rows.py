"""Packed, prefix-shared rows: the one data layout of every language-model stage.

A tree is a prompt and its answers. A row holds several trees side by side; the prompt of a tree stands once, its
answers follow, each with positions that restart after the prompt. Attention is causal within a tree and never
crosses from one answer into another, so every log-probability equals the one computed alone.

Letters: R rows, T tokens of a row, N target tokens, S sequences, G trees.

Source: the layout follows "Accelerating DPO through prefix sharing" (arXiv 2410.20305).
Differs: any number of answers a prompt, whole conversations as trees without answers, and a flat layout (one
sequence a row) for models that cannot take a custom mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from postgrad.core.segments import Segment

Layout = Literal["tree", "flat"]
PADDING = -1
CPU_MULTIPLE, GPU_MULTIPLE = 8, 128
"""Rows are padded to a multiple of this many tokens."""


@dataclass(frozen=True)
class Tree:
    """A prompt and its answers, as token ids.

    Without answers the prompt is the only sequence and ``supervised`` marks its target tokens (a first token
    cannot be a target: nothing predicts it). With answers every answer is a sequence and all its tokens are targets.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...] = ()
    supervised: tuple[bool, ...] = ()
    weight: float = 1.0
    """How much the tree counts in a weighted loss; packing takes no notice."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the tree, its prompt counted once."""
        return len(self.prompt) + sum(map(len, self.answers))

    @property
    def num_sequences(self) -> int:
        """Sequences the tree stands for."""
        return max(1, len(self.answers))


@dataclass(frozen=True)
class Rows:
    """One micro-batch: packed rows and where its targets are.

    ``source[n]`` is the flat position whose hidden state predicts ``target[n]``, a token of sequence
    ``sequence[n]``. Sequences follow the order of ``index``: those of its first tree, then of its second.
    """

    tokens: Int[Tensor, "R T"]
    positions: Int[Tensor, "R T"]
    group: Int[Tensor, "R T"]
    """Number of the tree within its row, -1 for padding."""
    branch: Int[Tensor, "R T"]
    """0 for the prompt, k for its k-th answer."""
    source: Int[Tensor, " N"]
    target: Int[Tensor, " N"]
    sequence: Int[Tensor, " N"]
    ends: Int[Tensor, " S"]
    """Flat position of the last token of each sequence."""
    index: tuple[int, ...]
    """Which tree of the list given each group of sequences belongs to."""
    layout: Layout
    num_tokens: int
    """Real tokens, padding not counted."""
    segments: tuple[Segment, ...] | None = None
    """Lengths of the trees, when all stand in one row: attention can then run without a mask."""

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return int(self.ends.shape[0])

    @property
    def lengths(self) -> Int[Tensor, " S"]:
        """Target tokens of each sequence."""
        return torch.bincount(self.sequence, minlength=self.num_sequences)

    def to(self, device: torch.device) -> "Rows":
        """Move every tensor to a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


def tree_mask(group: Int[Tensor, "R T"], branch: Int[Tensor, "R T"]) -> Bool[Tensor, "R 1 T T"]:
    """Say which token (second last axis) may look at which (last axis).

    Causal, within one tree, and into the prompt or the own answer only. A padding token sees padding, so no row of
    the mask is empty.
    """
    causal = torch.ones(group.shape[1], group.shape[1], dtype=torch.bool, device=group.device).tril()  # [T, T]
    same_tree = group[:, :, None] == group[:, None, :]  # [R, T, T]
    open_branch = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])  # [R, T, T]
    return (causal & same_tree & open_branch)[:, None]  # [R, 1, T, T]


def flatten(tree: Tree) -> list[Tree]:
    """Split a tree into one tree a sequence, for the flat layout."""
    if not tree.answers:
        return [tree]
    return [Tree(prompt=tree.prompt, answers=(answer,)) for answer in tree.answers]


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Pack items into bins of a width, longest first, each into the first bin with room.

    Returns: bins of positions into ``lengths``. An item wider than the width gets a bin of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    room: list[int] = []
    first_open = 0  # bins before it are too full for any later, shorter item of the same length
    for i in order:
        slot = next((b for b in range(first_open, len(bins)) if room[b] >= lengths[i]), None)
        if slot is None:
            bins.append([i])
            room.append(width - lengths[i])
        else:
            bins[slot].append(i)
            room[slot] -= lengths[i]
        while first_open < len(bins) and room[first_open] <= 0:
            first_open += 1
    return bins


def pack(
    trees: Sequence[Tree],
    index: Sequence[int],
    *,
    row_length: int,
    layout: Layout,
    pad_id: int,
    multiple: int = CPU_MULTIPLE,
) -> Rows:
    """Pack the trees at ``index`` into one micro-batch.

    Args:
        row_length: width of a row in tokens; at least that of the longest tree is taken.
        multiple: rows are padded to a multiple of it.
    """
    assert index, "a micro-batch needs at least one tree"
    units: list[Tree] = []
    for i in index:
        units += [trees[i]] if layout == "tree" else flatten(trees[i])
    lengths = [unit.num_tokens for unit in units]
    bins = [[i] for i in range(len(units))] if layout == "flat" else first_fit(lengths, max(row_length, max(lengths)))
    used = max(sum(lengths[i] for i in members) for members in bins)
    width = -(-used // multiple) * multiple
    grid = np.zeros((4, len(bins), width), dtype=np.int64)  # tokens, positions, group, branch
    grid[0] = pad_id
    grid[2] = PADDING
    start = np.zeros(len(units), dtype=np.int64)  # flat position of each unit's first token
    for row, members in enumerate(bins):
        column = 0
        for group, i in enumerate(members):
            _lay(grid[:, row, column : column + lengths[i]], units[i], group)
            start[i] = row * width + column
            column += lengths[i]
    source, target, sequence, ends = _targets(units, start)
    tokens, positions, group_of, branch_of = (torch.from_numpy(part) for part in grid)
    one_row = [(len(units[i].prompt), tuple(map(len, units[i].answers))) for i in bins[0]]
    segments = tuple(one_row) if layout == "tree" and len(bins) == 1 else None
    return Rows(
        tokens=tokens,
        positions=positions,
        group=group_of,
        branch=branch_of,
        source=source,
        target=target,
        sequence=sequence,
        ends=ends,
        index=tuple(index),
        layout=layout,
        num_tokens=sum(lengths),
        segments=segments,
    )


def _lay(place: np.ndarray, tree: Tree, group: int) -> None:
    """Write one tree into its place in the grid (tokens, positions, group, branch)."""
    num_prompt = len(tree.prompt)
    place[0, :num_prompt] = tree.prompt
    place[1, :num_prompt] = np.arange(num_prompt)
    place[2] = group
    at = num_prompt
    for branch, answer in enumerate(tree.answers, start=1):
        end = at + len(answer)
        place[0, at:end] = answer
        place[1, at:end] = np.arange(num_prompt, num_prompt + len(answer))
        place[3, at:end] = branch
        at = end


def _targets(units: Sequence[Tree], start: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """List where each target token is predicted, what it is and whose it is."""
    source: list[np.ndarray] = []
    target: list[np.ndarray] = []
    counts: list[int] = []
    ends: list[int] = []
    for unit, first in zip(units, start.tolist(), strict=True):
        last_of_prompt = first + len(unit.prompt) - 1
        if not unit.answers:
            chosen = np.flatnonzero(unit.supervised)
            chosen = chosen[chosen > 0]
            source.append(first + chosen - 1)
            target.append(np.asarray(unit.prompt, dtype=np.int64)[chosen])
            counts.append(len(chosen))
            ends.append(last_of_prompt)
        at = last_of_prompt + 1
        for answer in unit.answers:
            positions = np.arange(at - 1, at - 1 + len(answer))
            positions[:1] = last_of_prompt  # the first token of every answer is predicted by the prompt's last
            source.append(positions)
            target.append(np.asarray(answer, dtype=np.int64))
            counts.append(len(answer))
            at += len(answer)
            ends.append(at - 1)
    sequence = np.repeat(np.arange(len(counts)), counts)
    flat = [np.concatenate(part).astype(np.int64) for part in (source, target)]
    return (*map(torch.from_numpy, (*flat, sequence)), torch.tensor(ends))  # type: ignore[return-value]
