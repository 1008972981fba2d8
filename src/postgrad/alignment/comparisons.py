"""Prompts whose answers have a known order, as a reward model trains on them, and its accuracy by slices.

Letters: G prompts, B prompts of a micro-batch, K answers of a prompt, S sequences, P pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from postgrad.alignment.pairs import distinct
from postgrad.core.config import DataConfig
from postgrad.core.items import Pair, ResponseSet
from postgrad.core.metrics import Interval, mean_interval, pair_accuracy, paired_difference
from postgrad.core.report import Cell, Table
from postgrad.core.rows import Tree
from postgrad.core.text import answer_trees
from postgrad.errors import DataError


@dataclass(frozen=True)
class Comparisons:
    """Trees with two or more answers, and what is known of the answers."""

    trees: list[Tree]
    gold: Float[Tensor, "G K"]
    """Higher is better; NaN past a prompt's last answer. A pair's are p and 1 - p."""
    margin: Float[Tensor, " G"]
    turn: Int[Tensor, " G"]
    length: Float[Tensor, "G K"]
    """Characters of each answer."""
    counts: dict[str, int]
    """Rows read, kept, and dropped for each reason."""

    def at(self, index: Sequence[int]) -> Float[Tensor, "B K"]:
        """Give the gold of some prompts, no wider than the longest of them needs."""
        gold = self.gold[list(index)]
        return gold[:, : int((~gold.isnan()).sum(1).max())]

    def counts_as(self, name: str) -> dict[str, int]:
        """Label the counts with the part of the data they belong to."""
        return {f"{name} {reason}": num for reason, num in self.counts.items()}


def comparisons(
    items: Sequence[Pair] | Sequence[ResponseSet], tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> Comparisons:
    """Tokenise pairs or scored sets."""
    pairs = [item for item in items if isinstance(item, Pair)]
    sets = [item for item in items if isinstance(item, ResponseSet)]
    return from_sets(sets, tokenizer, data) if sets else from_pairs(pairs, tokenizer, data)


def from_pairs(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Comparisons:
    """Build comparisons of two answers each."""
    branches = [(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]
    trees, kept, counts = answer_trees(tokenizer, branches, data)
    rows = [pairs[i] for i in kept]
    return Comparisons(
        trees=trees,
        gold=torch.tensor([[row.p, 1 - row.p] for row in rows]).view(-1, 2),
        margin=torch.tensor([float(row.margin) for row in rows]),
        turn=torch.tensor([row.turn for row in rows], dtype=torch.long),
        length=torch.tensor([[float(len(row.chosen)), float(len(row.rejected))] for row in rows]).view(-1, 2),
        counts=counts,
    )


def from_sets(sets: Sequence[ResponseSet], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Comparisons:
    """Build comparisons of all distinct answers of each scored set; sets without an order are counted."""
    found: list[tuple[ResponseSet, list[int]]] = []
    dropped = {"dropped: fewer than two distinct responses": 0, "dropped: all scores equal": 0}
    for item in sets:
        keep = distinct(item.responses)
        if len(item.scores) != len(item.responses):
            raise DataError(
                f"{data.path}: prompt {item.id} has {len(item.responses)} responses and {len(item.scores)} "
                "scores; a loss over sets needs a score for each. Score the set first (postgrad sample)."
            )
        if len(keep) < 2:
            dropped["dropped: fewer than two distinct responses"] += 1
        elif len({item.scores[i] for i in keep}) < 2:
            dropped["dropped: all scores equal"] += 1
        else:
            found.append((item, keep))
    branches = [(item.prompt, tuple(item.responses[i] for i in keep)) for item, keep in found]
    trees, kept, counts = answer_trees(tokenizer, branches, data)
    rows = [found[i] for i in kept]
    scores = [[item.scores[i] for i in keep] for item, keep in rows]
    lengths = [[float(len(item.responses[i])) for i in keep] for item, keep in rows]
    turns = [sum(message["role"] == "user" for message in item.prompt) for item, _ in rows]
    return Comparisons(
        trees=trees,
        gold=padded(scores),
        margin=torch.zeros(len(rows)),
        turn=torch.tensor(turns, dtype=torch.long),
        length=padded(lengths),
        counts={**counts, **{reason: num for reason, num in dropped.items() if num}},
    )


def padded(rows: Sequence[Sequence[float]]) -> Float[Tensor, "G K"]:
    """Lay rows of unlike length under each other, NaN where there is nothing."""
    width = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[float("nan")] * (width - len(row))] for row in rows]).view(-1, width)


def to_table(values: Float[Tensor, " S"], present: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Lay the values of sequences out by prompt, 0 where a prompt has no answer."""
    table = values.new_zeros(present.shape)
    table[present.to(values.device)] = values
    return table


