"""Losses that make a model forget in its features, not only in its answers.

A forget loss on logits leaves the features of a forgotten class in a heap of their own: neighbours and probes find it
again. A model that never saw the class puts its samples among the retained classes they look like. The losses here aim
for that; each is bounded and asks for no gold model.

Letters: B forget samples of a batch, N bank samples, D width, E width of the keys, K classes, C forgotten classes.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from postgrad.core.numbers import full
from postgrad.errors import DataError
from postgrad.forgetting.leakage import nearest


def gold_proxy_logits(logits: Float[Tensor, "B K"], forgotten: Sequence[int]) -> Float[Tensor, "B K"]:
    """Strike the forgotten classes out: their logits become -inf, so that softmax shares 1 among the others.

    It is what a head without their rows answers, the nearest guess at gold's answer that needs no retraining.
    """
    rows = torch.tensor(sorted(set(forgotten)), dtype=torch.int64, device=logits.device)
    if len(rows) >= logits.shape[1]:
        raise DataError(f"Gold proxy: expected retained classes, found all {logits.shape[1]} forgotten; leave some.")
    return logits.index_fill(1, rows, -math.inf)


def gold_proxy_loss(
    logits: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"], forgotten: Sequence[int]
) -> Float[Tensor, ""]:
    """Return the mean KL(t || s) in nats, t = softmax of the teacher without forgotten classes, s = softmax(logits).

    Least 0, where forgotten inputs are answered as t does and no probability is left for forgotten classes. The
    gradient by the logits is (s - t) / B: it cannot explode, so no bound is needed.

    Args:    teacher: the original model's logits of the same inputs; gets no gradient.
    """
    target = gold_proxy_logits(teacher.detach(), forgotten).softmax(1)  # [B, K], 0 for forgotten classes
    return F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1).mean()


def kept_loss(
    logits: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"], forgotten: Sequence[int], softness: float = 2.0
) -> Float[Tensor, ""]:
    """Return the mean softness^2 KL(t || s) of retained samples in nats, both softened: softmax(logits / softness).

    t is the teacher's answer without forgotten classes, as in `gold_proxy_loss`. What a retained class lost to them is
    given back, and all else stays as the teacher had it, which saw far more than the samples at hand.

    Source:  distillation as in Hinton et al. 2015 (arXiv 1503.02531); the teacher without rows is ours.
    """
    return softness**2 * gold_proxy_loss(logits / softness, teacher / softness, forgotten)


def class_span(features: Float[Tensor, "N D"], labels: Int[Tensor, " N"], least: float = 1e-6) -> Float[Tensor, "R D"]:
    """Span the differences of the classes' mean features by orthonormal rows: R is at most one less than the classes.

    Args:    least: share of the largest singular value below which a direction counts as none.
    """
    means = torch.stack([full(features[labels == label]).mean(0) for label in sorted({*labels.tolist()})])
    _, sizes, rows = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    span: Tensor = rows[sizes > least * sizes[:1].clamp(min=torch.finfo(sizes.dtype).tiny)]
    return span


def outside(features: Float[Tensor, "B D"], span: Float[Tensor, "R D"]) -> Float[Tensor, ""]:
    """Return the variance of the features off a span, summed over directions: what retained classes do not need.

    A trained classifier's features collapse onto the differences of its classes' means (Papyan et al. 2020, arXiv
    2008.08186). Those of a model that never saw some classes have no directions of theirs.
    """
    values = full(features)
    centred = values - values.mean(0)
    return (centred - centred @ span.T @ span).square().sum(1).mean()


def scatter_targets(
    keys: Float[Tensor, "B E"], bank_keys: Float[Tensor, "N E"], bank_features: Float[Tensor, "N D"], k: int = 1
) -> Float[Tensor, "B D"]:
    """Give each forget sample a retained sample's features to land on: one of its k nearest by key, in turn.

    Keys are what the samples are alike in, such as `sqrt(softmax(gold_proxy_logits))` of the original model (its cosine
    is the Bhattacharyya coefficient) or the features of an earlier layer. With k > 1 sample i takes its neighbour
    number i mod k, so that samples alike do not all land on one.

    Args:    bank_features: of retained samples by the original model.
    """
    near = nearest(keys.detach(), bank_keys.detach(), k)  # [B, k]
    turn = torch.arange(len(keys), device=keys.device) % k
    return bank_features[near.gather(1, turn[:, None])[:, 0]]


def soft_knn_leak(
    features: Float[Tensor, "B D"],
    labels: Int[Tensor, " B"],
    bank: Float[Tensor, "N D"],
    bank_labels: Int[Tensor, " N"],
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Return the mean share of a sample's neighbours, weighted by softmax(cosine / temperature), of its own class.

    Neighbours are the other samples of the batch and the bank, never the sample itself; the bank must not hold the
    batch again. In [0, 1]; 1 = all neighbours tell the class.
    """
    everyone = F.normalize(torch.cat([features, bank]), dim=1)  # [B + N, D]
    similar = everyone[: len(features)] @ everyone.T / temperature  # [B, B + N]
    itself = torch.eye(len(features), len(everyone), dtype=torch.bool, device=features.device)
    weights = similar.masked_fill(itself, -math.inf).softmax(1)
    same = labels[:, None] == torch.cat([labels, bank_labels])
    return (weights * same).sum(1).mean()


def probe_leak(
    features: Float[Tensor, "N D"], labels: Int[Tensor, " N"], forgotten: Sequence[int], ridge: float = 0.1
) -> Float[Tensor, ""]:
    """Return the share of the variance of the forgotten classes' indicators that a ridge regression explains.

    R^2 = 1 - ||Y - X W||^2 / ||Y||^2, X and Y centred, W = (X^T X + r I)^-1 X^T Y, r = ridge * tr(X^T X) / D: the same
    at every scale of the features. In [0, 1]; 0 = no linear probe finds anything.

    Args:    features: of forget and retained samples together; more samples than D, or R^2 says little.
    """
    centred = features - features.mean(0)
    marks = (labels[:, None] == labels.new_tensor(list(forgotten))).to(features.dtype)  # [N, C]
    marks = marks - marks.mean(0)
    gram = centred.T @ centred  # [D, D]
    tiny = torch.finfo(gram.dtype).tiny
    loading = (ridge * gram.diagonal().mean()).clamp(min=tiny)  # above 0 for constant features too
    weight = torch.linalg.solve(
        gram + loading * torch.eye(len(gram), device=gram.device, dtype=gram.dtype), centred.T @ marks
    )
    total, unexplained = marks.square().sum(), (marks - centred @ weight).square().sum()
    # Without a forgotten sample, or with none but them, there is nothing to explain: 0.
    explained: Tensor = (total - unexplained) / total.clamp(min=tiny)
    return explained
