"""What a request would mean, before anything is trained: overlap, risk to neighbours, few or no images, cost.

Letters: N images, M and L images of two classes, D width of features, K classes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from postgrad.core.sections import Cell, Note, Section, Table
from postgrad.errors import DataError
from postgrad.forgetting.request import ForgetRequest, Labelled, Overlap, Targets, locate, overlaps

NUM_NEIGHBOURS = 3
"""Retained classes listed for each class to forget."""
RISK_HIGH = 0.1
"""From this share of confusion on, a neighbour is pointed out."""


class Cost(NamedTuple):
    """What training would take."""

    image_steps: int
    """Images seen in training, forgotten and retained, over all steps."""
    seconds_each: float
    """Time of one image in one step, measured on this machine."""


class Neighbour(NamedTuple):
    """A retained class near a forgotten one."""

    name: str
    cosine: float
    """Of the class means about the mean of all class means."""
    confusion: float
    """`confusion` of the two; NaN where either has fewer than two images."""


@dataclass(frozen=True)
class Group:
    """Images to forget that have one label."""

    name: str
    num_images: int
    num_used: int
    whole: bool
    """All of the class is to go, not only some of its images."""
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Plan:
    """What is known before training."""

    request: str
    groups: tuple[Group, ...]
    num_retain: int
    num_retain_used: int
    num_retained_classes: int
    overlap: tuple[Overlap, ...]
    missing: tuple[str, ...]
    """Retained classes without an image: nothing holds them."""
    few: tuple[tuple[str, int], ...]
    """Classes with fewer images than the policy asks for, with their number."""
    num_twins: int
    """Images to forget that stand among the retained too, bit for bit."""
    cost: Cost

    @property
    def warnings(self) -> tuple[tuple[str, str], ...]:
        """Name what speaks against going on, title and sentence."""
        return tuple(_warnings(self))


def plan_request(
    request: ForgetRequest,
    images: Labelled,
    features: Float[Tensor, "N D"],
    earlier: Iterable[ForgetRequest] = (),
    *,
    few_shot_min: int,
    cost: Cost,
) -> Plan:
    """Say what a request would mean.

    Args:    features: of the model as it is, one row an image.  earlier: requests in use.  few_shot_min: fewest images
             of a class that the policy allows.
    Raises:  DataError: the request cannot be found in the data; overlap is listed, not refused.
    """
    if len(features) != len(images.hashes):
        raise DataError(f"plan: expected features of {len(images.hashes)} images, found {len(features)}.")
    earlier = tuple(earlier)
    targets = locate(request, images, earlier)
    labels = images.labels.tolist()
    forget, retain = _by_label(labels, targets.forget), _by_label(labels, targets.retain)
    used = {label: _used(len(rows), request.shots) for label, rows in retain.items()}
    groups = tuple(_group(request, images.classes, label, forget, retain, features.double()) for label in forget)
    counts = [(group.name, group.num_used) for group in groups] + [(images.classes[k], num) for k, num in used.items()]
    twins = {images.hashes[i] for i in targets.forget} & {images.hashes[i] for i in targets.retain}
    return Plan(
        request=request.id,
        groups=groups,
        num_retain=len(targets.retain),
        num_retain_used=sum(used.values()),
        num_retained_classes=len(targets.retained),
        overlap=tuple(overlaps(request, images, earlier)),
        missing=_missing(targets, images.classes, retain),
        few=tuple((name, num) for name, num in counts if num < few_shot_min),
        num_twins=len(twins),
        cost=cost,
    )


def confusion(a: Float[Tensor, "M D"], b: Float[Tensor, "L D"]) -> float:
    """Estimate how often two classes are taken for each other: 0.5 = they cannot be told apart.

    Both are seen as normal along the line that joins their means; between them stands the threshold at which both err
    alike, a share Phi(-d / (s_a + s_b)) with d the distance of means and s the deviations on that line. Of a few images
    the line is fitted, too, and the figure comes out too low. NaN with fewer than two images of either.
    """
    if min(len(a), len(b)) < 2:
        return math.nan
    line = a.double().mean(0) - b.double().mean(0)  # [D]
    distance = float(line.norm())
    if distance == 0:
        return 0.5
    spread = sum(float((each.double() @ (line / distance)).std()) for each in (a, b))
    return NormalDist().cdf(-distance / spread) if spread else 0.0


def plan_sections(plan: Plan) -> tuple[Section, ...]:
    """Show a plan: warnings first, then what is forgotten, its neighbours and the cost."""
    notes = [Note(title, text, "warning") for title, text in plan.warnings]
    if not notes:
        notes = [Note("Nothing speaks against it", "No overlap, no near neighbour, images of every class.", "good")]
    forgotten: list[tuple[Cell, ...]] = [
        (group.name, "the class" if group.whole else "some images", group.num_images, group.num_used)
        for group in plan.groups
    ]
    near: list[tuple[Cell, ...]] = [
        (group.name, neighbour.name, neighbour.cosine, 100 * neighbour.confusion)
        for group in plan.groups
        for neighbour in group.neighbours
    ]
    return (
        *notes,
        Table("What is forgotten", ("class", "what", "images", "used"), tuple(forgotten)),
        Table(
            "Nearest retained classes",
            ("to forget", "neighbour", "cosine", "confusion, %"),
            tuple(near),
            note="Cosine of class means about the mean of all. Confusion: estimated from the model as it is, along the "
            "line between the two means; 50 % cannot be told apart. It points out risk and predicts no accuracy.",
        ),
        Table("Cost", ("", "expected"), _cost_rows(plan)),
    )


def _cost_rows(plan: Plan) -> tuple[tuple[Cell, ...], ...]:
    seconds = plan.cost.image_steps * plan.cost.seconds_each
    return (
        ("retained images", plan.num_retain),
        ("of these used", plan.num_retain_used),
        ("retained classes", plan.num_retained_classes),
        ("image-steps of training", plan.cost.image_steps),
        ("training time, s", seconds),
    )


def _warnings(plan: Plan) -> Iterable[tuple[str, str]]:
    if plan.overlap:
        listed = "; ".join(f"{each.what} (request '{each.request}')" for each in plan.overlap[:NUM_NEIGHBOURS])
        more = f"; {len(plan.overlap) - NUM_NEIGHBOURS} more" if len(plan.overlap) > NUM_NEIGHBOURS else ""
        yield "Forgotten before", f"{listed}{more}. The request will be refused."
    # of some images of a class the others are near by nature
    risky = [(g.name, n) for g in plan.groups for n in g.neighbours if n.confusion >= RISK_HIGH and n.name != g.name]
    if risky:
        pairs = ", ".join(f"'{name}' and '{n.name}' ({100 * n.confusion:.0f} %)" for name, n in risky)
        yield "Near neighbours", f"Easily confused: {pairs}. Look at these classes' accuracy afterwards."
    if plan.missing:
        names = ", ".join(f"'{name}'" for name in plan.missing)
        yield "Retained without data", f"No image of {names}: nothing holds these classes, and their accuracy may fall."
    if plan.few:
        names = ", ".join(f"'{name}' ({num})" for name, num in plan.few)
        yield "Few images", f"Fewer than the policy asks for: {names}."
    if plan.num_twins:
        text = f"{plan.num_twins} images to forget stand among the retained too, under another label."
        yield (
            "The same image on both sides",
            f"{text} Training would pull both ways; remove them or name them as samples.",
        )


def _group(
    request: ForgetRequest,
    classes: Sequence[str],
    label: int,
    forget: dict[int, list[int]],
    retain: dict[int, list[int]],
    features: Float64[Tensor, "N D"],
) -> Group:
    """Describe the images of one label and rank the retained classes by nearness."""
    rows = forget[label]
    means = {other: features[places].mean(0) for other, places in retain.items()}
    own = features[rows].mean(0)  # [D]
    centre = torch.stack([own, *means.values()]).mean(0)  # [D]
    found = [
        Neighbour(classes[other], _cosine(own - centre, mean - centre), confusion(features[rows], features[places]))
        for (other, mean), places in zip(means.items(), retain.values(), strict=True)
    ]
    nearest = tuple(sorted(found, key=lambda each: -each.cosine)[:NUM_NEIGHBOURS])
    used = _used(len(rows), request.shots)
    return Group(classes[label], len(rows), used, classes[label] in request.classes, nearest)


def _cosine(a: Float64[Tensor, " D"], b: Float64[Tensor, " D"]) -> float:
    """Give the cosine; 0 where either is zero."""
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0, eps=1e-30))


def _by_label(labels: Sequence[int], rows: Iterable[int]) -> dict[int, list[int]]:
    """Sort places by their label."""
    found: dict[int, list[int]] = {}
    for row in rows:
        found.setdefault(labels[row], []).append(row)
    return dict(sorted(found.items()))


def _used(num: int, shots: int) -> int:
    return min(num, shots) if shots else num


def _missing(targets: Targets, classes: Sequence[str], retain: dict[int, list[int]]) -> tuple[str, ...]:
    return tuple(classes[label] for label in targets.retained if label not in retain)