@dataclass(frozen=True)
class Judged:
    """Every pair of answers with an order, and how a model scores its sides."""

    better: Float[np.ndarray, " P"]
    worse: Float[np.ndarray, " P"]
    gap: Float[np.ndarray, " P"]
    """How far the better answer leads by the data: its margin, or the difference of gold."""
    turn: Int[np.ndarray, " P"]
    prompt: Int[np.ndarray, " P"]
    """Which prompt the pair belongs to."""
    length_better: Float[np.ndarray, " P"]
    length_worse: Float[np.ndarray, " P"]

    def at(self, chosen: Bool[np.ndarray, " P"]) -> "Judged":
        """Keep some of the pairs."""
        return Judged(*(part[chosen] for part in self.__dict__.values()))


def judge(data: Comparisons, scores: Float[Tensor, "G K"]) -> Judged:
    """List all pairs of a prompt's answers whose gold differs; `scores` are the model's."""
    prompt, better, worse = (data.gold[:, :, None] > data.gold[:, None, :]).nonzero(as_tuple=True)  # [P] each
    gap = data.gold[prompt, better] - data.gold[prompt, worse]
    if bool((data.margin != 0).any()):
        gap = data.margin[prompt]
    lengths = (data.length[prompt, side].double().numpy() for side in (better, worse))
    return Judged(
        scores[prompt, better].double().numpy(),
        scores[prompt, worse].double().numpy(),
        gap.double().numpy(),
        data.turn[prompt].numpy(),
        prompt.numpy(),
        *lengths,
    )


def accuracy_tables(judged: Judged, num_buckets: int) -> tuple[Table, ...]:
    """Tabulate pair accuracy overall, by turn and by margin, beside the rule "the longer answer is better"."""
    if not judged.better.size:
        return ()
    turns = [(f"turn {turn}", judged.at(judged.turn == turn)) for turn in np.unique(judged.turn)]
    edges = np.unique(np.quantile(judged.gap, np.linspace(0, 1, num_buckets + 1)))
    buckets = []
    for low, high in pairwise(edges.tolist()):
        inside = (judged.gap >= low) & ((judged.gap < high) | (high == edges[-1]))
        buckets.append((f"{low:.3g} to {high:.3g}", judged.at(inside)))
    note = (
        "Intervals are 95 %, over prompts. Length rule: accuracy of calling the longer answer better. Lead: "
        "accuracy minus the length rule's on the same pairs."
    )
    tables = [_table("Held-out accuracy", [("all", judged), *(turns if len(turns) > 1 else [])], note)]
    if len(buckets) > 1:
        tables.append(_table("Held-out accuracy by margin", buckets, "Margin: how far the data's labels lead."))
    return tuple(tables)


def prompt_accuracy(judged: Judged) -> Interval:
    """Return the pair accuracy of a model's scores, prompts counting alike."""
    return _accuracy(judged.better, judged.worse, judged.prompt)


def length_accuracy(judged: Judged) -> Interval:
    """Return the pair accuracy of the rule "the longer answer is better"."""
    return _accuracy(judged.length_better, judged.length_worse, judged.prompt)


def accuracy_minus_length(judged: Judged) -> Interval:
    """Return the model's pair accuracy minus the length rule's, over prompts, which count alike.

    Both are right or wrong about the same pairs, so their difference is surer than either.
    """
    rule = _prompt_shares(judged.length_better, judged.length_worse, judged.prompt)
    return paired_difference(_prompt_shares(judged.better, judged.worse, judged.prompt), rule)


def _accuracy(
    better: Float[np.ndarray, " P"], worse: Float[np.ndarray, " P"], prompt: Int[np.ndarray, " P"]
) -> Interval:
    """Give Wilson's interval for one pair a prompt, else the interval of the prompts' means."""
    if np.unique(prompt).size == prompt.size:
        return pair_accuracy(better, worse)
    return mean_interval(_prompt_shares(better, worse, prompt))


def _prompt_shares(
    better: Float[np.ndarray, " P"], worse: Float[np.ndarray, " P"], prompt: Int[np.ndarray, " P"]
) -> Float[np.ndarray, " G"]:
    """Give each prompt's share of pairs in the right order; equal scores count half."""
    _, place, num_pairs = np.unique(prompt, return_inverse=True, return_counts=True)
    right = (better > worse) + 0.5 * (better == worse)
    shares: Float[np.ndarray, " G"] = np.bincount(place, weights=right) / num_pairs
    return shares


def _table(title: str, slices: Sequence[tuple[str, Judged]], note: str) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, part in slices:
        if part.better.size:
            numbers = (*prompt_accuracy(part), length_accuracy(part).value, *accuracy_minus_length(part))
            rows.append((name, part.better.size, *(round(number, 4) for number in numbers)))
    columns = ("slice", "pairs", "accuracy", "low", "high", "length rule", "lead", "from", "to")
    return Table(title, columns, tuple(rows), note)
