"""Class orders, task splits, schedules and settings of the published runs.

Source: GS-LoRA (arXiv 2403.11530), GS-LoRA++ (arXiv 2501.09705): the released code and scripts.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from postgrad.errors import ConfigError
from postgrad.forgetting.losses import ObjectiveConfig

AlphaKind = Literal["paper-single", "paper-continual", "warmup", "constant"]

COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
"""The ids of COCO's 80 categories, which leave ten numbers out."""


@dataclass(frozen=True)
class TaskSplit:
    """What becomes of the classes in one request."""

    remain: tuple[int, ...]
    """Classes to keep, those without data among them."""
    forget: tuple[int, ...]
    """Classes to forget now."""
    old: tuple[int, ...] = ()
    """Classes forgotten before."""
    missing: tuple[int, ...] = ()
    """Classes to keep of which there is no data to train on."""

    @property
    def replayed(self) -> tuple[int, ...]:
        """Classes to keep of which there is data."""
        return tuple(c for c in self.remain if c not in self.missing)


def class_order(num_classes: int = 100, seed: int = 1337) -> tuple[int, ...]:
    """Shuffle the classes as Python's random does: faces and ImageNet100."""
    order = list(range(num_classes))
    random.Random(seed).shuffle(order)
    return tuple(order)


def coco_class_order(seed: int = 123) -> tuple[int, ...]:
    """Shuffle COCO's category ids as NumPy's legacy generator does."""
    order = list(COCO_IDS)
    np.random.RandomState(seed).shuffle(order)
    return tuple(order)


def task_splits(order: Sequence[int], first: int, per: int, num: int, num_missing: int = 0) -> tuple[TaskSplit, ...]:
    """Split classes into requests, one after the other from the end of the order.

    Request t keeps order[: first - per * t], forgets the next `per`, and has forgotten the rest before. So
    first = 80, per = 20, num = 4 of 100 classes are the paper's "4x20".

    Args:   first: classes kept by the first request.   num_missing: how many of the order's first have no data.
    Raises: ConfigError: the classes do not suffice.
    """
    last = first - per * (num - 1)
    if per < 1 or num < 1 or num_missing < 0 or first + per > len(order) or last <= num_missing:
        raise ConfigError(
            f"{num} requests of {per} classes with {first} kept by the first need {first + per} classes, and more than "
            f"the {num_missing} missing ones kept by the last; found {len(order)} classes, of which the last keeps "
            f"{last}. Lower first, per or num"
        )
    edges = [first - per * t for t in range(num)]
    missing = tuple(order[:num_missing])
    return tuple(
        TaskSplit(tuple(order[:edge]), tuple(order[edge : edge + per]), tuple(order[edge + per :]), missing)
        for edge in edges
    )


def single_split(order: Sequence[int], num_forget: int, num_missing: int = 0) -> TaskSplit:
    """Forget the last classes of an order in one request: 100-Y in the paper."""
    return task_splits(order, len(order) - num_forget, num_forget, 1, num_missing)[0]


def alpha_schedule(kind: AlphaKind, start: int | None = None, value: float | None = None) -> Callable[[int], float]:
    """Return alpha, the weight of the group norms, as a function of the epoch.

    "warmup" is 0 before the epoch `start`, then `value`; "constant" is `value` from the first epoch. "paper-single" is
    a warmup with start 20 and value 0.01, "paper-continual" a constant 1e-4, unless told otherwise.

    Raises: ConfigError: start or value is needed, or start has no meaning.
    Differs: the paper describes the warmup for all runs; the released continual scripts have none.
    """
    constant = kind in ("constant", "paper-continual")
    if constant and start is not None:
        raise ConfigError(f"the alpha schedule {kind!r} has no start, found {start}; leave it out or choose 'warmup'")
    first = 0 if constant else 20 if start is None and kind == "paper-single" else start
    final = {"paper-single": 0.01, "paper-continual": 1e-4}.get(kind) if value is None else value
    if first is None or final is None:
        raise ConfigError(f"the alpha schedule {kind!r} needs a value{'' if constant else ' and a start'}; set both")
    return _step_at(first, final)


def paper_lr(epoch: int, epochs: int = 100, lr: float = 1e-2, min_lr: float = 1e-5) -> float:
    """Return the learning rate of an epoch, counted from 0.

    min_lr + (lr - min_lr) * (1 + cos(pi * epoch / epochs)) / 2, which stops one epoch short of min_lr.
    """
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs))


def retrain_lr(
    epoch: int,
    epochs: int = 100,
    lr: float = 3e-4,
    min_lr: float = 1e-5,
    *,
    warmup: int = 5,
    warmup_lr: float = 1e-6,
) -> float:
    """Return the learning rate of an epoch of retraining from nothing.

    It rises from warmup_lr in equal parts over `warmup` epochs, then joins the cosine where that has got to by then.
    """
    if epoch < warmup:
        return warmup_lr + epoch * (lr - warmup_lr) / warmup
    return paper_lr(epoch, epochs, lr, min_lr)


def lora_gain(task: int) -> float:
    """Return g of a request's first A ~ U(+-g / sqrt(fan_in)): 1 in the first, sqrt(6 / 51) in later ones.

    Source: Kaiming's uniform with a = sqrt(5), and a = sqrt(50) when the released code draws A anew.
    """
    return 1.0 if task == 0 else math.sqrt(6 / 51)


