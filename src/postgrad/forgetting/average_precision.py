"""Average precision of detectors as COCO counts it, for the classes forgotten, kept, and forgotten earlier.

AP is the mean over classes, and over overlaps of 0.50, 0.55 ... 0.95, of the precision read at recalls 0, 0.01 ... 1,
each as the highest at that recall or a higher one. Within an image the surer detection chooses first, and takes the
free box of its class that it overlaps most.

Source:    the COCO detection challenge. Differs: no crowd regions and no sizes; at most 100 detections an image.

Letters: B images, Q queries, K classes, N detections or boxes, T boxes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

OVERLAPS = tuple((50 + 5 * i) / 100 for i in range(10))
RECALLS = tuple(i / 100 for i in range(101))
MAX_DETECTIONS = 100


class Boxes(NamedTuple):
    """The boxes on one image, by their corners (left, top, right, bottom): what is there, or what was found."""

    corners: Float[Tensor, "N 4"]
    labels: Int[Tensor, " N"]
    scores: Float[Tensor, " N"] | None = None
    """How sure each is; None for what is there."""


def corners(boxes: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N 4"]:
    """Turn (centre x, centre y, width, height) into (left, top, right, bottom)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def present(targets: Iterable[Mapping[str, Tensor]]) -> list[Boxes]:
    """Read the boxes of transformers' targets."""
    return [Boxes(corners(target["boxes"]), target["class_labels"]) for target in targets]


def detections(
    logits: Float[Tensor, "B Q K"], boxes: Float[Tensor, "B Q 4"], *, softmax: bool, limit: int = MAX_DETECTIONS
) -> list[Boxes]:
    """Read the surest detections of each image, surest first.

    Args: softmax: the last class is "no object", and a query names its best other one (DETR); otherwise every pair of
          query and class may be a detection (Deformable DETR).
    """
    if softmax:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)  # [B, Q]
        queries = torch.arange(logits.shape[1], device=logits.device).expand_as(labels)
    else:
        scores = logits.sigmoid().flatten(1)  # [B, Q K]
        pair = torch.arange(scores.shape[1], device=logits.device).expand_as(scores)
        queries, labels = pair // logits.shape[2], pair % logits.shape[2]
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :limit]
    found = corners(boxes.gather(1, queries.gather(1, best)[..., None].expand(-1, -1, 4)))
    rows = zip(found, labels.gather(1, best), scores.gather(1, best), strict=True)
    return [Boxes(box, label, score) for box, label, score in rows]


def average_precision(found: Sequence[Boxes], there: Sequence[Boxes], classes: Iterable[int]) -> float | None:
    """Return the mean AP of those of the classes that are there, from 0 to 1; None when none is."""
    each = [value for label in classes if (value := class_precision(found, there, label)) is not None]
    return sum(each) / len(each) if each else None


def split_precision(
    found: Sequence[Boxes], there: Sequence[Boxes], groups: Mapping[str, Sequence[int]]
) -> dict[str, float | None]:
    """Return the AP of groups of classes, each on the images that show one of its classes."""
    precisions: dict[str, float | None] = {}
    for name, classes in groups.items():
        wanted = torch.tensor(list(classes), dtype=torch.int64)
        shows = [i for i, boxes in enumerate(there) if bool(torch.isin(boxes.labels.cpu(), wanted).any())]
        precisions[name] = average_precision([found[i] for i in shows], [there[i] for i in shows], classes)
    return precisions


def class_precision(found: Sequence[Boxes], there: Sequence[Boxes], label: int) -> float | None:
    """Return the AP of one class; None when it is not there."""
    num = sum(int((boxes.labels == label).sum()) for boxes in there)
    if num == 0:
        return None
    scores: list[Tensor] = []
    hits: list[Tensor] = []
    for one, truth in zip(found, there, strict=True):
        assert one.scores is not None, "detections have scores"
        order = one.scores.cpu().sort(descending=True, stable=True).indices
        mine = order[(one.labels.cpu() == label)[order]][:MAX_DETECTIONS]
        overlap = iou(one.corners.cpu()[mine], truth.corners.cpu()[truth.labels.cpu() == label])
        scores.append(one.scores.cpu()[mine])
        hits.append(torch.stack([_hits(overlap, least) for least in OVERLAPS]))
    order = torch.cat(scores).sort(descending=True, stable=True).indices
    ranked = torch.cat(hits, dim=1)[:, order]
    return sum(_area(row, num) for row in ranked) / len(OVERLAPS)


def iou(one: Float[Tensor, "N 4"], other: Float[Tensor, "T 4"]) -> Float[Tensor, "N T"]:
    """Return the share of their union that each two boxes have in common."""
    low = torch.maximum(one[:, None, :2], other[None, :, :2])
    high = torch.minimum(one[:, None, 2:], other[None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)  # [N, T]
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (one, other)]
    return common / (areas[0][:, None] + areas[1][None] - common).clamp(min=torch.finfo(common.dtype).tiny)


def _hits(overlap: Float[Tensor, "N T"], least: float) -> Tensor:
    """Say of each detection, surest first, whether it gets a box; each box is given once."""
    free = torch.ones(overlap.shape[1], dtype=torch.bool)
    hits = torch.zeros(overlap.shape[0], dtype=torch.bool)
    for i in range(overlap.shape[0]):
        open_ = overlap[i].masked_fill(~free, -1.0)
        if overlap.shape[1] and bool(open_.max() >= least):
            free[open_.argmax()] = False
            hits[i] = True
    return hits


def _area(hits: Tensor, num: int) -> float:
    """Average the precision over 101 recalls, given hits and misses from the surest to the least sure."""
    true = hits.double().cumsum(0)
    precision = true / torch.arange(1, len(hits) + 1, dtype=torch.float64)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    at = torch.searchsorted(true / num, torch.tensor(RECALLS, dtype=torch.float64))
    return float(torch.cat([envelope, envelope.new_zeros(1)])[at].mean())
