"""Losses of continual forgetting by group-sparse LoRA, and the norms of its groups.

Formula: L = CE(x_r) + beta * relu(BND - CE(x_f)) + alpha * sum_g ||g||_2
             + w_f * relu(BND_pro - KL(x_f)) + w_r * KL(x_r)
         with x_r retained and x_f forgotten images, and g the LoRA matrices of one block taken as one vector.
Source:  GS-LoRA (arXiv 2403.11530) is the first line, GS-LoRA++ (arXiv 2501.09705) both; as their released code runs.
Differs: a group that is exactly zero has a zero gradient, where the released code's root of a sum of squares has NaN.
         No epsilon does it, so no norm is biased. `snap` and `prox`, which reach exact zeros, are additions.

Letters: B batch, D width of the features, K classes, G groups, Q queries of a detector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from postgrad.core.numbers import full, root

Pair = tuple[Tensor, Tensor]
"""A and B of one linear layer: its weight grows by a multiple of B A."""
Groups = Sequence[Sequence[Tensor]]
"""Each group lists the matrices that stay or go together."""
Grouping = Literal["block", "lora", "matrix"]
Reduction = Literal["mean", "sample"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights and bounds of the terms of the objective."""

    beta: float = 0.05
    """Weight of the forgetting term."""
    bound: float = 110.0
    """BND: the cross entropy in nats at which a forgotten batch is left alone."""
    alpha: float = 0.01
    """Weight of the sum of group norms."""
    weight_forget: float = 0.0
    """w_f: weight of pushing forgotten features off their class's prototype; 0 is GS-LoRA."""
    weight_retain: float = 0.0
    """w_r: weight of holding retained features at their class's prototype."""
    bound_prototype: float = 18.0
    """BND_pro: the divergence in nats at which forgotten features are left alone."""
    reduction: Reduction = "mean"
    """Bound the batch's mean cross entropy, as the paper's code does, or every sample's own."""


class Batch(NamedTuple):
    """What the model made of some images, and what they are."""

    features: Float[Tensor, "B D"]
    logits: Float[Tensor, "B K"]
    labels: Int[Tensor, " B"]


class Terms(NamedTuple):
    """The objective, and its terms, each times its weight and detached."""

    total: Float[Tensor, ""]
    retain: Float[Tensor, ""]
    forget: Float[Tensor, ""]
    structure: Float[Tensor, ""]
    prototype_forget: Float[Tensor, ""]
    prototype_retain: Float[Tensor, ""]


