"""What a language model makes of rows: losses of all target tokens, answers it is offered, answers it gives itself.

Letters: N target tokens, S rows, J answers of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from postgrad.core.batches import eval_batches
from postgrad.core.distributed import gather_objects
from postgrad.core.generate import context_length, generate
from postgrad.core.models import head_of, hidden_states, target_logprobs
from postgrad.core.ops import sum_by_sequence, token_logprobs
from postgrad.core.precision import autocast
from postgrad.core.rows import Rows, Tree
from postgrad.core.runtime import Job
from postgrad.core.text import stop_ids
from postgrad.forgetting.text_batches import Packing
from postgrad.forgetting.text_losses import greedy_hits
from postgrad.forgetting.text_metrics import (
    chosen_probability,
    even_truth,
    extraction_strength,
    probability,
    rouge_l_recall,
    told_truth,
    truth_ratio,
)
from postgrad.forgetting.text_rows import Trees

MOST_ASKED = 400
"""Rows of a part that are answered and asked about, at most: as many as TOFU takes of those to keep."""
AT_A_TIME = 64
"""Answers that are generated together."""
PerTree = Callable[[Rows], list[Any]]


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
    def num_recited(self) -> int:
        """Count the rows whose answers come out whole and exact when decoded greedily."""
        return int((self.known == 1).sum())

    @property
    def recited(self) -> float:
        """Per cent of such rows."""
        return 100 * self.num_recited / len(self.tokens)


@dataclass(frozen=True)
class Known:
    """All that is measured of a model on one part."""

    measured: Measured
    rouge: Float[Tensor, " S"]
    """ROUGE-L recall of the answers that greedy decoding gives, of at most MOST_ASKED rows."""
    offered: tuple[tuple[float, ...], ...]
    """Nats a token of the right answer and wrong ones, of the rows that have some; those that do not fit are absent."""

    @cached_property
    def ratios(self) -> Float[Tensor, " S"]:
        """Give the truth ratio of each row that has wrong answers."""
        return truth_ratio(self._right(), [row[1:] for row in self.offered]) if self.offered else torch.zeros(0)

    def figures(self, *, forgotten: bool = False, options: bool = False) -> dict[str, float]:
        """Give the figures from 0 to 1 that TOFU has.

        Args: forgotten: the truth ratio is best at 1.  options: the probability is the right answer's share of those
              offered, as for rows of general knowledge.
        """
        found = probability(self.measured.means)
        if options and self.offered:
            found = chosen_probability(self._right(), [row[1:] for row in self.offered])
        figures = {"probability": float(found.mean()), "rouge_l": float(self.rouge.mean())}
        if self.offered:
            figures["truth_ratio"] = even_truth(self.ratios) if forgotten else told_truth(self.ratios)
        return figures

    @property
    def extraction(self) -> float:
        """Give the mean extraction strength."""
        return float(extraction_strength(self.measured.right, self.measured.tokens).mean())

    def _right(self) -> Float[Tensor, " S"]:
        return torch.tensor([row[0] for row in self.offered], dtype=torch.float64)


def know(
    model: nn.Module, trees: Trees, tokenizer: PreTrainedTokenizerBase, packing: Packing, job: Job
) -> dict[str, Known]:
    """Measure all parts. The model is in evaluation mode."""
    return {
        part: Known(
            measure(model, rows, packing, job),
            torch.tensor(say(model, some(rows), tokenizer, job), dtype=torch.float64),
            offer(model, some(trees.asked.get(part, ())), packing, job),
        )
        for part, rows in trees.rows.items()
    }


def some(trees: Sequence[Tree], most: int = MOST_ASKED) -> list[Tree]:
    """Take so many at most, evenly spaced."""
    places = torch.linspace(0, len(trees) - 1, min(len(trees), most), dtype=torch.float64).round().long()
    return [trees[i] for i in places.tolist()]


@torch.no_grad()
def measure(model: nn.Module, trees: Sequence[Tree], packing: Packing, job: Job) -> Measured:
    """Measure rows, each rank a share of them; all ranks get all. The model is in evaluation mode."""

    def per_tree(rows: Rows) -> list[tuple[Tensor, Tensor]]:
        hidden, head = hidden_states(model, rows)[rows.source], head_of(model)
        values = -token_logprobs(hidden, head, rows.target), greedy_hits(hidden, head, rows.target)
        lengths = rows.lengths.tolist()
        losses, right = (torch.split(each.double().cpu(), lengths) for each in values)
        return list(zip(losses, right, strict=True))

    found = _spread(trees, per_tree, packing, job)
    losses, right = zip(*found, strict=True)
    return Measured(torch.cat(losses), torch.cat(right), torch.tensor([len(each) for each in losses]))


@torch.no_grad()
def offer(model: nn.Module, trees: Sequence[Tree], packing: Packing, job: Job) -> tuple[tuple[float, ...], ...]:
    """Give the loss a token of each answer of each tree."""

    def per_tree(rows: Rows) -> list[tuple[float, ...]]:
        sums = sum_by_sequence(-target_logprobs(model, rows), rows.sequence, rows.num_sequences)
        means = (sums.double() / rows.lengths).tolist()
        sizes = [trees[i].num_sequences for i in rows.index]
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        return [tuple(means[end - size : end]) for end, size in zip(ends, sizes, strict=True)]

    return tuple(_spread(trees, per_tree, packing, job))


def _spread(trees: Sequence[Tree], per_tree: PerTree, packing: Packing, job: Job) -> list[Any]:
    """Compute something of each tree, each rank a share; all ranks get all, in order."""
    batches = eval_batches(
        trees, row_length=packing.row_length, micro_tokens=packing.micro_tokens, layout=packing.layout,
        pad_id=packing.pad_id, device=job.device,
    )  # fmt: skip
    own: dict[int, Any] = {}
    with autocast(job):
        for rows in batches[job.rank :: job.world]:
            own.update(zip(rows.index, per_tree(rows.to(job.device)), strict=True))
    found: Mapping[int, Any] = {place: row for part in gather_objects(own) for place, row in part.items()}
    return [found[place] for place in range(len(trees))]


def say(model: nn.Module, trees: Sequence[Tree], tokenizer: PreTrainedTokenizerBase, job: Job) -> list[float]:
    """Have each question answered greedily, and give the ROUGE-L recall of the right answer."""
    order = sorted(range(len(trees)), key=lambda i: len(trees[i].prompt))
    own: dict[int, float] = {}
    with autocast(job):
        for at in range(job.rank * AT_A_TIME, len(order), job.world * AT_A_TIME):
            chosen = order[at : at + AT_A_TIME]
            own.update(zip(chosen, _say(model, [last_answer(trees[i]) for i in chosen], tokenizer), strict=True))
    found = {place: value for part in gather_objects(own) for place, value in part.items()}
    return [found[place] for place in range(len(trees))]


def last_answer(tree: Tree) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split a conversation into what comes before its last answer, and that answer."""
    end = max(i for i, mark in enumerate(tree.supervised) if mark) + 1
    start = end
    while start > 0 and tree.supervised[start - 1]:
        start -= 1
    return tree.prompt[:start], tree.prompt[start:end]


def _say(
    model: Any, asked: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], tokenizer: PreTrainedTokenizerBase
) -> list[float]:
    prompts = [prompt for prompt, _ in asked]
    room = context_length(model) - max(map(len, prompts))
    longest = min(room, max(len(answer) for _, answer in asked) + 8)
    samples = generate(
        model, prompts, seeds=[(0,)] * len(prompts), max_new_tokens=max(1, longest), temperature=0.0, top_p=1.0,
        stop_ids=stop_ids(tokenizer), pad_id=tokenizer.pad_token_id,
    )  # fmt: skip
    said = [tokenizer.decode(each[0].tokens, skip_special_tokens=True) for each in samples]
    meant = [tokenizer.decode(answer, skip_special_tokens=True) for _, answer in asked]
    return [rouge_l_recall(ours, theirs) for ours, theirs in zip(said, meant, strict=True)]
