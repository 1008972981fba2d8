"""Forgetting classes of a detector of the DETR family: their boxes are still fitted, their names are not.

Formula:   L = R(x_r) + beta F(x_f) + alpha sum_g ||g||_2 + w_f relu(BND_pro - KL(x_f)) + w_r KL(x_r) + h H(x_r)
               + k relu(log (1 - N_0) / (1 - N)) + p relu(log (1 - P_0) / (1 - P)), where
           R = 2 C + 5 L1 + 2 GIoU,   F = relu(BND - 2 C) + f (5 L1 + 2 GIoU),
           H = sum_q [KL(p_q || now) + 5 w_q L1] / sum_q w_q, p_q what query q answered before the request without the
           names that are to go, and w_q how sure it was of an object,
           C is the focal loss (DETR: its cross entropy, with "no object" as a class), and KL is between the rows of the
           classifier and the decoder's embeddings of the queries that were matched to boxes;
           N is the share of neighbours, weighted by softmax(cosine / temperature), that have a forgotten object's own
           class, P the share of variance of the forgotten classes' indicators that a ridge regression explains, both of
           the embeddings of the queries nearest to the boxes of x_f and x_r, those of x_r detached.
Source:    GS-LoRA (arXiv 2403.11530), its Deformable DETR; matcher and losses are transformers' own.
Differs:   only the last decoder layer's predictions count, as in the paper; a batch to forget must have boxes. H is an
           addition: the answers of every query are held, not only those matched to boxes. So are N and P, which bring
           the embeddings to what a detector that never saw the classes makes of them, and f, which is 1 there.

A target is what transformers takes: {"class_labels": [T], "boxes": [T, 4]}, a box as (centre x, centre y, width,
height) in shares of the image.

Letters: B images, Q queries, K classes, D width of an embedding, T boxes of an image.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from postgrad.errors import DataError, ModelError
from postgrad.forgetting.average_precision import corners
from postgrad.forgetting.leakfree import probe_leak, soft_knn_leak
from postgrad.forgetting.losses import bounded_prototype, detector_forget, prototype_kl

Target = dict[str, Tensor]
Matched = Sequence[tuple[Tensor, Tensor]]
"""For each image: queries, and the boxes they were matched to."""
LEAST_HIDDEN = 1e-6
"""Below which a share of 1 is taken for all but 1: its logarithm is finite."""


@dataclass(frozen=True, kw_only=True)
class BoxLeakConfig:
    """Weights and bounds of the terms that move forgotten objects' embeddings among those of kept ones."""

    knn: float = 0.0
    """k: weight of the share N of neighbours that give forgotten objects away; 0 = off."""
    bound_knn: float = 0.4
    """N_0: the share at which they are left alone."""
    temperature: float = 0.15
    """Cosine over which a neighbour's weight falls to a third: a small one says little where objects lie far apart."""
    probe: float = 0.0
    """p: weight of what a ridge regression finds of them, P; 0 = off. Batches need more objects than D."""
    bound_probe: float = 0.5
    """P_0: the share of the variance at which they are left alone."""
    ridge: float = 0.003
    """Of the regression, in shares of the mean variance; a large one is evaded in directions of little variance."""


@dataclass(frozen=True, kw_only=True)
class DetectorObjectiveConfig:
    """Weights and bounds of the terms of a detector's objective."""

    beta: float = 0.15
    """Weight of the forgetting objective."""
    bound: float = 15.0
    """BND: twice the focal loss at which a forgotten batch is left alone."""
    alpha: float = 3e-4
    """Weight of the sum of group norms."""
    weight_forget: float = 0.005
    """w_f: weight of pushing forgotten embeddings off their class's row; 0 is GS-LoRA."""
    weight_retain: float = 0.0
    """w_r: weight of holding retained embeddings at their class's row."""
    bound_prototype: float = 18.0
    """BND_pro: the divergence in nats at which forgotten embeddings are left alone."""
    hold: float = 0.0
    """h: weight of holding answers on retained images as they were before the request, without the forgotten names."""
    fit: float = 1.0
    """f: weight of fitting the boxes to forget; 0 = the detector need not find them."""
    leak: BoxLeakConfig = BoxLeakConfig()
    """How the embeddings of what is to be forgotten are moved."""