def _step_at(start: int, value: float) -> Callable[[int], float]:
    """0 before an epoch, then a value."""

    def alpha(epoch: int) -> float:
        return value if epoch >= start else 0.0

    return alpha


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of a published run."""

    model: str
    source: str
    """Where they are written."""
    bound: float
    beta: tuple[float, ...]
    """One a request, tuned by hand; a single one serves all."""
    weight_forget: tuple[float, ...]
    """w_f of GS-LoRA++, one a request or one for all; GS-LoRA has 0."""
    alpha: float
    alpha_start: int = 0
    """First epoch with the structure term."""
    weight_retain: float = 0.0
    bound_prototype: float = 18.0
    share: float | None = None
    """Share of the data at hand, or None where `shots` images of a class are."""
    shots: int | None = None
    batch: int = 48
    """Retained and forgotten images of a step, each."""
    epochs: int = 100
    lr: float = 1e-2
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    clip: float = 0.0
    """Largest gradient norm; 0 = no cut."""
    rank: int = 8
    lora_alpha: int = 1
    num_missing: int = 0
    """Retained classes without data."""

    def objective(self, task: int = 0) -> ObjectiveConfig:
        """Return the objective of a request, as it is once the structure term has begun."""
        return ObjectiveConfig(
            beta=_of_task(self.beta, task),
            bound=self.bound,
            alpha=self.alpha,
            weight_forget=_of_task(self.weight_forget, task),
            weight_retain=self.weight_retain,
            bound_prototype=self.bound_prototype,
        )


def _of_task(values: tuple[float, ...], task: int) -> float:
    """A request's own value, or the one for all."""
    if len(values) > 1 and task >= len(values):
        raise ConfigError(
            f"the published run has {len(values)} requests, found request {task + 1}; take another preset"
        )
    return values[task] if len(values) > 1 else values[0]


_FACE = "Face Transformer P8S8, CosFace"
_SCRIPTS = "scripts of bjzhb666/GS-LoRA"

PRESETS = MappingProxyType(
    {
        "single-face": Preset(
            model=_FACE,
            source=f"{_SCRIPTS}, single-step",
            bound=110.0,
            beta=(0.05,),
            alpha=0.01,
            alpha_start=20,
            weight_forget=(0.005,),
            share=0.1,
        ),
        "single-face-4shot": Preset(
            model=_FACE,
            source=f"{_SCRIPTS}, v1, single-step few-shot",
            bound=110.0,
            beta=(0.15,),
            alpha=0.01,
            alpha_start=20,
            weight_forget=(0.02,),
            shots=4,
            batch=4,
        ),
        "single-face-2shot": Preset(
            model=_FACE,
            source=f"{_SCRIPTS}, v2, single-step few-shot",
            bound=110.0,
            beta=(0.15,),
            alpha=0.01,
            alpha_start=20,
            weight_forget=(0.5,),
            shots=2,
            batch=4,
        ),
        "single-face-12": Preset(
            model=f"{_FACE}, 12 blocks",
            source=f"{_SCRIPTS}, single-step 12 blocks",
            bound=110.0,
            beta=(0.03,),
            alpha=0.01,
            alpha_start=20,
            weight_forget=(0.001,),
            weight_retain=0.001,
            share=0.1,
        ),
        "continual-face": Preset(
            model=_FACE,
            source=f"{_SCRIPTS}, continual 4x20",
            bound=105.0,
            beta=(0.2, 0.25, 0.25, 0.2),
            alpha=1e-4,
            weight_forget=(0.01,),
            share=0.1,
        ),
        "continual-face-4shot": Preset(
            model=_FACE,
            source=f"{_SCRIPTS}, continual few-shot",
            bound=105.0,
            beta=(0.3, 0.4, 0.28, 0.2),
            alpha=1e-4,
            weight_forget=(0.015, 0.06, 0.025, 0.012),
            bound_prototype=50.0,
            shots=4,
            batch=4,
        ),
        "continual-imagenet100": Preset(
            model="ViT-B/16, head cut to 100 rows",
            source=f"{_SCRIPTS}, continual ImageNet100",
            bound=105.0,
            beta=(0.2, 0.25, 0.25, 0.25),
            alpha=1e-4,
            weight_forget=(0.05,),
            share=0.05,
        ),
        "continual-face-missing": Preset(
            model=_FACE,
            source=f"{_SCRIPTS}, continual missing-class",
            bound=105.0,
            beta=(0.14, 0.14, 0.2, 0.15),
            alpha=0.015,
            alpha_start=30,
            weight_forget=(3e-4,),
            share=0.1,
            num_missing=5,
        ),
        "continual-detector": Preset(
            model="Deformable DETR, ResNet-50",
            source=f"{_SCRIPTS}, branch object-det, 7x10",
            bound=15.0,
            beta=(0.15, 0.15, 0.35, 0.6, 0.15, 0.2, 0.2),
            alpha=3e-4,
            weight_forget=(0.005,),
            shots=32,
            batch=32,
            epochs=30,
            lr=3e-4,
            weight_decay=1e-4,
            clip=0.1,
        ),
    }
)
"""Published runs by name. EMA copies, which feed nothing that is reported, are left out."""
