"""Erase one request: an adapter on few blocks that makes a classifier forget some classes and keep the others.

GS-LoRA trains low-rank pairs on the feed-forward layers of every block, with a penalty that silences whole blocks.
Here, in the "safe" presets, a short sparse phase says which blocks matter; the adapter is then pruned to those, what
comes before them is computed once and kept. Settings and presets are in forgetting/erase_config.py.

Source:    GS-LoRA (arXiv 2403.11530), GS-LoRA++ (arXiv 2501.09705); presets "paper" and "paper++" follow their released
           code: every block, a hundred epochs, two forward passes a step.
Differs:   the selection, the cache, the early stop, exact zeros and the leak terms are additions.

Letters: N images, D width of the features, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postgrad.core.distributed import first_rank
from postgrad.core.layer_adapters import REINITIAL_GAIN, activate, active_names, drop, initialise, inject, pairs, prune
from postgrad.core.loop import ENOUGH, Loss, train
from postgrad.core.report import read_metrics
from postgrad.core.runtime import Job, stage_seed
from postgrad.core.vision import ImageSet
from postgrad.core.vision_models import Classifier, Seen
from postgrad.errors import GateError
from postgrad.forgetting.batches import Pair, PairBatches
from postgrad.forgetting.blocks import Block, ffn_blocks
from postgrad.forgetting.erase_config import NO_LEAK, EraseConfig, careful, epochs_of
from postgrad.forgetting.leak_terms import LeakTerms, leak_terms
from postgrad.forgetting.losses import Batch, forget_loss, group_norms, lora_groups, snap, structure
from postgrad.forgetting.unseen import CLOSE, UnseenTerms, log_odds, plain
from postgrad.forgetting.views import View, class_means, from_block, share_right

Steps = Callable[[Pair, int], Loss]
ALLOWED_LOSS = 1.0
"""Points of accuracy on the retained training images that may be missing where enough is kept."""


@dataclass(frozen=True)
class Material:
    """What a request is learnt from."""

    forget: ImageSet
    retain: ImageSet
    task: int = 0
    """How many requests came before."""
    old: tuple[int, ...] = ()
    """Classes that those forgot."""
    levels: Float[Tensor, " F"] | None = None
    """Of single images: log odds of the true class down to which each is forgotten; None = whole classes."""


@dataclass(frozen=True)
class Erased:
    """What became of a request."""

    linears: tuple[str, ...]
    """Layers that carry the adapter."""
    norms: Mapping[str, float]
    """Of each block after the sparse phase or, without one, at the end."""
    steps: int
    image_passes: float
    """Images times the share of the network they went through, forward."""
    figures: Mapping[str, float]
    """Accuracies on the training images at the end, in percent."""


def erase(
    classifier: Classifier, material: Material, name: str, earlier: Sequence[str], config: EraseConfig, job: Job
) -> Erased:
    """Train the adapter `name` on top of earlier ones; the base and they stay as they are.

    The run's files go below `job.folder`; a stopped run goes on there.

    Raises: GateError: more of the retained accuracy was lost than `floor` allows, or every group was snapped to zero.
            The classifier answers as before.
    """
    network = classifier.network
    blocks = ffn_blocks(network, placement=config.placement)
    forget, retain = View(classifier, material.forget), View(classifier, material.retain)
    before, unseen = retain.see_all(), None
    seen = {*material.forget.labels.tolist(), *material.retain.labels.tolist(), *material.old}
    if material.levels is None and len(seen) < len(classifier.classes):
        config = careful(config)
    elif material.levels is not None:
        config = replace(config, objective=plain(config.objective), leak=NO_LEAK)
        unseen = UnseenTerms(material.levels, log_odds(before.logits, retain.images.labels))
    labels = material.forget.labels if unseen is None else material.forget.labels[:0]
    shown = forget.see_all(), before
    base = _by_base(network, (forget, retain)) if earlier and config.leak.keep + config.leak.proxy else shown
    extra = leak_terms(config.leak, shown, (labels, material.retain.labels), base, material.old)
    means = class_means(
        torch.cat([before.features, extra.features]),
        torch.cat([material.retain.labels, material.forget.labels]),
        len(classifier.classes),
    )
    accuracy = share_right(before, retain.images.labels)
    task = _Task(classifier, forget, retain, name, tuple(earlier), blocks, config, means, extra, accuracy, unseen)
    outcome = _widening(task, material.task, job)
    if not outcome.linears:
        drop(network, name)
        raise GateError(
            f"nothing is left, every group of matrices ended below erase.snap ({config.snap}): "
            "sparsity outweighed forgetting. Lower erase.objective.alpha or erase.snap."
        )
    activate(network, [*earlier, name])
    if not outcome.figures["lost"] <= config.floor:
        drop(network, name)
        raise GateError(
            f"{outcome.figures['lost']:.1f} points of accuracy on retained training images would be "
            f"lost, the floor is {config.floor}. Give more retained images, let more blocks change (erase.blocks), or "
            "raise erase.floor if that is acceptable."
        )
    return outcome


def _by_base(network: nn.Module, views: tuple[View, View]) -> tuple[Seen, Seen]:
    """Show both sets to the model without any adapter."""
    active = active_names(network)
    activate(network, ())
    try:
        return views[0].see_all(), views[1].see_all()
    finally:
        activate(network, active)


@dataclass(frozen=True)
class _Task:
    """What stays the same within a request."""

    classifier: Classifier
    forget: View
    retain: View
    name: str
    earlier: tuple[str, ...]
    blocks: Sequence[Block]
    config: EraseConfig
    prototypes: Tensor
    leak: LeakTerms
    base_accuracy: float
    unseen: UnseenTerms | None
    """Set where single images are forgotten, not whole classes."""

    def groups(self) -> list[list[Tensor]]:
        """Give the adapter's matrices by group, blocks without any left out."""
        own = pairs(self.classifier.network, self.name)
        by_block = [[own[layer] for layer in block.linears if layer in own] for block in self.blocks]
        return lora_groups([block for block in by_block if block], self.config.grouping)

    def batches(self, epochs: int, job: Job) -> PairBatches:
        """Order the images."""
        size = self.config.train.batch_size
        return PairBatches(len(self.retain), len(self.forget), size, epochs, job.seed, job.rank, job.world)