class DetectorBatch(NamedTuple):
    """Images and what is on them."""

    pixel_values: Float[Tensor, "B C H W"]
    targets: Sequence[Target]
    pixel_mask: Shaped[Tensor, "B H W"] | None = None


class Predictions(NamedTuple):
    """What the last decoder layer says of each query."""

    logits: Float[Tensor, "B Q K"]
    boxes: Float[Tensor, "B Q 4"]
    embeddings: Float[Tensor, "B Q D"]


class DetectorLosses(NamedTuple):
    """The three losses of matched predictions, unweighted, for each box of the batch."""

    classes: Float[Tensor, ""]
    box_l1: Float[Tensor, ""]
    box_giou: Float[Tensor, ""]


class DetectorTerms(NamedTuple):
    """The objective, and its terms, each times its weight and detached."""

    total: Float[Tensor, ""]
    retain: Float[Tensor, ""]
    forget: Float[Tensor, ""]
    structure: Float[Tensor, ""]
    prototype_forget: Float[Tensor, ""]
    prototype_retain: Float[Tensor, ""]
    hold: Float[Tensor, ""]
    leak_knn: Float[Tensor, ""]
    leak_probe: Float[Tensor, ""]


class Held(NamedTuple):
    """What a detector answered before a request, without the names that are to go."""

    scores: Float[Tensor, "B Q K"]
    """Probabilities: of each class by itself or, of DETR, of all and "no object"."""
    boxes: Float[Tensor, "B Q 4"]


class Objects(NamedTuple):
    """What a detector's last embeddings make of objects, whatever it names them."""

    embeddings: Float[Tensor, "M D"]
    """Of the query nearest to each box."""
    labels: Int[Tensor, " M"]
    """True ones."""


def nearest_queries(found: Float[Tensor, "Q 4"], there: Float[Tensor, "T 4"]) -> Int[Tensor, " T"]:
    """Find for each box the query that lies nearest, by 5 L1 - 2 GIoU as detectors are matched, names left aside."""
    from transformers.loss.loss_for_object_detection import generalized_box_iou

    overlap: Tensor = generalized_box_iou(corners(there), corners(found))
    return (5 * torch.cdist(there, found, p=1) - 2 * overlap).argmin(1)


def objects_of(found: Predictions, targets: Sequence[Target]) -> Objects:
    """Ask for each box the query that lies nearest: what the audit reads (forgetting/boxes_leakage.py)."""
    boxes = found.boxes.detach()
    near = [nearest_queries(boxes[i], target["boxes"]) for i, target in enumerate(targets)]
    embeddings = torch.cat([found.embeddings[i, queries] for i, queries in enumerate(near)])
    return Objects(embeddings, torch.cat([target["class_labels"] for target in targets]))


