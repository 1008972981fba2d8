"""Rows to forget, to keep and never seen: read, tokenised, batched side by side, and measured.

Letters: S sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from postgrad.core.batches import TreeBatches, eval_batches, micro_batches, num_steps
from postgrad.core.config import DataConfig, TrainConfig
from postgrad.core.data import hold_out, load_examples
from postgrad.core.distributed import first_rank, gather_objects
from postgrad.core.items import Example
from postgrad.core.models import head_of, hidden_states
from postgrad.core.ops import sum_by_sequence, token_logprobs
from postgrad.core.precision import autocast
from postgrad.core.rows import Layout, Rows, Tree
from postgrad.core.runtime import Job, stage_seed
from postgrad.core.text import conversation_trees
from postgrad.forgetting.facts import FactSizes, write_facts
from postgrad.forgetting.text_losses import Share, greedy_hits


@dataclass(frozen=True)
class Sources:
    """Where rows come from."""

    forget: str
    """File of rows to forget; "" = a share of data.path."""
    retain: str
    """File of rows to keep; "" = the rest of data.path."""
    held_out: str
    """File of rows never seen; "" = a share of the rows to keep, if `aside`."""
    share: float
    """How much of data.path is forgotten."""
    aside: bool
    """Whether rows that are set aside are never seen."""


class Texts(NamedTuple):
    """Something of each kind: rows, trees, measurements."""

    forget: list[Example]
    retain: list[Example]
    held_out: list[Example]
    """May be empty."""
    counts: dict[str, int]


@dataclass(frozen=True)
class Trees:
    """Tokenised rows, and what became of those read."""

    forget: list[Tree]
    retain: list[Tree]
    held_out: list[Tree]
    counts: dict[str, int]

    def parts(self) -> dict[str, list[Tree]]:
        """Name the parts that are not empty."""
        found = {"forget": self.forget, "retain": self.retain, "held_out": self.held_out}
        return {name: trees for name, trees in found.items() if trees}


def with_facts(sources: Sources, data: DataConfig, folder: Path, seed: int) -> Sources:
    """Return the sources: the user's, or files of invented facts written below the run folder."""
    if sources.forget or data.path:
        return sources
    paths = first_rank(lambda: write_facts(folder / "facts", seed, FactSizes()))
    forget, retain, held_out = (str(paths[name]) for name in ("forget", "retain", "held_out"))
    return replace(sources, forget=forget, retain=retain, held_out=held_out)


def read_texts(sources: Sources, data: DataConfig, seed: int) -> Texts:
    """Read the rows of all three kinds.

    The rows set aside are those that `postgrad sft` sets aside with the same seed and share.
    """
    counts: dict[str, int] = {}

    def load(path: str, name: str) -> list[Example]:
        loaded = load_examples(replace(data, path=path))
        counts.update({f"{name} {reason}": num for reason, num in loaded.counts.items()})
        return loaded.items

    retain = load(sources.retain or data.path, "retain" if sources.retain else "all")
    held: list[Example] = []
    if sources.held_out:
        held = load(sources.held_out, "held-out")
    elif sources.aside:
        retain, held = hold_out(retain, data.held_out, seed)
    if sources.forget:
        forget = load(sources.forget, "forget")
    else:
        retain, forget = hold_out(retain, sources.share, stage_seed(seed, "forget"))
    return Texts(forget, retain, held, counts)


