"""Score stored responses with a reward model, into a store of their own.

Scores live apart from responses: another reward model can score the same responses, and nothing is drawn again.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.alignment.responses import Answers, read_answers, read_counts, shard_column
from postgrad.core.batches import eval_batches, sequence_values
from postgrad.core.config import DataConfig, ModelConfig
from postgrad.core.data import Message
from postgrad.core.distributed import barrier, first_rank, on_every_rank
from postgrad.core.models import choose_layout, load_reward_model, model_hash, sequence_scores
from postgrad.core.precision import autocast
from postgrad.core.rows import Layout, Tree
from postgrad.core.runtime import Job, progress, stop_on_signals, stop_requested
from postgrad.core.store import has_shard, is_sealed, read_manifest, seal, store_hash, write_shard
from postgrad.core.text import answer_trees
from postgrad.errors import DataError, Interrupted

Branches = tuple[tuple[Message, ...], tuple[str, ...]]
ROW_TOKENS = 8192
"""Packed tokens a forward pass; the answers of a prompt are split over several trees beyond it."""
PROMPTS_A_SHARD = 64

SCORES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("k", pa.int32()),
        ("rm_hash", pa.string()),
        ("score", pa.float64()),
        ("readable", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Scorer:
    """A reward model ready to score."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    data: DataConfig
    job: Job
    hash: str

    @torch.no_grad()
    def score(self, branches: Sequence[Branches]) -> list[list[float]]:
        """Score all answers of all prompts, each prompt read once; NaN for an answer that does not fit.

        Equal answers to a prompt are scored once.
        """
        unique = [(messages, tuple(dict.fromkeys(answers))) for messages, answers in branches]
        found: dict[tuple[int, str], float] = {}
        kept = self._score_kept(unique, [*range(len(unique))], found)
        # A prompt is dropped whole when one of its answers cannot be read; the others are tried alone.
        rest = [(i, answer) for i in range(len(unique)) if i not in kept for answer in unique[i][1]]
        self._score_kept([(unique[i][0], (answer,)) for i, answer in rest], [i for i, _ in rest], found)
        return [[found.get((i, answer), math.nan) for answer in answers] for i, (_, answers) in enumerate(branches)]

    def _score_kept(
        self, branches: Sequence[Branches], names: Sequence[int], found: dict[tuple[int, str], float]
    ) -> set[int]:
        try:
            trees, kept, _ = answer_trees(self.tokenizer, branches, self.data)
        except DataError:  # nothing fits
            return set()
        parts = [part for tree in trees for part in split_tree(tree, ROW_TOKENS)]
        batches = eval_batches(
            parts,
            row_length=self.data.row_length,
            micro_tokens=ROW_TOKENS,
            layout=self.layout,
            pad_id=self.tokenizer.pad_token_id or 0,
            device=self.job.device,
        )
        moved = (rows.to(self.job.device) for rows in batches)
        with autocast(self.job):
            values = sequence_values(parts, moved, partial(sequence_scores, self.model))
        flat = [value for part in values for value in part]
        answers = [(names[i], answer) for i in kept for answer in branches[i][1]]
        found.update(zip(answers, flat, strict=True))
        return {names[i] for i in kept}


def load_scorer(config: ModelConfig, job: Job, data: DataConfig) -> Scorer:
    """Load a reward model to score with."""
    model, tokenizer = load_reward_model(config, job, frozen=True)
    return Scorer(model, tokenizer, choose_layout(config, model, job), data, job, model_hash(model))


def split_tree(tree: Tree, size: int) -> list[Tree]:
    """Split the answers of a tree over several, each of about `size` tokens at most with its prompt."""
    parts: list[list[tuple[int, ...]]] = []
    room = 0
    for answer in tree.answers:
        if not parts or room < len(answer):
            parts.append([])
            room = size - len(tree.prompt)
        parts[-1].append(answer)
        room -= len(answer)
    return [Tree(prompt=tree.prompt, answers=tuple(part)) for part in parts]


def score_responses(folder: Path, scorer: Scorer) -> dict[str, int]:
    """Score every response of `folder`/responses into `folder`/scores, unless this reward model did so already.

    An answer that the reward model cannot read gets the lowest score of its prompt, 0 where there is none.

    Returns: counts of scores, and of answers that could not be read.
    """
    target, work = folder / "scores", folder / f".scores-{scorer.hash}"
    responses = store_hash(folder / "responses")
    if not (is_sealed(target) and _is_of(target, scorer, responses)):
        answers = read_answers(folder / "responses")
        with stop_on_signals():
            on_every_rank(lambda: _score_shards(work, answers, scorer))
        barrier()
        first_rank(lambda: _finish(work, target, scorer, responses))
    return read_counts(target)


def _is_of(target: Path, scorer: Scorer, responses: str) -> bool:
    parents: dict[str, str] = read_manifest(target)["parents"]
    return parents == {"responses": responses, "reward": scorer.hash}


def _score_shards(work: Path, answers: Sequence[Answers], scorer: Scorer) -> None:
    job = scorer.job
    shards = [answers[at : at + PROMPTS_A_SHARD] for at in range(0, len(answers), PROMPTS_A_SHARD)]
    mine = range(job.rank, len(shards), job.world)
    with progress(job, sum(len(shards[i]) for i in mine), "prompts scored") as bar:
        for index in mine:
            if not has_shard(work, index):
                values = scorer.score([(each.messages, each.texts) for each in shards[index]])
                pairs = zip(shards[index], values, strict=True)
                write_shard(work, index, [row for each, own in pairs for row in _rows(each, own, scorer.hash)], SCORES)
            bar.advance(len(shards[index]))
            if stop_requested():
                raise Interrupted("Stopped; the scores so far are stored.")


def _rows(answers: Answers, scores: Sequence[float], name: str) -> list[dict[str, object]]:
    lowest = min((score for score in scores if not math.isnan(score)), default=0.0)
    return [
        {
            "prompt_id": answers.id,
            "k": row["k"],
            "rm_hash": name,
            "score": lowest if math.isnan(score) else score,
            "readable": not math.isnan(score),
        }
        for row, score in zip(answers.rows, scores, strict=True)
    ]


def _finish(work: Path, target: Path, scorer: Scorer, responses: str) -> None:
    """Seal the scores and put them in the place of those of another reward model."""
    readable = shard_column(work, "readable")
    counts = {"scores": len(readable), "answers the reward model could not read": readable.count(False)}
    settings = {"max_length": scorer.data.max_length, "truncate": scorer.data.truncate}
    seal(
        work, stage="scores", settings=settings, parents={"responses": responses, "reward": scorer.hash}, counts=counts
    )
    if target.is_dir():
        shutil.rmtree(target)
    work.rename(target)