def leak_losses(gone: Objects, kept: Objects, config: BoxLeakConfig) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the terms of N and of P at the top of this file, times k and p; one that is off is 0.

    Only forgotten objects are moved: kept ones get no gradient.
    """
    zero = gone.embeddings.new_zeros(())
    others, names = kept.embeddings.detach(), sorted({*gone.labels.tolist()})
    knn = probe = zero
    if config.knn:
        share = soft_knn_leak(*gone, others, kept.labels, config.temperature)
        knn = config.knn * _above(share, config.bound_knn)
    if config.probe:
        both, labels = torch.cat([gone.embeddings, others]), torch.cat([gone.labels, kept.labels])
        probe = config.probe * _above(probe_leak(both, labels, names, config.ridge), config.bound_probe)
    return knn, probe


def _above(share: Float[Tensor, ""], bound: float) -> Float[Tensor, ""]:
    """Return relu(log((1 - bound) / (1 - share))): its slope is steep where a share is next to 1."""
    return F.relu(math.log1p(-bound) - torch.log((1 - share).clamp(min=LEAST_HIDDEN)))


def held_answers(found: Predictions, gone: Iterable[int], *, softmax: bool) -> Held:
    """Strike names out of answers: to these a query says no, or "no object"."""
    labels = sorted(set(gone))
    scores = found.logits.softmax(-1) if softmax else found.logits.sigmoid()
    struck = scores.clone()
    struck[..., labels] = 0.0
    if softmax:
        struck[..., -1] += scores[..., labels].sum(-1)
    return Held(struck, found.boxes)


def hold_loss(found: Predictions, held: Held, *, softmax: bool) -> Float[Tensor, ""]:
    """Return how far answers are from those held: H at the top of this file."""
    if softmax:
        apart = F.kl_div(found.logits.log_softmax(-1), held.scores, reduction="none").sum(-1)  # [B, Q]
        sure = 1 - held.scores[..., -1]
    else:
        p = held.scores
        cross = F.binary_cross_entropy_with_logits(found.logits, p, reduction="none")
        apart = (cross + torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)).sum(-1)  # [B, Q]
        sure = p.amax(-1)
    far = (found.boxes - held.boxes).abs().sum(-1)
    return (apart + 5 * sure * far).sum() / sure.sum().clamp(min=1.0)


def predict(model: nn.Module, batch: DetectorBatch) -> Predictions:
    """Run a detector."""
    is_softmax(model)
    out = model(pixel_values=batch.pixel_values, pixel_mask=batch.pixel_mask)
    return Predictions(out.logits, out.pred_boxes, out.last_hidden_state)


def match(model: Any, found: Predictions, targets: Sequence[Target]) -> Matched:
    """Assign queries to boxes at least cost, by transformers' matcher with the costs of the model's config."""
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
    from transformers.loss.loss_for_object_detection import HungarianMatcher

    config = model.config
    kind = HungarianMatcher if is_softmax(model) else DeformableDetrHungarianMatcher
    matcher = kind(class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost)
    matched: Matched = matcher({"logits": found.logits, "pred_boxes": found.boxes}, list(targets))
    return matched


def detector_losses(model: Any, found: Predictions, targets: Sequence[Target], matched: Matched) -> DetectorLosses:
    """Return transformers' losses of the last layer's predictions."""
    from transformers.loss.loss_deformable_detr import DeformableDetrImageLoss
    from transformers.loss.loss_for_object_detection import ImageLoss

    config = model.config
    settings: dict[str, Any] = {
        "matcher": lambda outputs, targets: matched,
        "num_classes": config.num_labels,
        "losses": ["labels", "boxes"],
    }
    if is_softmax(model):
        criterion = ImageLoss(eos_coef=config.eos_coefficient, **settings)
    else:
        criterion = DeformableDetrImageLoss(focal_alpha=config.focal_alpha, **settings)
    outputs = {"logits": found.logits, "pred_boxes": found.boxes}
    losses = criterion.to(found.logits.device)(outputs, list(targets))
    return DetectorLosses(losses["loss_ce"], losses["loss_bbox"], losses["loss_giou"])


def remain_objective(losses: DetectorLosses) -> Float[Tensor, ""]:
    """Return 2 C + 5 L1 + 2 GIoU."""
    return 2 * losses.classes + 5 * losses.box_l1 + 2 * losses.box_giou


def forget_objective(losses: DetectorLosses, bound: float = 15.0, fit: float = 1.0) -> Float[Tensor, ""]:
    """Return relu(bound - 2 C) + fit (5 L1 + 2 GIoU)."""
    return detector_forget(F.relu(bound - 2 * losses.classes), fit * losses.box_l1, fit * losses.box_giou)


def class_prototypes(model: Any) -> Float[Tensor, "K D"]:
    """Return each class's row of the classifier that reads the last decoder layer, detached."""
    from transformers import DeformableDetrForObjectDetection

    is_softmax(model)
    if isinstance(model, DeformableDetrForObjectDetection):
        weight = model.class_embed[model.config.decoder_layers - 1].weight
    else:
        weight = model.class_labels_classifier.weight[: model.config.num_labels]  # without DETR's "no object"
    rows: Tensor = weight.detach()
    return rows