def tokenised(texts: Texts, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Trees:
    """Turn rows into trees, and count what does not fit."""
    counts = dict(texts.counts)
    trees: list[list[Tree]] = []
    for name, examples in zip(("forgotten", "retained", "held out"), texts[:3], strict=True):
        found, own = conversation_trees(tokenizer, examples, data)
        trees.append(found)
        counts |= {f"{name}, {reason}": num for reason, num in own.items()}
    return Trees(trees[0], trees[1], trees[2], counts)


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


def forget_steps(train: TrainConfig, num: int) -> TrainConfig:
    """Lower the batch size to the number of rows to forget."""
    return replace(train, batch_size=min(train.batch_size, num))


def both_batches(trees: Trees, kept: int, train: TrainConfig, packing: "Packing", job: Job) -> BothBatches:
    """Batch rows to forget, each with `kept` retained ones; an epoch is a pass over the rows to forget."""
    train = forget_steps(train, len(trees.forget))
    size, steps = train.batch_size, num_steps(len(trees.forget), train)

    def stream(part: Sequence[Tree], num: int, name: str) -> TreeBatches:
        return TreeBatches(
            trees=part, steps=steps, batch_size=num, micro_tokens=train.micro_tokens, row_length=packing.row_length,
            layout=packing.layout, pad_id=packing.pad_id, seed=stage_seed(job.seed, name), rank=job.rank,
            world=job.world, device=job.device,
        )  # fmt: skip

    return BothBatches(stream(trees.retain, size * kept, "retain"), stream(trees.forget, size, "forget"))


class Packing(NamedTuple):
    """How rows are laid out for a model."""

    layout: Layout
    pad_id: int
    row_length: int
    micro_tokens: int


@dataclass(frozen=True)
class Measured:
    """What a model makes of rows: figures of all target tokens, row after row."""

    losses: Float[Tensor, " N"]
    """In nats."""
    right: Float[Tensor, " N"]
    """1 where the target is the likeliest token, after the right ones before it; else 0."""
    tokens: Int[Tensor, " S"]
    """Target tokens of each row."""

    @property
    def row(self) -> Int[Tensor, " N"]:
        """Say whose token each is."""
        return torch.repeat_interleave(self.tokens)

    @property
    def nll(self) -> Float[Tensor, " S"]:
        """Nats of each row."""
        return sum_by_sequence(self.losses, self.row, len(self.tokens))

    @property
    def means(self) -> Float[Tensor, " S"]:
        """Nats a token of each row."""
        return self.nll / self.tokens

    @property
    def loss(self) -> float:
        """Nats a token over all rows."""
        return float(self.losses.mean())

    @property
    def known(self) -> Float[Tensor, " S"]:
        """Share of each row's tokens that are the likeliest ones."""
        return sum_by_sequence(self.right, self.row, len(self.tokens)) / self.tokens

    @property
    def greedy(self) -> float:
        """Per cent of all target tokens that are the likeliest ones."""
        return 100 * float(self.right.mean())

    @property
    def recited(self) -> float:
        """Per cent of rows whose answers come out whole and exact when decoded greedily."""
        return 100 * float((self.known == 1).double().mean())


@torch.no_grad()
def measure(model: nn.Module, trees: Sequence[Tree], packing: Packing, job: Job) -> Measured:
    """Measure rows, each rank a share of them; all ranks get all. The model is in evaluation mode."""
    batches = eval_batches(
        trees, row_length=packing.row_length, micro_tokens=packing.micro_tokens, layout=packing.layout,
        pad_id=packing.pad_id, device=job.device,
    )  # fmt: skip
    own: dict[int, tuple[Tensor, Tensor]] = {}
    with autocast(job):
        for rows in batches[job.rank :: job.world]:
            own.update(zip(rows.index, _measure_rows(model, rows.to(job.device)), strict=True))
    found = {place: row for part in gather_objects(own) for place, row in part.items()}
    losses, right = zip(*(found[place] for place in range(len(trees))), strict=True)
    return Measured(torch.cat(losses), torch.cat(right), torch.tensor([len(each) for each in losses]))


def _measure_rows(model: nn.Module, rows: Rows) -> list[tuple[Tensor, Tensor]]:
    """Give losses and hits of each row's tokens."""
    hidden, head = hidden_states(model, rows)[rows.source], head_of(model)
    values = -token_logprobs(hidden, head, rows.target), greedy_hits(hidden, head, rows.target)
    lengths = rows.lengths.tolist()
    losses, right = (torch.split(each.double().cpu(), lengths) for each in values)
    return list(zip(losses, right, strict=True))
