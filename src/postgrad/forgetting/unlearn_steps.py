"""The steps of unlearning: an adapter on a language model's feed-forward layers, trained on rows to forget and to keep.

First all blocks train, with the penalty on their groups; then those whose group is near zero are let go, and the others
train on without it, until the rows to forget look like rows never seen and the rows to keep are as they were.

Letters: N target tokens, S sequences.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from postgrad.core.config import TrainConfig
from postgrad.core.distributed import first_rank
from postgrad.core.layer_adapters import activate, adapter_names, drop, initialise, inject, pairs, prune
from postgrad.core.loop import ENOUGH, Loss, train
from postgrad.core.models import head_of, hidden_states
from postgrad.core.ops import token_logprobs
from postgrad.core.report import Section, read_metrics
from postgrad.core.rows import Rows, Tree
from postgrad.core.runtime import Job, stage_seed
from postgrad.errors import GateError
from postgrad.forgetting.blocks import Block, ffn_blocks
from postgrad.forgetting.losses import group_norms, lora_groups, snap, structure
from postgrad.forgetting.membership import auc, loss_sides
from postgrad.forgetting.text_batches import Packing, Part, Phase, both_batches, phases
from postgrad.forgetting.text_losses import (
    Gone,
    TextObjectiveConfig,
    lacking,
    matched_bounds,
    odds_against,
    token_kl,
    unlearn_loss,
)
from postgrad.forgetting.text_measures import Measured, measure, some
from postgrad.forgetting.text_rows import Trees

SLACK = 0.25
"""A row counts as forgotten once it lacks no more than this, in nats a token."""
WATCHED = 256
"""Retained rows that are looked at while training, at most; all are at the end."""
Steps = Callable[[Part, int], Loss]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The low-rank pairs that make a model forget."""

    rank: int = 16
    """Rank of the pairs."""
    scale: float = 16.0
    """LoRA alpha: the update is multiplied by scale / rank."""
    layers: str = ""
    """Regular expression for the layers that get pairs; "" = the feed-forward layers of every block."""
    snap: float = 0.05
    """Blocks whose group's norm is below this after the sparse phase are left as they were."""


class Settings(NamedTuple):
    """How rows are unlearnt."""

    adapter: AdapterConfig
    objective: TextObjectiveConfig
    train: TrainConfig


class Place(NamedTuple):
    """What an adapter is put on."""

    model: nn.Module
    name: str
    """Of the adapter in the model."""
    earlier: tuple[str, ...]
    """Adapters of earlier requests, which stay as they are."""
    packing: Packing


class Outcome(NamedTuple):
    """What became of the adapter."""

    norms: dict[str, float]
    """Of every block's group when the penalty ended; 0 = the block was let go."""
    steps: int
    sections: tuple[Section, ...]
    """Curves of the last phase."""
    objective: TextObjectiveConfig
    """The one in force."""
    missed: int
    """Rows to forget that are not forgotten."""
    blocks: tuple[Block, ...]
    """All that could have changed."""


@dataclass(frozen=True, eq=False)
class Task:
    """What stays the same while rows are unlearnt."""

    place: Place
    trees: Trees
    settings: Settings
    blocks: Sequence[Block]
    before: Mapping[str, Measured]
    """What the model as it was made of the rows."""
    bounds: Float[Tensor, " N"]
    """Of the tokens to forget, row after row."""

    @property
    def taught(self) -> list[Tree]:
        """Give what is trained on in place of the rows to forget: themselves, or refusals."""
        return self.trees.refused if self.settings.objective.kind == "idk" else self.trees.forget

    def forgotten(self, found: Measured) -> Bool[Tensor, " S"]:
        """Say which rows to forget have all but reached their bounds."""
        gone = Gone(-found.losses, found.row, found.tokens, self.bounds, -self.before["forget"].nll)
        return lacking(gone, self.settings.objective) <= SLACK

    def groups(self) -> list[list[Tensor]]:
        """Give the adapter's matrices block by block; a block that was let go has none."""
        own = pairs(self.place.model, self.place.name)
        return lora_groups([[own[layer] for layer in block.linears if layer in own] for block in self.blocks])

    def norms(self) -> dict[str, float]:
        """Give the norm of every block's group."""
        return dict(zip((block.name for block in self.blocks), group_norms(self.groups()).tolist(), strict=True))

    def see(self, trees: Sequence[Tree], job: Job) -> Measured:
        """Measure rows."""
        return measure(self.place.model, trees, self.place.packing, job)