def _widening(task: _Task, number: int, job: Job) -> Erased:
    """Erase in few blocks; where those cannot forget and keep, begin again with twice as many, up to all of them."""
    kept = task.config.blocks if task.config.select_epochs else len(task.blocks)
    passes, steps = 0.0, 0
    while True:
        widest = kept >= len(task.blocks)
        attempt = replace(job, folder=job.folder / f"blocks-{min(kept, len(task.blocks))}")
        outcome = _attempt(replace(task, config=replace(task.config, blocks=kept)), number, attempt)
        passes, steps = passes + outcome.image_passes, steps + outcome.steps
        if _done(task, outcome.figures) or widest:
            return replace(outcome, image_passes=passes, steps=steps)
        drop(task.classifier.network, task.name)
        kept *= 2


def _attempt(task: _Task, number: int, job: Job) -> Erased:
    """Train a new adapter: sparse phase, pruning, the rest."""
    network, config = task.classifier.network, task.config
    linears = [layer for block in task.blocks for layer in block.linears]
    inject(network, task.name, linears, rank=config.rank, alpha=config.scale)
    gain = REINITIAL_GAIN if number and not config.together else 1.0
    initialise(network, task.name, seed=stage_seed(job.seed, "adapter", task.name), gain=gain)
    activate(network, [*task.earlier, task.name], trainable=task.name)
    norms, selecting = _select(task, job)
    figures, steps, finishing = _finish(task, job)
    return Erased(tuple(pairs(network, task.name)), norms or _norms(task), steps, selecting + finishing, figures)


def _norms(task: _Task) -> dict[str, float]:
    """Give the norm of each block's part of the adapter."""
    own = pairs(task.classifier.network, task.name)
    parts = {block.name: [m for layer in block.linears if layer in own for m in own[layer]] for block in task.blocks}
    kept = {name: matrices for name, matrices in parts.items() if matrices}
    return dict(zip(kept, group_norms(list(kept.values())).tolist(), strict=True))


