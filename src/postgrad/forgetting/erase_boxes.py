"""Erase one request from a detector: an adapter on few blocks that makes it forget object classes and keep the others.

Preset "paper" trains low-rank pairs on the feed-forward layers of every encoder and decoder block for thirty epochs.
Preset "safe" is ours: a short sparse phase says which blocks matter, the adapter is pruned to those, training stops
when the classes are not found any more, and an attempt that fails begins anew with twice as many blocks. A bound of 4
in place of 15 leaves a class alone once it is gone, so that the kept ones do not pay for more, and the answers on
retained images are held as they were before the request: on their own, few boxes let kept classes drift, and those that
earlier requests forgot come back.

Source:    GS-LoRA (arXiv 2403.11530), its Deformable DETR; the objective is that of forgetting/detection.py.
Differs:   selection, early stop, exact zeros and the floor are additions; the schedule of the learning rate is not
           said in the release's scripts: it is constant here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from postgrad.core.config import OptimConfig, TrainConfig
from postgrad.core.layer_adapters import REINITIAL_GAIN, activate, drop, initialise, inject, pairs, prune
from postgrad.core.loop import ENOUGH, Loss, train
from postgrad.core.runtime import Job, stage_seed
from postgrad.errors import ConfigError, DataError, GateError
from postgrad.forgetting.average_precision import Boxes, average_precision, present
from postgrad.forgetting.batches import Pair, PairBatches
from postgrad.forgetting.blocks import Block, ffn_blocks
from postgrad.forgetting.boxes import BoxSet
from postgrad.forgetting.detection import (
    BoxLeakConfig,
    DetectorObjectiveConfig,
    Held,
    detection_forget_step,
    held_answers,
    is_softmax,
)
from postgrad.forgetting.detector import Detector
from postgrad.forgetting.erase_config import check_adapter, check_counts, check_objective, check_training, epochs_of
from postgrad.forgetting.losses import group_norms, snap, structure

GONE = 1.0
"""AP of the forgotten classes on training images, in points, below which they count as not found."""
STOP_LOSS, ALLOWED_LOSS = 1.0, 3.0
"""Points of AP of the kept classes on training images that may be missing when training stops early, and at its end
where no more blocks are tried."""


@dataclass(frozen=True, kw_only=True)
class EraseBoxesConfig:
    """How a request is erased."""

    rank: int = 8
    """Rank of the adapter's pairs."""
    scale: float = 1.0
    """LoRA alpha: the update is multiplied by scale / rank."""
    select_epochs: int = 1
    """Epochs of the sparse phase on every block; 0 = all blocks stay."""
    blocks: int = 2
    """Blocks that stay after the sparse phase, the strongest."""
    least_steps: int = 80
    """Steps at least, where training does not stop early: epochs of few images are repeated until there are so many."""
    snap: float = 1e-2
    """Blocks whose norm ends below this become exactly zero and are taken off."""
    early: bool = True
    """Stop once the forgotten classes are not found and enough is kept, both on training images."""
    floor: float = 10.0
    """Points of AP of the kept classes on training images that may be lost, else the request is refused; 100 = any."""
    restart_gain: bool = False
    """Draw later requests' A smaller, as the paper's code does."""
    objective: DetectorObjectiveConfig = DetectorObjectiveConfig(bound=4.0, hold=2.0)
    """Weights and bounds of the objective's terms."""
    train: TrainConfig = TrainConfig(
        epochs=2, batch_size=16, save_every=0, keep_checkpoints=1,
        optim=OptimConfig(lr=1e-2, weight_decay=1e-4, schedule="cosine", warmup=0.05, final=0.05, clip=0.5),
    )  # fmt: skip


_SAFE = EraseBoxesConfig()
PRESETS: Mapping[str, EraseBoxesConfig] = MappingProxyType(
    {
        "safe": _SAFE,
        "paper": EraseBoxesConfig(
            select_epochs=0, blocks=0, least_steps=0, snap=0.0, early=False, floor=100.0, restart_gain=True,
            objective=DetectorObjectiveConfig(),
            train=TrainConfig(
                epochs=30, batch_size=32, save_every=0, keep_checkpoints=1,
                optim=OptimConfig(lr=3e-4, weight_decay=1e-4, schedule="constant", warmup=0.0, clip=0.1),
            ),
        ),
    }
)  # fmt: skip


@dataclass(frozen=True)
class BoxMaterial:
    """What a request is learnt from."""

    forget: BoxSet
    """Images that show the classes to forget, with the boxes of these alone."""
    retain: BoxSet
    """Images that show kept classes, with the boxes of those alone; an image may be in both."""
    number: int = 0
    """How many requests came before."""
    old: tuple[int, ...] = ()
    """Classes that those forgot."""