def prepare(place: Place, trees: Trees, before: Mapping[str, Measured], settings: Settings, seed: int) -> Task:
    """Put the adapter in place, and set the bounds. Args: seed: of the run."""
    adapter, objective, seen, model = settings.adapter, settings.objective, before["forget"], place.model
    if place.name in adapter_names(model):
        drop(model, place.name)
    blocks = ffn_blocks(model, adapter.layers)
    linears = [layer for block in blocks for layer in block.linears]
    inject(model, place.name, linears, rank=adapter.rank, alpha=adapter.scale)
    initialise(model, place.name, seed=stage_seed(seed, "adapter", place.name))
    activate(model, [*place.earlier, place.name], trainable=place.name)
    if objective.kind == "matched" and "held_out" not in before:
        objective = replace(objective, kind="bounded")
    if objective.kind == "matched":
        bounds = matched_bounds(*(odds_against(-rows.losses) for rows in (seen, before["held_out"])))
    else:
        bounds = torch.full_like(seen.losses, objective.bound or math.log(head_of(model).weight.shape[0]))
    return Task(place, trees, settings._replace(objective=objective), blocks, before, bounds)


def unlearn_rows(task: Task, job: Job) -> Outcome:
    """Train the adapter, first with all blocks and the penalty, then those left without it."""
    settings, objective, model = task.settings, task.settings.objective, task.place.model
    parts = phases(settings.train, len(task.taught), objective.alpha_until if objective.alpha else 0.0)
    norms: dict[str, float] = {}
    steps, sections = 0, tuple[Section, ...]()
    for phase in parts:
        last = phase is parts[-1]
        part = job if last else replace(job, folder=job.folder / phase.name)
        part.folder.mkdir(parents=True, exist_ok=True)
        both = task.trees.retain, task.taught
        batches = both_batches(both, objective.kept, settings.train, task.place.packing, job, phase)
        watch = Watch(task, job) if last else None
        sections = train(model, batches, step_loss(task, phase), watch, settings.train, part).sections
        steps += _steps_taken(part)
        norms = _let_go(task) if phase.sparse else norms or task.norms()
    missed = int((~task.forgotten(task.see(task.trees.forget, job))).sum())
    return Outcome(norms, steps, sections, objective, missed, tuple(task.blocks))


def _steps_taken(job: Job) -> int:
    """Read how many steps a training took."""
    return first_rank(lambda: max(int(str(row["step"])) for row in read_metrics(job.folder)))


def step_loss(task: Task, phase: Phase) -> Steps:
    """Make the loss of a micro-batch."""
    model, objective, num_kept = task.place.model, task.settings.objective, len(task.trees.retain)

    def loss_fn(part: Part, step: int) -> Loss:
        rows, share = part
        hidden, head = hidden_states(model, rows)[rows.source], head_of(model)
        logprobs = token_logprobs(hidden, head, rows.target)  # [N]
        place = torch.tensor(rows.index, device=hidden.device) - num_kept  # [S], each row is one sequence
        kept = (place < 0)[rows.sequence]  # [N]
        retain = -logprobs[kept].sum()
        apart = hidden.new_zeros((), dtype=torch.float32)
        if objective.kl:
            apart = token_kl(hidden[kept], _as_it_was(task.place, rows)[kept], head)
        gone = _gone(task, rows, logprobs, place)
        penalty = structure(task.groups()) if phase.sparse else retain.new_zeros(())
        terms = unlearn_loss(retain + objective.kl * apart, gone, penalty, share, objective)
        tokens, num = float(kept.sum()), float(len(gone.lengths))
        shown = {
            "retain_loss": (retain.detach(), tokens),
            "forget_loss": (-(gone.rows(gone.logprobs.detach()) / gone.lengths).sum(), num),
            "structure": (terms.structure, share.part),
            **({"kl": (apart.detach(), tokens)} if objective.kl else {}),
        }
        return Loss(terms.total, share.part, shown, rows.num_tokens)

    return loss_fn