def matched_embeddings(
    found: Predictions, targets: Sequence[Target], matched: Matched
) -> tuple[Float[Tensor, "M D"], Int[Tensor, " M"]]:
    """Return the embeddings of matched queries, and their boxes' classes."""
    embeddings = [found.embeddings[i, queries] for i, (queries, _) in enumerate(matched)]
    labels = [target["class_labels"][boxes] for target, (_, boxes) in zip(targets, matched, strict=True)]
    return torch.cat(embeddings), torch.cat(labels)


def of_classes(targets: Iterable[Target], classes: Iterable[int]) -> list[Target]:
    """Keep the boxes of some classes: a batch to forget shows those to forget, a batch to retain the others."""
    wanted = torch.tensor(sorted(set(classes)), dtype=torch.int64)
    kept = [
        (target, torch.isin(target["class_labels"], wanted.to(target["class_labels"].device))) for target in targets
    ]
    return [{"class_labels": t["class_labels"][keep], "boxes": t["boxes"][keep]} for t, keep in kept]


def detection_forget_step(
    model: nn.Module,
    retain: DetectorBatch,
    forget: DetectorBatch,
    structure: Float[Tensor, ""],
    config: DetectorObjectiveConfig,
    held: Held | None = None,
) -> DetectorTerms:
    """Return the objective of one step with its terms; the formula is at the top of this file.

    Args: structure: the sum of the groups' norms; 0 while alpha is 0.  held: on the images to retain.
    Raises: DataError: no box is to be forgotten in this batch.
    """
    if not any(len(target["class_labels"]) for target in forget.targets):
        raise DataError(
            "expected boxes of forgotten classes in the batch to forget, found none: without one, the objective would "
            "ask for objects on the background. Take images that have some"
        )
    rows = class_prototypes(model)
    zero = rows.new_zeros(())
    found, losses, (embeddings, labels) = _losses(model, retain)
    others = objects_of(found, retain.targets) if config.leak.knn or config.leak.probe else None
    hold = zero if held is None else config.hold * hold_loss(found, held, softmax=is_softmax(model))
    kept = remain_objective(losses)
    pull = (
        config.weight_retain * prototype_kl(embeddings, labels, rows) if config.weight_retain and len(labels) else zero
    )
    found, losses, (embeddings, labels) = _losses(model, forget)
    lack = config.beta * forget_objective(losses, config.bound, config.fit)
    push = zero
    if config.weight_forget:
        push = config.weight_forget * bounded_prototype(embeddings, labels, rows, config.bound_prototype)
    sparse = config.alpha * structure if config.alpha else zero
    leaks = (zero, zero) if others is None else leak_losses(objects_of(found, forget.targets), others, config.leak)
    terms = (kept, lack, sparse, push, pull, hold, *leaks)
    return DetectorTerms(sum(terms, zero), *(term.detach() for term in terms))


def _losses(model: nn.Module, batch: DetectorBatch) -> tuple[Predictions, DetectorLosses, tuple[Tensor, Tensor]]:
    found = predict(model, batch)
    matched = match(model, found, batch.targets)
    losses = detector_losses(model, found, batch.targets, matched)
    return found, losses, matched_embeddings(found, batch.targets, matched)


def is_softmax(model: nn.Module) -> bool:
    """Say whether a detector's classes exclude each other (DETR) or are told apart one by one (the others).

    Raises: ModelError: it is of another family.
    """
    import transformers as hf

    sigmoid = (hf.DeformableDetrForObjectDetection, hf.ConditionalDetrForObjectDetection)
    if not isinstance(model, (hf.DetrForObjectDetection, *sigmoid)):
        raise ModelError(
            "expected transformers' DetrForObjectDetection, ConditionalDetrForObjectDetection or "
            f"DeformableDetrForObjectDetection, found {type(model).__name__}; load the detector as one of these"
        )
    return isinstance(model, hf.DetrForObjectDetection)