@dataclass(frozen=True)
class ErasedBoxes:
    """What became of a request."""

    norms: Mapping[str, float]
    """Of each block's part of the adapter, after the sparse phase or, without one, at the end."""
    steps: int
    figures: Mapping[str, float]
    """AP on the training images at the end, in points."""


def check_erase_boxes(config: EraseBoxesConfig, name: str = "erase") -> None:
    """Refuse settings that contradict each other."""
    check_adapter(config.rank, config.scale, config.blocks if config.select_epochs > 0 else 1, name)
    check_objective(config.objective, name)
    check_training(config.train, name)
    check_counts({key: vars(config)[key] for key in ("select_epochs", "least_steps", "snap", "floor")}, name)
    check_counts({key: vars(config.objective)[key] for key in ("hold", "fit")}, f"{name}.objective")
    _check_leak(config.objective.leak, f"{name}.objective.leak")


def _check_leak(leak: BoxLeakConfig, name: str) -> None:
    check_counts({key: vars(leak)[key] for key in ("knn", "probe", "ridge")}, name)
    if leak.temperature <= 0:
        raise ConfigError(f"{name}.temperature: expected above 0, found {leak.temperature}.")
    for key in ("bound_knn", "bound_probe"):
        if not 0 <= vars(leak)[key] < 1:
            raise ConfigError(f"{name}.{key}: expected a share of at least 0 and below 1, found {vars(leak)[key]}.")


def erase_boxes(
    detector: Detector, material: BoxMaterial, name: str, earlier: Sequence[str], config: EraseBoxesConfig, job: Job
) -> ErasedBoxes:
    """Train the adapter `name` on top of earlier ones; the base and they stay as they are.

    The run's files go below `job.folder`; a stopped run goes on there.

    Raises: GateError: more of the kept classes' AP was lost than `floor` allows, or every block was snapped to zero.
            The detector answers as before.
            DataError: nothing to forget or to retain.
    """
    for what, boxes in (("forget", material.forget), ("retain", material.retain)):
        if not len(boxes):
            raise DataError(f"adapter {name}: there is no image to {what}: none shows a box of such a class.")
    activate(detector.network, list(earlier))
    blocks = ffn_blocks(detector.network)
    kept, held = _before(detector, material, hold=config.objective.hold > 0)
    task = _Task(detector, material, name, tuple(earlier), blocks, config, kept, held)
    outcome = _widening(task, job)
    lost = outcome.figures["lost"]
    if not outcome.norms or not lost <= config.floor:
        drop(detector.network, name)
        reason = (
            f"{lost:.1f} points of AP of kept classes on training images would be lost, the floor is {config.floor:g}. "
            "Give more retained images, let more blocks change (erase.blocks), lower erase.train.optim.lr, or raise "
            "erase.floor if that is acceptable."
            if outcome.norms
            else "nothing is left: every block ended below erase.snap. Lower erase.objective.alpha or erase.snap."
        )
        raise GateError(f"adapter {name}: {reason}")
    activate(detector.network, [*earlier, name])
    return outcome


