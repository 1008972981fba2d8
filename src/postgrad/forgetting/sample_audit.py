"""Audit a request for single images: are they still treated otherwise than images that were never seen?

Their own accuracy is set beside gold's, the model trained without them, or beside that of unseen images of their
classes: it need not be 0. A membership attack by the log odds of the true class, which orders images as the loss does,
tells them from unseen images of their classes.

Letters: T test images, F images to forget, U unseen images of their classes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from postgrad.core.metrics import Interval
from postgrad.core.vision import ImageSet
from postgrad.errors import DataError
from postgrad.forgetting.leakage import Pass, excess
from postgrad.forgetting.leakage_audit import Views
from postgrad.forgetting.membership import Sides, auc_difference, auc_interval
from postgrad.forgetting.metrics import accuracy
from postgrad.forgetting.schedules import TaskSplit
from postgrad.forgetting.unseen import halves, log_odds


@dataclass(frozen=True)
class Scope:
    """What a request is about, in the images of a run."""

    split: TaskSplit
    """Classes it forgets, none for single images, those it keeps and those forgotten before."""
    rows: tuple[int, ...] = ()
    """Training images that it forgets one by one; none = whole classes."""
    gone: tuple[int, ...] = ()
    """Training images that requests before it have forgotten one by one."""
    unseen: tuple[int, ...] = ()
    """Test images of the classes of single ones, to measure with."""


@dataclass(frozen=True)
class SampleAudit:
    """What a model makes of single images after it was to forget them. None means no gold reference."""

    name: str
    acc_f: Interval
    """Of the images to forget."""
    acc_h: Interval
    """Of all test images of their classes."""
    acc_r: Interval
    """Of the test images of all classes that are kept, theirs among them."""
    acc_o: Interval | None
    """Of classes that earlier requests forgot; None without any."""
    membership: Interval
    """Area under the curve of images to forget against unseen ones; best gold's, else 0.5."""
    acc_excess: Interval
    """Points of acc_f above gold's or, without gold, above acc_h."""
    mia_excess: Interval
    """Area above gold's or, without gold, above 0.5."""
    acc_f_gold: float | None
    mia_gold: float | None
    acc_f_pretrained: float
    acc_h_pretrained: float
    acc_r_pretrained: float
    mia_pretrained: float

    def figures(self) -> dict[str, float]:
        """Name every figure, intervals as _low and _high; what was not measured is left out."""
        ranges = {
            "acc_r": self.acc_r, "acc_f": self.acc_f, "acc_h": self.acc_h, "acc_o": self.acc_o,
            "acc_excess": self.acc_excess, "mia_auc": self.membership, "mia_excess": self.mia_excess,
        }  # fmt: skip
        found: dict[str, float | None] = {}
        for name, each in ranges.items():
            if each is not None:
                found |= {name: each.value, f"{name}_low": each.low, f"{name}_high": each.high}
        names = ("acc_f_gold", "mia_gold", "acc_f_pretrained", "acc_h_pretrained", "acc_r_pretrained", "mia_pretrained")
        found |= {name: vars(self)[name] for name in names}
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


Asked = tuple[str, Sequence[SampleAudit]]
"""A request, and the audits of base, gold (where there is one) and the model at hand, in this order."""


def rows_of(samples: Iterable[str], images: ImageSet) -> tuple[int, ...]:
    """Find images by the hashes of their content; several may have one."""
    wanted = set(samples)
    return tuple(row for row, each in enumerate(images.hashes) if each in wanted) if wanted else ()


def unseen_rows(test: ImageSet, classes: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Part the test images of some classes: places of those to take levels from, and of those to measure with.

    Where a half would be empty both are all of them.

    Raises:  DataError: there is no test image of these classes.
    """
    among = torch.isin(test.labels, test.labels.new_tensor(sorted(set(classes))))
    places = among.nonzero()[:, 0].cpu()
    if not len(places):
        raise DataError("Single images are compared with test images of their classes; expected some, found none.")
    even = halves(test.select(places))
    parts = tuple(tuple(places[half].tolist()) for half in (even, ~even))
    whole = tuple(places.tolist())
    return (parts[0], parts[1]) if parts[0] and parts[1] else (whole, whole)


def audit_samples(name: str, found: Views, base: Views, gold: Views | None, scope: Scope) -> SampleAudit:
    """Set what a model makes of single images beside the base and gold."""
    labels = found.test.labels
    own = found.train.labels[list(scope.rows)]
    groups = {
        "acc_r": torch.isin(labels, labels.new_tensor(scope.split.remain)),
        "acc_h": torch.isin(labels, own),
        "acc_o": torch.isin(labels, labels.new_tensor(scope.split.old)),
    }
    after, before = (
        {key: _accuracy(views.test, where) for key, where in groups.items() if bool(where.any())}
        for views in (found, base)
    )
    acc_f, acc_base = (_accuracy(_rows(views, scope), None) for views in (found, base))
    sides = [_sides(views, scope) for views in (found, base)]
    area = auc_interval(sides[0])
    named = None if gold is None else _named(_rows(gold, scope))
    apart = Interval(area.value - 0.5, area.low - 0.5, area.high - 0.5)
    return SampleAudit(
        name=name,
        acc_f=acc_f,
        acc_h=after["acc_h"],
        acc_r=after["acc_r"],
        acc_o=after.get("acc_o"),
        membership=area,
        acc_excess=excess(_named(_rows(found, scope)), named) or _difference(acc_f, after["acc_h"]),
        mia_excess=apart if gold is None else auc_difference(sides[0], _sides(gold, scope)),
        acc_f_gold=None if named is None else 100 * float(named.double().mean()),
        mia_gold=None if gold is None else auc_interval(_sides(gold, scope)).value,
        acc_f_pretrained=acc_base.value,
        acc_h_pretrained=before["acc_h"].value,
        acc_r_pretrained=before["acc_r"].value,
        mia_pretrained=auc_interval(sides[1]).value,
    )


def _rows(views: Views, scope: Scope) -> Pass:
    """Take what a model made of the images to forget."""
    rows = list(scope.rows)
    return Pass(views.train.features[rows], views.train.logits[rows], views.train.labels[rows])


def _named(seen: Pass) -> Bool[Tensor, " F"]:
    return seen.logits.argmax(1) == seen.labels


def _accuracy(seen: Pass, where: Bool[Tensor, " T"] | None) -> Interval:
    predicted: Int64[Tensor, " T"] = seen.logits.argmax(1)
    return accuracy(*((predicted, seen.labels) if where is None else (predicted[where], seen.labels[where])))


def _sides(views: Views, scope: Scope) -> Sides:
    """Score images to forget and unseen ones by the log odds of their class."""
    mine, rows = _rows(views, scope), list(scope.unseen)
    return Sides(
        log_odds(mine.logits.double(), mine.labels),
        log_odds(views.test.logits[rows].double(), views.test.labels[rows]),
    )


def _difference(one: Interval, other: Interval) -> Interval:
    """Subtract two independent shares, with Newcombe's interval."""
    value = one.value - other.value
    down = math.hypot(one.value - one.low, other.high - other.value)
    up = math.hypot(one.high - one.value, other.value - other.low)
    return Interval(value, max(-100.0, value - down), min(100.0, value + up))
