"""What a model still knows of the classes it was to forget, read from its features and logits.

The bank is the training features of all classes with their true labels, the forgotten ones included; the queries are
test features of the forgotten classes. A model that never saw these classes ("gold", retrained without them) is found
out well above chance too, so only the excess over gold tells of a leak. Without gold there is no excess: None, never 0.

Letters: N bank samples, Q queries, D width, K classes, F forgotten classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from postgrad.core.metrics import Interval, mean_interval, wilson_interval
from postgrad.errors import DataError
from postgrad.forgetting.membership import Sides, entropy

TOLERANCE = 1e-6
"""A fit ends where no slope of its mean loss is larger; scikit-learn's usual 1e-4 leaves more to chance."""
_GRID = 2**30
"""Steps of the cosine that count as different; a tie then does not hang on the last bits of a matrix product."""
_TILE_ELEMENTS = 2**23
"""Similarities kept at a time."""
_Z = 1.959963984540054
"""Normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True)
class Pass:
    """What one model shows of one split, from a single pass."""

    features: Float[Tensor, "N D"]
    logits: Float[Tensor, "N K"]
    labels: Int[Tensor, " N"]

    def of(self, classes: Sequence[int]) -> "Pass":
        """Keep the samples of some classes, in order."""
        keep = torch.isin(self.labels, self.labels.new_tensor(list(classes)))
        return Pass(self.features[keep], self.logits[keep], self.labels[keep])


@dataclass(frozen=True)
class Recovery:
    """Per cent of the forgotten classes' test samples that an attacker recognises."""

    share: Interval
    gold: Interval | None = None
    """The same attack on the model that never saw these classes."""
    excess: Interval | None = None
    """Share minus gold's, in points, paired over samples; None means no gold reference."""


@dataclass(frozen=True)
class Probe:
    """A multinomial logistic regression on standardised features."""

    mean: Float[Tensor, " D"]
    scale: Float[Tensor, " D"]
    weight: Float[Tensor, "C D"]
    bias: Float[Tensor, " C"]
    classes: Int[Tensor, " C"]
    """The class of each row."""

    def logits(self, features: Float[Tensor, "Q D"]) -> Float[Tensor, "Q C"]:
        """Score the probe's classes."""
        return _standard(features, self.mean, self.scale) @ self.weight.T + self.bias