@dataclass(frozen=True)
class _Task:
    """What stays the same within a request."""

    detector: Detector
    material: BoxMaterial
    name: str
    earlier: tuple[str, ...]
    blocks: Sequence[Block]
    config: EraseBoxesConfig
    kept_before: float
    held: Held | None
    """Of all images to retain, on the CPU."""

    def groups(self) -> dict[str, list[Tensor]]:
        """Give the adapter's matrices block by block, blocks without any left out."""
        own = pairs(self.detector.network, self.name)
        parts: dict[str, list[Tensor]] = {
            b.name: [m for layer in b.linears if layer in own for m in own[layer]] for b in self.blocks
        }
        return {name: matrices for name, matrices in parts.items() if matrices}

    def norms(self) -> dict[str, float]:
        """Give each block's norm."""
        groups = self.groups()
        return dict(zip(groups, group_norms(list(groups.values())).tolist(), strict=True))

    def batches(self, epochs: int, job: Job) -> PairBatches:
        """Order the images."""
        num_retain, num_forget = len(self.material.retain), len(self.material.forget)
        return PairBatches(num_retain, num_forget, self.config.train.batch_size, epochs, job.seed, job.rank, job.world)

    def figures(self) -> dict[str, float]:
        """Measure on the training images, in points of AP."""
        kept = _found(self.detector, self.material.retain)
        gone = _found(self.detector, self.material.forget)
        return {"forget_ap": gone, "retain_ap": kept, "lost": self.kept_before - kept}

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure, and say when it is enough."""
        figures = self.figures()
        return {**figures, "steps": float(step), ENOUGH: float(self.config.early and _done(figures, STOP_LOSS))}


def _before(detector: Detector, material: BoxMaterial, *, hold: bool) -> tuple[float, Held | None]:
    """Look at the images to retain once: give their AP in points, and the answers to be held if they are to be.

    Names forgotten now or before are struck out of these.
    """
    gone, softmax = {*material.forget.counts, *material.old}, is_softmax(detector.network)
    found: list[Boxes] = []
    parts: list[Held] = []
    for _, seen in detector.looks(material.retain):
        found += detector.read(seen)
        parts += [held_answers(seen, gone, softmax=softmax)] if hold else []
    held = Held(*(torch.cat([part[i].cpu() for part in parts]) for i in range(2))) if hold else None
    return _precision(found, material.retain), held


def _found(detector: Detector, boxes: BoxSet) -> float:
    """Return the AP of the classes a set shows, in points."""
    return _precision(detector.find(boxes), boxes)


def _precision(found: Sequence[Boxes], boxes: BoxSet) -> float:
    return 100.0 * (average_precision(found, present(boxes.targets), sorted(boxes.counts)) or 0.0)


def _done(figures: Mapping[str, float], allowed: float) -> bool:
    """Say whether the classes are gone and the others are not."""
    return figures["forget_ap"] < GONE and figures["lost"] <= allowed


def _widening(task: _Task, job: Job) -> ErasedBoxes:
    """Erase in few blocks; where those do not suffice, begin again with twice as many, up to all of them."""
    kept, steps = (task.config.blocks if task.config.select_epochs else len(task.blocks)), 0
    while True:
        kept = min(kept, len(task.blocks))
        attempt = replace(job, folder=job.folder / f"blocks-{kept}")
        outcome = _attempt(replace(task, config=replace(task.config, blocks=kept)), attempt)
        steps += outcome.steps
        if _done(outcome.figures, ALLOWED_LOSS) or kept == len(task.blocks) or not task.config.early:
            return replace(outcome, steps=steps)
        drop(task.detector.network, task.name)
        kept *= 2


def _attempt(task: _Task, job: Job) -> ErasedBoxes:
    """Train a new adapter: sparse phase, pruning, the rest, exact zeros."""
    network, config = task.detector.network, task.config
    linears = [layer for block in task.blocks for layer in block.linears]
    inject(network, task.name, linears, rank=config.rank, alpha=config.scale)
    gain = REINITIAL_GAIN if config.restart_gain and task.material.number else 1.0
    initialise(network, task.name, seed=stage_seed(job.seed, "adapter", task.name), gain=gain)
    activate(network, [*task.earlier, task.name], trainable=task.name)
    norms: dict[str, float] = {}
    if config.select_epochs and config.blocks < len(task.blocks):
        _train(task, config.select_epochs, replace(job, folder=job.folder / "select"), watch=False)
        norms = task.norms()
        kept = sorted(norms, key=lambda name: -norms[name])[: config.blocks]
        gone = [layer for block in task.blocks if block.name not in kept for layer in block.linears]
        prune(network, task.name, gone)
    epochs = epochs_of(config.train, config.least_steps, task.batches(1, job).epoch_steps)
    figures, steps = _train(task, epochs, replace(job, folder=job.folder / "train"), watch=True)
    if snap(list(task.groups().values()), config.snap):
        idle = [layer for layer, pair in pairs(network, task.name).items() if not all(bool(m.any()) for m in pair)]
        prune(network, task.name, idle)
        figures = task.figures()
    return ErasedBoxes(norms if norms and task.groups() else task.norms(), steps, figures)


def _train(task: _Task, epochs: int, job: Job, *, watch: bool) -> tuple[dict[str, float], int]:
    """Train what is left of the adapter; return the figures on the training images, and the steps taken."""
    config, detector, material = task.config, task.detector, task.material
    batches = task.batches(epochs, job)
    groups = list(task.groups().values())

    def loss_fn(batch: Pair, step: int) -> Loss:
        retain = detector.batch(material.retain, batch.retain.tolist())
        forget = detector.batch(material.forget, batch.forget.tolist())
        held = None
        if task.held is not None:
            held = Held(*(part[batch.retain].to(detector.device) for part in task.held))
        terms = detection_forget_step(detector.network, retain, forget, structure(groups), config.objective, held)
        shown = {name: (value, 1.0) for name, value in terms._asdict().items() if name != "total"}
        return Loss(terms.total, 1.0, shown, len(batch.retain) + len(batch.forget))

    job.folder.mkdir(parents=True, exist_ok=True)
    settings = replace(config.train, eval_every=batches.epoch_steps if config.early else 0)
    evaluate = task.evaluate if watch else None
    report = train(detector.network, batches, loss_fn, evaluate, settings, job)
    figures = {key: float(value) for key, value in report.results.items()}
    return figures, int(figures.get("steps", len(batches)))