def retain_ce(logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    """Return the mean cross entropy of retained images, in nats."""
    return F.cross_entropy(full(logits), labels)


def bounded_forget(
    logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"], bound: float, reduction: Reduction = "mean"
) -> Float[Tensor, ""]:
    """Return what forgotten images' cross entropy lacks to the bound: relu(bound - CE).

    Args: reduction: "mean" bounds the mean, relu(bound - mean_i CE_i), as the paper's code does; "sample" bounds each,
          mean_i relu(bound - CE_i), which is never less, and splits over micro-batches.
    """
    each = F.cross_entropy(full(logits), labels, reduction="none")  # [B]
    if reduction == "sample":
        return F.relu(bound - each).mean()
    return F.relu(bound - each.mean())


def prototypes(
    features: Float[Tensor, "B D"], labels: Int[Tensor, " B"], num_classes: int | None = None
) -> Float[Tensor, "K D"]:
    """Return the mean of each class's features, detached, neither normalised nor weighted.

    Args:    num_classes: rows to return; the highest label + 1 by default.
    Returns: a class without features has NaN, so that it cannot be used unnoticed.
    Differs: the released single-step code took them from the network before its weights were loaded.
    """
    num = num_classes if num_classes is not None else int(labels.max()) + 1
    values = full(features.detach())
    sums = values.new_zeros(num, values.shape[1]).index_add_(0, labels, values)  # [K, D]
    return sums / torch.bincount(labels, minlength=num)[:, None]


def prototype_kl(
    features: Float[Tensor, "B D"], labels: Int[Tensor, " B"], prototypes: Float[Tensor, "K D"]
) -> Float[Tensor, ""]:
    """Return the batch mean of KL(softmax(prototype of the class) || softmax(features)), over the D coordinates.

    Args:    prototypes: class means; for a detector, the rows of its classifier.
    Differs: the paper speaks of logits; its code takes the features that the head reads, and so does this.
    """
    target = F.log_softmax(full(prototypes)[labels], dim=1)  # [B, D]
    return F.kl_div(F.log_softmax(full(features), dim=1), target, reduction="batchmean", log_target=True)


def prototype_l2(
    features: Float[Tensor, "B D"], labels: Int[Tensor, " B"], prototypes: Float[Tensor, "K D"]
) -> Float[Tensor, ""]:
    """Return the mean squared difference of features and their class's prototype, over images and coordinates."""
    return F.mse_loss(full(features), full(prototypes)[labels])


def bounded_prototype(
    features: Float[Tensor, "B D"], labels: Int[Tensor, " B"], prototypes: Float[Tensor, "K D"], bound: float
) -> Float[Tensor, ""]:
    """Return what forgotten features' divergence from their prototypes lacks to the bound: relu(bound - KL)."""
    return F.relu(bound - prototype_kl(features, labels, prototypes))


def forget_loss(
    retain: Batch,
    forget: Batch,
    structure: Float[Tensor, ""],
    prototypes: Float[Tensor, "K D"] | None,
    config: ObjectiveConfig,
) -> Terms:
    """Return the objective of GS-LoRA, or of GS-LoRA++ where a prototype weight is not 0, with its terms.

    The formula is at the top of this file.

    Args: structure: `structure(groups)`; 0 while alpha is 0.   prototypes: None where both prototype weights are 0.
    """
    zero = structure.new_zeros(())
    pull, push = zero, zero
    if config.weight_forget or config.weight_retain:
        assert prototypes is not None, "a prototype weight is not 0, so the objective needs prototypes"
        pull = _weighted(config.weight_retain, prototype_kl(retain.features, retain.labels, prototypes))
        short = bounded_prototype(forget.features, forget.labels, prototypes, config.bound_prototype)
        push = _weighted(config.weight_forget, short)
    kept = retain_ce(retain.logits, retain.labels)
    lack = config.beta * bounded_forget(forget.logits, forget.labels, config.bound, config.reduction)
    sparse = _weighted(config.alpha, structure)
    total = lack + kept + sparse + push + pull
    return Terms(total, kept.detach(), lack.detach(), sparse.detach(), push.detach(), pull.detach())


def focal(
    logits: Float[Tensor, "B Q K"], onehot: Float[Tensor, "B Q K"], num_boxes: float, *, balance: float = 0.25
) -> Float[Tensor, ""]:
    """Return a detector's sigmoid focal loss, summed over queries and classes and divided by the number of boxes.

    -a_t (1 - p_t)^2 log p_t, with p_t the probability of what is so, and a_t = balance where it is the class.

    Args:   onehot: rows of queries without an object are 0.
    Source: Lin et al. 2017, as in Deformable DETR.
    """
    values, target = full(logits), full(onehot)
    ce = F.binary_cross_entropy_with_logits(values, target, reduction="none")  # [B, Q, K]
    probability = values.sigmoid()
    wrong = probability * (1 - target) + (1 - probability) * target
    share = balance * target + (1 - balance) * (1 - target)
    return (share * wrong.square() * ce).sum() / num_boxes


def focal_forget(
    logits: Float[Tensor, "B Q K"], onehot: Float[Tensor, "B Q K"], num_boxes: float, bound: float = 15.0
) -> Float[Tensor, ""]:
    """Return a detector's forgetting term for the classes: relu(bound - 2 * focal)."""
    return F.relu(bound - 2 * focal(logits, onehot, num_boxes))


def detector_forget(
    classes: Float[Tensor, ""], box_l1: Float[Tensor, ""], box_giou: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return a detector's forgetting objective: classes are pushed away, boxes are still fitted.

    Args: classes: `focal_forget`.   box_l1, box_giou: the losses of the matched boxes, weighted 5 and 2.
    """
    return classes + 5 * box_l1 + 2 * box_giou


def lora_groups(blocks: Sequence[Sequence[Pair]], grouping: Grouping = "block") -> list[list[Tensor]]:
    """Group the LoRA matrices of blocks: together ("block"), a layer's two ("lora"), or each alone ("matrix").

    Args: blocks: in order, each the (A, B) of its linear layers in order.
    """
    match grouping:
        case "block":
            return [[matrix for pair in block for matrix in pair] for block in blocks]
        case "lora":
            return [list(pair) for block in blocks for pair in block]
        case "matrix":
            return [[matrix] for block in blocks for pair in block for matrix in pair]


def group_norms(groups: Groups) -> Float[Tensor, " G"]:
    """Return the 2-norm of each group taken as one vector; the gradient at exactly zero is zero.

    A group without matrices, of a pruned block, has norm 0.

    Differs: the paper's text may be read as a sum of matrix norms; its code takes this one root, whatever the size.
    """
    return root(_sums(groups, lambda matrix: matrix.square().sum()))


def structure(groups: Groups) -> Float[Tensor, ""]:
    """Return the group-sparse penalty, the sum of the groups' norms."""
    return group_norms(groups).sum()


def reporting_norm(groups: Groups, order: Literal[1, 2] = 2) -> Float[Tensor, " G"]:
    """Return the sum of a group's matrix norms, which the paper's code logs; it is not the norm it penalises."""
    if order == 1:
        return _sums(groups, lambda matrix: matrix.abs().sum())
    return _sums(groups, lambda matrix: root(matrix.square().sum()))


@torch.no_grad()
def snap(groups: Groups, threshold: float) -> tuple[int, ...]:
    """Set groups whose norm is below a threshold to exactly zero, in place; return their positions.

    The data's gradient of a zero pair is zero, but Adam's memory of earlier ones is not: freeze these groups too.
    """
    small = [i for i, norm in enumerate(group_norms(groups).tolist()) if norm < threshold]
    _clear(groups, small)
    return tuple(small)


@torch.no_grad()
def prox(groups: Groups, step: float | Sequence[float]) -> tuple[int, ...]:
    """Shrink each group's norm by a step, in place; return the positions of those that became exactly zero.

    v <- max(0, 1 - t / ||v||) * v, the proximal map of t * ||v||.

    Args: step: t, learning rate times alpha for plain descent; or one t a group.
    """
    steps = [float(step)] * len(groups) if isinstance(step, int | float) else list(step)
    norms = group_norms(groups).tolist()
    pairs = list(zip(norms, steps, strict=True))
    gone = [i for i, (norm, t) in enumerate(pairs) if norm <= t]
    for i, (norm, t) in enumerate(pairs):
        for matrix in groups[i] if i not in gone else ():
            matrix.mul_(1 - t / norm)
    _clear(groups, gone)
    return tuple(gone)


def _clear(groups: Groups, positions: Sequence[int]) -> None:
    """Set groups to +0."""
    for i in positions:
        for matrix in groups[i]:
            matrix.zero_()


def _sums(groups: Groups, of: Callable[[Tensor], Tensor]) -> Float[Tensor, " G"]:
    """Sum a number of each matrix over each group."""
    device = next((matrix.device for group in groups for matrix in group), None)
    sums = [sum((of(full(matrix)) for matrix in group), torch.zeros((), device=device)) for group in groups]
    return torch.stack(sums) if sums else torch.zeros(0)


def _weighted(weight: float, term: Tensor) -> Tensor:
    """Scale a term; a weight of 0 leaves a 0 even where the term is not finite."""
    return weight * term if weight else term.new_zeros(())
