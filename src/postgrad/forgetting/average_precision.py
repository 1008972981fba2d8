"""Average precision of detectors as COCO counts it, for the classes forgotten, kept, and forgotten earlier.

AP is the mean over classes, and over overlaps of 0.50, 0.55 ... 0.95, of the precision read at recalls 0, 0.01 ... 1,
each as the highest at that recall or a higher one. Within an image the surer detection chooses first, and takes the
free box of its class that it overlaps most.

Source:    the COCO detection challenge. Differs: no crowd regions and no sizes; at most 100 detections an image.

Letters: B images, Q queries, K classes, N detections or boxes, T boxes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
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
    num = 0
    scores: list[np.ndarray] = []
    hits: list[np.ndarray] = []
    for one, truth in zip(found, there, strict=True):
        assert one.scores is not None, "detections have scores"
        wanted, mine = truth.labels.cpu() == label, one.labels.cpu() == label
        num += int(wanted.sum())
        if not bool(mine.any()):
            continue
        surest = one.scores.cpu()[mine].sort(descending=True, stable=True)
        best = surest.indices[:MAX_DETECTIONS]
        overlap = iou(one.corners.cpu()[mine][best], truth.corners.cpu()[wanted])
        scores.append(surest.values[:MAX_DETECTIONS].numpy())
        hits.append(_hits(overlap.numpy()))
    if num == 0:
        return None
    if not scores:
        return 0.0
    order = np.argsort(-np.concatenate(scores), kind="stable")
    ranked = np.concatenate(hits, axis=1)[:, order]
    return sum(_area(row, num) for row in ranked) / len(OVERLAPS)


def iou(one: Float[Tensor, "N 4"], other: Float[Tensor, "T 4"]) -> Float[Tensor, "N T"]:
    """Return the share of their union that each two boxes have in common."""
    low = torch.maximum(one[:, None, :2], other[None, :, :2])
    high = torch.minimum(one[:, None, 2:], other[None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)  # [N, T]
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (one, other)]
    return common / (areas[0][:, None] + areas[1][None] - common).clamp(min=torch.finfo(common.dtype).tiny)


def _hits(overlap: np.ndarray) -> np.ndarray:
    """Say of each overlap asked for and each detection [N, T], surest first, whether it gets a box; each once."""
    num_found, num_there = overlap.shape
    free = np.ones((len(OVERLAPS), num_there), dtype=bool)
    hits = np.zeros((len(OVERLAPS), num_found), dtype=bool)
    rows = np.arange(len(OVERLAPS))
    for i in range(num_found if num_there else 0):
        open_ = np.where(free, overlap[i], -1.0)  # [overlaps, T]
        best = open_.argmax(1)
        hits[:, i] = open_[rows, best] >= np.array(OVERLAPS)
        free[rows[hits[:, i]], best[hits[:, i]]] = False
    return hits


def _area(hits: np.ndarray, num: int) -> float:
    """Average the precision over 101 recalls, given hits and misses from the surest to the least sure."""
    true = hits.cumsum().astype(np.float64)
    precision = true / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(true / num, np.array(RECALLS))
    return float(np.append(envelope, 0.0)[at].mean())