def _gone(task: Task, rows: Rows, logprobs: Float[Tensor, " N"], place: Int[Tensor, " S"]) -> Gone:
    """Pick the tokens of rows to forget. Args: place: of each row among those to forget, negative for others."""
    forgotten = place >= 0
    ours = forgotten[rows.sequence]  # [N]
    sequence = (forgotten.cumsum(0) - 1)[rows.sequence[ours]]
    before, chosen, device = task.before["forget"], place[forgotten].tolist(), logprobs.device
    base = -before.nll.float()[chosen]
    own = torch.zeros_like(logprobs[ours])
    if task.settings.objective.kind != "idk":  # refusals have no bounds, and other lengths
        bounds = torch.split(task.bounds.float(), before.tokens.tolist())
        own = torch.cat([bounds[i] for i in chosen]) if chosen else task.bounds[:0].float()
    return Gone(logprobs[ours], sequence, rows.lengths[forgotten], own.to(device), base.to(device))


def _as_it_was(place: Place, rows: Rows) -> Tensor:
    """Compute hidden states of the targets without the adapter, and without dropout."""
    model, was_training = place.model, place.model.training
    activate(model.eval(), place.earlier)
    with torch.no_grad():
        hidden = hidden_states(model, rows)[rows.source]
    activate(model.train(was_training), [*place.earlier, place.name], trainable=place.name)
    return hidden


class Watch:
    """Evaluates rows of each kind, and says when it is enough.

    That is when rows to forget all have reached their bounds or, where bounds are matched, are no easier to tell from
    rows never seen than by chance, and rows to keep have lost no more than the tolerance.
    """

    def __init__(self, task: Task, job: Job) -> None:
        self._task, self._job = task, job
        self._kept = some(task.trees.retain, WATCHED)
        activate(task.place.model, task.place.earlier)
        self._was = task.see(self._kept, job).loss
        activate(task.place.model, [*task.place.earlier, task.place.name], trainable=task.place.name)

    def __call__(self, step: int) -> dict[str, float]:
        """Give the figures."""
        task, settings = self._task, self._task.settings
        gone, kept = task.see(task.trees.forget, self._job), task.see(self._kept, self._job)
        norms = group_norms(task.groups())
        figures = {
            "forget_loss": gone.loss,
            "retain_loss": kept.loss,
            "forgotten": float(task.forgotten(gone).double().mean()),
            "blocks": float((norms >= settings.adapter.snap).sum()),
        }
        enough = figures["forgotten"] == 1.0
        if held := task.trees.rows.get("held_out"):
            unseen = task.see(held, self._job)
            areas = {
                "mia_auc": auc(loss_sides(gone.means, unseen.means)),
                "greedy_auc": auc(loss_sides(-gone.known, -unseen.known)),
            }
            enough = enough or (settings.objective.kind == "matched" and max(areas.values()) <= 0.5)
            figures |= areas
        return {**figures, ENOUGH: float(enough and kept.loss - self._was <= settings.objective.tolerance)}


def _let_go(task: Task) -> dict[str, float]:
    """Take the adapter off blocks whose group is near zero; return the norms, 0 for those."""
    norms, least = task.norms(), task.settings.adapter.snap
    gone = [task.blocks[i] for i in snap(task.groups(), least)]
    if len(gone) == len(task.blocks):
        raise GateError(
            f"every block's group ended below {least}, so nothing is forgotten. Lower objective.alpha, or raise "
            "objective.beta or the learning rate."
        )
    prune(task.place.model, task.place.name, [layer for block in gone for layer in block.linears])
    return norms | {block.name: 0.0 for block in gone}