def nearest(
    queries: Float[Tensor, "Q D"],
    bank: Float[Tensor, "N D"],
    k: int,
    allowed: Bool[Tensor, "Q N"] | None = None,
) -> Int[Tensor, "Q k"]:
    """Index the k most similar bank samples of each query by cosine, nearest first; equals go by their place.

    Args:    allowed: which bank samples a query may have; at least k of each query.
    Raises:  DataError: too small a bank.
    """
    if not 1 <= k <= len(bank):
        raise DataError(f"Nearest neighbours: expected 1 <= k <= {len(bank)} (the bank's samples), found k = {k}.")
    columns, place = _unit(bank).T, torch.arange(len(bank), device=bank.device)
    rows = max(1, _TILE_ELEMENTS // len(bank))
    found = []
    for start in range(0, len(queries), rows):
        similar = (_unit(queries[start : start + rows]) @ columns * _GRID).round().long()  # [q, N]
        if allowed is not None:
            similar = similar.masked_fill(~allowed[start : start + rows], -2 * _GRID)
        # One whole number holds similarity and place, so that no two are equal and the order is the only one.
        found.append((similar * 2**31 - place).topk(k, dim=1).indices)
    return torch.cat(found) if found else place.new_zeros((0, k))


def knn_predictions(
    queries: Float[Tensor, "Q D"],
    bank: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    *,
    k: int = 5,
    allowed: Bool[Tensor, "Q K"] | None = None,
) -> Int[Tensor, " Q"]:
    """Give each query the class most frequent among its k nearest; of equals, the one with the nearest sample.

    Args:    allowed: classes a query may be given; samples of others are passed over.
    """
    near = nearest(queries, bank, k, None if allowed is None else allowed[:, labels])  # [Q, k]
    voted = labels[near]  # [Q, k]
    votes = (voted[:, :, None] == voted[:, None, :]).sum(2)  # [Q, k], of each neighbour's class
    # argmax takes the first of equals on a CPU only; the falling second part makes it so everywhere.
    best = (votes * (k + 1) - torch.arange(k, device=near.device)).argmax(1)  # [Q]
    return voted.gather(1, best[:, None])[:, 0]


def fit_probe(
    features: Float[Tensor, "N D"], labels: Int[Tensor, " N"], *, penalty: float = 1.0, tolerance: float = TOLERANCE
) -> Probe:
    """Fit sum_n CE(x_n, y_n) + penalty / 2 * ||W||^2 to its minimum, in float64; the bias is free.

    Args:    penalty: 1 / C of scikit-learn's LogisticRegression. tolerance: largest slope of the mean loss at the end.
    """
    classes, target = labels.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    mean, scale = _moments(features)
    design = _standard(features, mean, scale)
    offset = design.new_zeros((len(design), len(classes)))
    weight, bias = _fit_rows(
        design, offset, target, torch.arange(len(classes), device=labels.device), penalty, tolerance
    )
    return Probe(mean, scale, weight, bias, classes)


def probe_predictions(
    probe: Probe, queries: Float[Tensor, "Q D"], allowed: Bool[Tensor, "Q K"] | None = None
) -> Int[Tensor, " Q"]:
    """Give each query the class that the probe scores highest, among those allowed."""
    logits = probe.logits(queries)
    if allowed is not None:
        logits = logits.masked_fill(~allowed[:, probe.classes], -math.inf)
    return probe.classes[logits.argmax(1)]


def rivals(
    labels: Int[Tensor, " Q"], forgotten: Sequence[int], num_classes: int, *, alone: bool
) -> Bool[Tensor, "Q K"]:
    """List the classes a query may be given: all of them, or `alone`: the retained ones and its own."""
    allowed = torch.ones((len(labels), num_classes), dtype=torch.bool, device=labels.device)
    if alone:
        allowed[:, list(forgotten)] = False
        allowed.scatter_(1, labels[:, None], True)
    return allowed


def knn_found(
    bank: Pass, test: Pass, forgotten: Sequence[int], *, k: int = 5, alone: bool = False
) -> Bool[Tensor, " Q"]:
    """Tell for each forgotten test sample whether its neighbours name its class.

    Args:    alone: one forgotten class at a time against the retained ones, so that no other forgotten class is
             in the way.
    """
    queries = test.of(forgotten)
    allowed = rivals(queries.labels, forgotten, bank.logits.shape[1], alone=alone) if alone else None
    return knn_predictions(queries.features, bank.features, bank.labels, k=k, allowed=allowed) == queries.labels


def probe_found(probe: Probe, test: Pass, forgotten: Sequence[int], *, alone: bool = False) -> Bool[Tensor, " Q"]:
    """Tell for each forgotten test sample whether a probe fitted on the bank names its class.

    Args:    alone: the other forgotten classes are struck from the same probe's answers.
    """
    queries = test.of(forgotten)
    allowed = rivals(queries.labels, forgotten, test.logits.shape[1], alone=alone)
    return probe_predictions(probe, queries.features, allowed) == queries.labels


def swap_found(bank: Pass, test: Pass, forgotten: Sequence[int], *, penalty: float = 1.0) -> Bool[Tensor, " Q"]:
    """Refit only the head's rows of the forgotten classes on the bank; tell which test samples they then find.

    The other rows keep the logits they give, whatever head made them. If this brings accuracy back, head and features
    were merely pulled apart and nothing was forgotten.
    """
    rows = torch.tensor(sorted(set(forgotten)), device=bank.labels.device)
    mean, scale = _moments(bank.features)
    design = _standard(bank.features, mean, scale)
    weight, bias = _fit_rows(design, bank.logits.double(), bank.labels, rows, penalty)
    queries = test.of(forgotten)
    logits = queries.logits.double().index_copy(1, rows, _standard(queries.features, mean, scale) @ weight.T + bias)
    return logits.argmax(1) == queries.labels


def recovery(found: Bool[Tensor, " Q"], gold: Bool[Tensor, " Q"] | None) -> Recovery:
    """Sum an attack up: share found with Wilson's interval, and the excess over gold."""
    if gold is None:
        return Recovery(_share(found))
    return Recovery(_share(found), _share(gold), excess(found, gold))


def excess(found: Bool[Tensor, " Q"], gold: Bool[Tensor, " Q"] | None) -> Interval | None:
    """Share found minus gold's in points, paired over the same samples; None without gold.

    Source:  the interval is that of Bonett and Price (2012), which keeps its width where the two never differ.
    """
    if gold is None:
        return None
    num, only, missed = len(found), int((found & ~gold).sum()), int((~found & gold).sum())
    up, down = (only + 1) / (num + 2), (missed + 1) / (num + 2)
    half = _Z * math.sqrt((up + down - (up - down) ** 2) / (num + 2))
    value = (only - missed) / num
    low, high = max(-1.0, min(value, up - down - half)), min(1.0, max(value, up - down + half))
    return Interval(100 * value, 100 * low, 100 * high)


def stands_out(
    test: Pass, forgotten: Sequence[int], retained: Sequence[int], by: Literal["max logit", "entropy"] = "max logit"
) -> Sides:
    """Score test inputs by how unsure the model is: forgotten ones that stand out give themselves away ("Streisand").

    Gold too is less sure of what it never saw; what counts is the difference from gold, on either side.
    """
    sides = [test.of(classes).logits.double() for classes in (forgotten, retained)]
    scores = [entropy(logits) if by == "entropy" else -logits.max(1).values for logits in sides]
    return Sides(*scores)


def linear_cka(a: Float[Tensor, "N D"], b: Float[Tensor, "N E"]) -> float:
    """Return ||A^T B||^2 / (||A^T A|| ||B^T B||), centred: 1 = the same up to rotation and scale; NaN if constant.

    It grows towards 1 when samples are few for the width: compare only figures of the same samples.

    Source:  Kornblith et al. 2019 (arXiv 1905.00414).
    """
    left, right = (side.double() - side.double().mean(0) for side in (a, b))
    shared = (left.T @ right).square().sum()
    return float(shared / ((left.T @ left).norm() * (right.T @ right).norm()))


def feature_cosine(a: Float[Tensor, "N D"], b: Float[Tensor, "N D"]) -> Interval:
    """Return the mean cosine between both models' features of the same samples."""
    return mean_interval((_unit(a) * _unit(b)).sum(1).cpu().numpy())


def js_divergence(a: Float[Tensor, "N K"], b: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """Return each sample's Jensen-Shannon divergence between two models' answers in nats, 0 to ln 2.

    Args:    a, b: logits.
    """
    left, right = a.double().log_softmax(1), b.double().log_softmax(1)
    middle = torch.logaddexp(left, right) - math.log(2)  # [N, K]
    divergence = torch.zeros_like(middle[:, 0])
    for side in (left, right):
        terms = F.kl_div(middle, side, reduction="none", log_target=True)  # NaN where a probability is 0: 0 log 0
        divergence = divergence + terms.nan_to_num(0.0).sum(1) / 2
    return divergence.clamp(0, math.log(2))


def activation_distance(a: Float[Tensor, "N K"], b: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """Return each sample's Euclidean distance between two models' probabilities, 0 to sqrt 2.

    Args:    a, b: logits.
    """
    return (a.double().softmax(1) - b.double().softmax(1)).square().sum(1).sqrt()


def zero_retrain_forgetting(logits: Float[Tensor, "N K"], random: Float[Tensor, "N K"]) -> float:
    """Return 1 - mean JS divergence from a model with random weights, 1 - ln 2 to 1; 1 = answers as if untrained.

    A high value is no aim in itself: a model retrained without the classes does not answer at random.

    Args:    random: logits of the same forgotten samples by a freshly drawn model.
    Source:  Chundawat et al. 2023 (arXiv 2205.08096).
    """
    return 1 - float(js_divergence(logits, random).mean())


def _share(found: Bool[Tensor, " Q"]) -> Interval:
    share = wilson_interval(int(found.sum()), len(found))
    return Interval(*(100 * end for end in share))


def _unit(features: Tensor) -> Tensor:
    """Scale rows to length 1 in float64; zero stays zero."""
    return F.normalize(features.double(), dim=1)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of each feature in float64; a constant feature has spread 1."""
    mean, scale = features.double().mean(0), features.double().std(0, correction=0)
    return mean, torch.where(scale > 0, scale, 1.0)


def _standard(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return (features.double() - mean) / scale


def _fit_rows(
    design: Float[Tensor, "N D"],
    logits: Float[Tensor, "N K"],
    target: Int[Tensor, " N"],
    rows: Int[Tensor, " C"],
    penalty: float,
    tolerance: float = TOLERANCE,
) -> tuple[Float[Tensor, "C D"], Float[Tensor, " C"]]:
    """Minimise sum CE + penalty / 2 * ||W||^2 over the weight and bias that make the logits of some rows.

    Full-batch L-BFGS from zero. Gradients are written out: nothing asks for autograd.
    """
    if penalty <= 0:
        raise DataError(f"Probe: expected a penalty above 0, found {penalty:g}; without one the fit has no end.")
    num = len(design)
    basis = torch.cat([design, design.new_ones((num, 1))], 1)  # [N, D + 1], the bias last
    w = basis.new_zeros((len(rows), basis.shape[1]))  # [C, D + 1]
    place = torch.arange(num, device=target.device)

    def closure() -> Tensor:
        logprobs = logits.index_copy(1, rows, basis @ w.T).log_softmax(1)  # [N, K]
        slope = logprobs.exp()
        slope[place, target] -= 1
        w.grad = slope[:, rows].T @ basis / num
        w.grad[:, :-1] += penalty / num * w[:, :-1]
        return (penalty / 2 * w[:, :-1].square().sum() - logprobs[place, target].sum()) / num

    solver = torch.optim.LBFGS(
        [w], max_iter=1000, tolerance_grad=tolerance, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    solver.step(closure)  # type: ignore[no-untyped-call]
    return w[:, :-1], w[:, -1]