def _select(task: _Task, job: Job) -> tuple[dict[str, float], float]:
    """Train every block's part for a little, then keep the strongest; return all norms and the image passes.

    Without a choice nothing is trained. Only the later half may stay, so that what comes before is computed once.
    """
    config = task.config
    if not config.select_epochs or config.blocks >= len(task.blocks):
        return {}, 0.0
    late = [block.name for block in task.blocks[len(task.blocks) // 2 :]]
    norms, passes = dict[str, float](), 0.0
    if len(late) > config.blocks:  # else there is nothing to choose
        batches = task.batches(config.select_epochs, job)
        part = replace(job, folder=job.folder / "select")
        part.folder.mkdir(parents=True, exist_ok=True)
        train(task.classifier, batches, _step(task, batches.epoch_steps), None, config.train, part)
        norms, passes = _norms(task), 2.0 * config.train.batch_size * len(batches)
        late = sorted(late, key=lambda name: -norms[name])[: config.blocks]
    gone = [layer for block in task.blocks if block.name not in late for layer in block.linears]
    prune(task.classifier.network, task.name, gone)
    return norms, passes


def _finish(task: _Task, job: Job) -> tuple[dict[str, float], int, float]:
    """Train what is left to the end; return figures on the training images, steps and image passes."""
    config, network = task.config, task.classifier.network
    own = pairs(network, task.name)
    start = next(i for i, block in enumerate(task.blocks) if any(layer in own for layer in block.linears))
    if config.together:
        forget, retain = (from_block(view, task.blocks, start) for view in (task.forget, task.retain))
        task = replace(task, forget=forget, retain=retain)
    cached = task.retain.cached is not None
    batches = task.batches(epochs_of(config.train, config.least_steps, task.batches(1, job).epoch_steps), job)
    part = replace(job, folder=job.folder / "train")
    part.folder.mkdir(parents=True, exist_ok=True)
    settings = replace(config.train, eval_every=batches.epoch_steps if config.patience else 0)
    if settings.optim.stairs:
        settings = replace(settings, optim=replace(settings.optim, stairs=batches.epoch_steps))
    watch = _Watch(task, part.folder)
    report = train(task.classifier, batches, _step(task, batches.epoch_steps), watch, settings, part)
    figures = {key: float(value) for key, value in report.results.items() if key not in ("steps", "met")}
    steps = int(report.results["steps"])
    if snap(task.groups(), config.snap):
        idle = [layer for layer, pair in pairs(network, task.name).items() if not all(map(torch.any, pair))]
        prune(network, task.name, idle)
        figures |= _figures(task)
    share = (len(task.blocks) - start) / len(task.blocks) if cached else 1.0
    return figures, steps, 2.0 * config.train.batch_size * steps * share


def _figures(task: _Task) -> dict[str, float]:
    """Measure on the training images, in per cent."""
    forget, retain = task.forget.see_all(), task.retain.see_all()
    kept = share_right(retain, task.retain.images.labels)
    figures = {
        "forget_accuracy": share_right(forget, task.forget.images.labels),
        "retain_accuracy": kept,
        "lost": task.base_accuracy - kept,
    }
    if task.unseen is not None:
        figures["above_unseen"] = task.unseen.above(forget.logits, task.forget.images.labels)
    elif task.leak.on:
        labels = task.forget.images.labels, task.retain.images.labels
        figures["leak_found"] = task.leak.found(forget, labels[0], retain, labels[1])
    return figures


def _done(task: _Task, figures: Mapping[str, float]) -> bool:
    """Say whether all is forgotten and enough is kept; of single images, whether they are as unseen ones."""
    gone = figures["forget_accuracy"] == 0.0 if task.unseen is None else figures["above_unseen"] <= CLOSE
    return gone and figures["lost"] <= ALLOWED_LOSS


class _Watch:
    """Evaluates on the training images and says when it is enough."""

    def __init__(self, task: _Task, folder: Path) -> None:
        self._task, self._folder = task, folder
        self._met: int | None = None  # not known yet: a run that was stopped may have met it before

    def __call__(self, step: int) -> dict[str, float]:
        patience, figures = self._task.config.patience, _figures(self._task)
        before = first_rank(lambda: _met_before(self._folder)) if self._met is None else self._met
        hidden = figures.get("leak_found", 0.0) <= self._task.config.leak.stop
        self._met = before + 1 if hidden and _done(self._task, figures) else 0
        enough = bool(patience) and self._met >= patience
        return {**figures, "steps": float(step), "met": float(self._met), ENOUGH: float(enough)}


def _met_before(folder: Path) -> int:
    """Count the evaluations in a row that found all forgotten, as the log of a run that goes on has it."""
    logged = [row["eval/met"] for row in read_metrics(folder) if "eval/met" in row]
    return int(float(str(logged[-1]))) if logged else 0


def _step(task: _Task, epoch_steps: int) -> Steps:
    """Make the loss of a step."""
    config = task.config

    def loss_fn(batch: Pair, step: int) -> Loss:
        retain, forget = _see(task, batch)
        kept = Batch(retain.features, retain.logits, task.retain.labels(batch.retain))
        gone = Batch(forget.features, forget.logits, task.forget.labels(batch.forget))
        on = step // epoch_steps >= config.alpha_from and config.objective.alpha > 0
        penalty = structure(task.groups()) if on else kept.logits.new_zeros(())
        terms = forget_loss(kept, gone, penalty, task.prototypes, config.objective)
        leaks = (task.leak if task.unseen is None else task.unseen).losses(batch, gone, kept)
        total = terms.total + sum(leaks.values(), start=terms.total.new_zeros(()))
        shown = {name: (value, 1.0) for name, value in {**terms._asdict(), **leaks}.items() if name != "total"}
        return Loss(total, 1.0, shown, len(batch.retain) + len(batch.forget))

    return loss_fn


def _see(task: _Task, batch: Pair) -> tuple[Seen, Seen]:
    """Compute both sets' features and logits."""
    if task.config.together:
        return task.retain.see_with(batch.retain, task.forget, batch.forget)
    return task.retain.see(batch.retain), task.forget.see(batch.forget)
