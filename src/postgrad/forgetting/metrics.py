"""Accuracies of kept, forgotten and earlier forgotten classes, what they lost, and the distance to a gold model.

All accuracies are in percent, top-1 over all classes of the head.

Letters: N images, K classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from postgrad.core.metrics import Interval, wilson_interval
from postgrad.errors import DataError
from postgrad.forgetting.schedules import TaskSplit


@dataclass(frozen=True)
class ClassDrop:
    """What one class lost."""

    label: int
    before: float
    after: float

    @property
    def drop(self) -> float:
        """Points lost."""
        return drop(self.before, self.after)


@dataclass(frozen=True)
class GoldGap:
    """Distance to a model that never saw the forgotten classes."""

    gaps: Mapping[str, float]
    """Points between ours and gold, without sign, by accuracy."""
    tow: float
    """Tug of war, prod(1 - gap / 100): 1 where nothing differs."""
    mean: float
    """Mean of the gaps."""


@dataclass(frozen=True)
class AccTable:
    """Accuracies after a request, and of the same classes before it."""

    acc_r: Interval
    """Kept classes, those without training data among them."""
    acc_f: Interval
    """Classes forgotten now."""
    acc_o: Interval | None
    """Classes forgotten by earlier requests; None in the first."""
    acc_m: Interval | None
    """Kept classes without training data; None without such."""
    acc_r_pretrained: float
    acc_f_pretrained: float
    acc_r_start: float
    acc_f_start: float

    @property
    def drop(self) -> float:
        """Points the forgotten classes lost since the pretrained model."""
        return drop(self.acc_f_pretrained, self.acc_f.value)

    @property
    def drop_start(self) -> float:
        """Points the forgotten classes lost since this request began."""
        return drop(self.acc_f_start, self.acc_f.value)

    @property
    def h(self) -> float:
        """H-mean with the drop since the pretrained model, as in the paper's tables."""
        return h_mean(self.acc_r.value, self.drop)

    @property
    def h_start(self) -> float:
        """H-mean with the drop since this request began, as in the paper's code."""
        return h_mean(self.acc_r.value, self.drop_start)

    def row(self) -> dict[str, float]:
        """Return every number by name, intervals as _low and _high; what there is none of is left out."""
        intervals = {"acc_r": self.acc_r, "acc_f": self.acc_f, "acc_o": self.acc_o, "acc_m": self.acc_m}
        found: dict[str, float] = {}
        for name, interval in intervals.items():
            if interval is not None:
                found |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
        return found | {
            "acc_r_pretrained": self.acc_r_pretrained,
            "acc_f_pretrained": self.acc_f_pretrained,
            "acc_r_start": self.acc_r_start,
            "acc_f_start": self.acc_f_start,
            "drop": self.drop,
            "drop_start": self.drop_start,
            "h": self.h,
            "h_start": self.h_start,
        }


def h_mean(acc_r: float, drop: float, engine: Literal["single", "continual"] = "single") -> float:
    """Return the harmonic mean of what is kept and what was forgotten, 2 acc_r drop / (acc_r + drop).

    A negative drop, which is no forgetting at all, gives no meaningful mean; it is returned as the formula has it.

    Args:    engine: the released continual code adds 1e-8 to the denominator, the single-step code does not.
    Returns: 0 where the denominator is 0. Differs: the released single-step code fails there.
    """
    denominator = acc_r + drop + (1e-8 if engine == "continual" else 0.0)
    return 2 * acc_r * drop / denominator if denominator else 0.0


def drop(before: float, after: float) -> float:
    """Return the points lost; negative where some were won."""
    return before - after


def accuracy(predicted: Int[Tensor, " N"], labels: Int[Tensor, " N"], confidence: float = 0.95) -> Interval:
    """Return the percentage predicted right, with Wilson's interval.

    Raises: DataError: there is no image.
    """
    if not len(labels):
        raise DataError("an accuracy needs at least one image, found none; see that every class has test images")
    share = wilson_interval(int((predicted == labels).sum()), len(labels), confidence)
    return Interval(100 * share.value, 100 * share.low, 100 * share.high)


def class_accuracy(predicted: Int[Tensor, " N"], labels: Int[Tensor, " N"], num_classes: int) -> Float64[Tensor, " K"]:
    """Return each class's accuracy; NaN for a class without images."""
    right = torch.bincount(labels[predicted == labels], minlength=num_classes)
    return 100 * right.double() / torch.bincount(labels, minlength=num_classes)


def worst_drops(
    before: Float64[Tensor, " K"], after: Float64[Tensor, " K"], classes: Sequence[int], num: int = 5
) -> list[ClassDrop]:
    """Return the classes that lost most, the worst first and equals by label; classes without images are passed by.

    Args: before, after: `class_accuracy`.   classes: whose to look at, the kept ones.
    """
    found = [ClassDrop(c, float(before[c]), float(after[c])) for c in classes]
    known = [one for one in found if not math.isnan(one.drop)]
    return sorted(known, key=lambda one: (-one.drop, one.label))[:num]


def gold_gap(ours: Mapping[str, float], gold: Mapping[str, float]) -> GoldGap:
    """Compare accuracies with those of a model retrained without the forgotten classes.

    Args:   ours, gold: accuracies by the same names, such as forget, retain, test.
    Raises: DataError: the names differ, or there are none.
    Source: tug of war of Zhao et al. 2024 (arXiv 2406.01257); mean gap of Fan et al. 2024 (arXiv 2310.12508).
    """
    if ours.keys() != gold.keys() or not ours:
        raise DataError(
            f"expected the same accuracies of both models, found {sorted(ours)} and {sorted(gold)}; measure both alike"
        )
    gaps = {name: abs(value - gold[name]) for name, value in ours.items()}
    tow = 1.0
    for gap in gaps.values():
        tow *= 1 - gap / 100
    return GoldGap(gaps, tow, sum(gaps.values()) / len(gaps))


def acc_table(
    labels: Int[Tensor, " N"],
    predicted: Int[Tensor, " N"],
    split: TaskSplit,
    *,
    pretrained: Int[Tensor, " N"],
    start: Int[Tensor, " N"],
) -> AccTable:
    """Measure a request.

    Args: labels: of test images of all classes.   predicted: by the model after the request.   pretrained, start: by
          the pretrained model and by the model as the request found it.
    """
    kept, gone = _among(labels, split.remain), _among(labels, split.forget)
    old, missing = (_among(labels, classes) if classes else None for classes in (split.old, split.missing))
    return AccTable(
        acc_r=accuracy(predicted[kept], labels[kept]),
        acc_f=accuracy(predicted[gone], labels[gone]),
        acc_o=None if old is None else accuracy(predicted[old], labels[old]),
        acc_m=None if missing is None else accuracy(predicted[missing], labels[missing]),
        acc_r_pretrained=accuracy(pretrained[kept], labels[kept]).value,
        acc_f_pretrained=accuracy(pretrained[gone], labels[gone]).value,
        acc_r_start=accuracy(start[kept], labels[kept]).value,
        acc_f_start=accuracy(start[gone], labels[gone]).value,
    )


def _among(labels: Int[Tensor, " N"], classes: Sequence[int]) -> Bool[Tensor, " N"]:
    """Say which images are of some classes."""
    return torch.isin(labels, torch.tensor(list(classes), dtype=labels.dtype, device=labels.device))
