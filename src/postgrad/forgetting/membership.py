"""Whether a model gives away what it was trained on: membership attacks, and how well two groups can be told apart.

Areas under the curve are between 0 and 1: 0.5 tells nothing, and below 0.5 tells as much as above, with the sign
turned. Shares are in per cent.

Letters: N samples, K classes, P positive and M negative samples, S shadow models, E width of what an attack looks at.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from postgrad.core.metrics import Interval, wilson_interval
from postgrad.errors import DataError

MAX_ATTACK_SAMPLES = 2000
"""Samples of each side an attacker trains on; a support vector machine takes their number squared."""
_Z = 1.959963984540054
"""Normal quantile of a two-sided 95 % interval."""
_LEAST = 1e-30
"""What the published modified entropy takes for a probability of 0."""


class Sides(NamedTuple):
    """Scores of two groups; the higher one is meant to be positive."""

    positive: Float[Tensor, " P"]
    negative: Float[Tensor, " M"]


class Curve(NamedTuple):
    """Share of positives caught (hits) at each share of negatives taken for positive (alarms), from 0 to 1."""

    alarms: tuple[float, ...]
    hits: tuple[float, ...]


@dataclass(frozen=True)
class Separation:
    """How well two groups can be told apart by one score."""

    auc: Interval
    """Chance that a positive sample scores higher than a negative one, ties half."""
    gold: Interval | None = None
    """The same by the model that never saw the forgotten classes."""
    difference: Interval | None = None
    """auc minus gold's, paired over samples; None means no gold reference."""


@dataclass(frozen=True)
class Attack:
    """What a trained membership attack says."""

    members: Interval
    """Per cent of the targets it takes for training samples."""
    power: Interval
    """Per cent of kept samples, half of them trained on, that it places rightly; 50 means it says nothing."""


def auc(sides: Sides) -> float:
    """Return the area under the ROC curve, exactly: the share of pairs in order, ties half (Mann-Whitney)."""
    return float(_beaten(sides.positive, sides.negative).mean())


def auc_interval(sides: Sides) -> Interval:
    """Return the area with DeLong's 95 % interval.

    Where that has no width (all told apart, or all equal) or cannot be had (one sample), Wilson's interval for the
    smaller group stands in.

    Source:  DeLong, DeLong and Clarke-Pearson 1988.
    """
    above, below = _components(sides)
    value = float(above.mean())
    spread = _variance(above, below)
    if not spread > 0:
        smaller = min(len(above), len(below))
        share = wilson_interval(value * smaller, smaller)
        return Interval(value, share.low, share.high)
    half = _Z * math.sqrt(spread)
    return Interval(value, max(0.0, value - half), min(1.0, value + half))


def auc_difference(sides: Sides, gold: Sides) -> Interval:
    """Return auc(sides) - auc(gold) for scores of the same samples, with DeLong's interval for correlated areas.

    Where that has no width or cannot be had, the two areas' own intervals are put together as if independent.

    Raises:  DataError: the groups differ in size, so they cannot be the same samples.
    """
    sizes = [(len(each.positive), len(each.negative)) for each in (sides, gold)]
    if sizes[0] != sizes[1]:
        raise DataError(f"Difference of areas: expected the same samples, found groups of {sizes[0]} and {sizes[1]}.")
    (above, below), (gold_above, gold_below) = _components(sides), _components(gold)
    value = float(above.mean() - gold_above.mean())
    spread = _variance(above - gold_above, below - gold_below)
    if spread > 0:
        half = _Z * math.sqrt(spread)
        return Interval(value, max(-1.0, value - half), min(1.0, value + half))
    ours, theirs = auc_interval(sides), auc_interval(gold)
    down = math.hypot(ours.value - ours.low, theirs.high - theirs.value)
    up = math.hypot(ours.high - ours.value, theirs.value - theirs.low)
    return Interval(value, max(-1.0, value - down), min(1.0, value + up))


def separation(sides: Sides, gold: Sides | None) -> Separation:
    """Sum up how well two groups can be told apart, beside gold where there is one."""
    if gold is None:
        return Separation(auc_interval(sides))
    return Separation(auc_interval(sides), auc_interval(gold), auc_difference(sides, gold))


def roc(sides: Sides, points: int = 100) -> Curve:
    """Return the ROC curve, both ends included, thinned to about so many points."""
    scores = torch.cat(_float64(sides))
    values = scores.unique().flip(0)  # type: ignore[no-untyped-call]
    cuts = _evenly(values, min(points, len(values)))  # falling
    hits, alarms = ((side[:, None] >= cuts).double().mean(0).tolist() for side in _float64(sides))
    return Curve((0.0, *alarms), (0.0, *hits))


def hits_at(sides: Sides, alarms: float = 0.01) -> float:
    """Return the share of positives caught while at most this share of negatives is taken for positive."""
    positive, negative = _float64(sides)
    spared = int(alarms * len(negative) + 1e-9)
    threshold = negative.sort(descending=True).values[spared] if spared < len(negative) else -math.inf
    return float((positive > threshold).double().mean())


def sample_losses(logits: Float[Tensor, "N K"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return each sample's cross entropy in nats."""
    return F.cross_entropy(logits.double(), labels, reduction="none")


def loss_sides(member_losses: Float[Tensor, " P"], other_losses: Float[Tensor, " M"]) -> Sides:
    """Score by the loss: members of the training set should have the lower one."""
    return Sides(-member_losses, -other_losses)


def entropy(logits: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """Return the entropy of the softmax in nats."""
    logprobs = logits.double().log_softmax(1)
    return -(logprobs.exp() * logprobs.clamp(min=-1e300)).sum(1)


def modified_entropy(logits: Float[Tensor, "N K"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return -(1 - p_y) log p_y - sum_{i != y} p_i log(1 - p_i): 0 if sure and right, large if sure and wrong.

    Source:  Song and Mittal 2021 (arXiv 2003.10595).
    """
    logits = logits.double()
    logprobs = logits.log_softmax(1)
    probs = logprobs.exp()
    top = logits.argmax(1, keepdim=True)  # [N, 1]
    # 1 - p loses all its digits only where p > 1/2, hence at most at the top: there it is the sum of the others.
    beside_top = logits.scatter(1, top, -math.inf).logsumexp(1, keepdim=True) - logits.logsumexp(1, keepdim=True)
    others = torch.log1p(-probs.scatter(1, top, 0.0)).scatter(1, top, beside_top)  # [N, K], log(1 - p)
    at = labels[:, None]
    wrong = (probs * others).scatter(1, at, 0.0).sum(1)
    return -(others.gather(1, at).exp() * logprobs.gather(1, at))[:, 0] - wrong


def published_modified_entropy(logits: Float[Tensor, "N K"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the modified entropy as SalUn's released code computes it, to compare with published numbers.

    Differs: log p_i stands where log(1 - p_i) is meant, and the term of the label is used in the column of every label
             that occurs in the batch, for all its rows, so that a value depends on the other samples.
    """
    probs = logits.double().softmax(1)
    logs = torch.where(probs > 0, probs.log(), math.log(_LEAST))
    present = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    present[labels] = True
    return -(torch.where(present, 1 - probs, probs) * logs).sum(1)


def attack_features(
    logits: Float[Tensor, "N K"], labels: Int[Tensor, " N"], *, published: bool = False
) -> dict[str, Float[Tensor, "N E"]]:
    """Give what the attacks look at: correctness, confidence, entropy, modified entropy, probabilities.

    Args:    published: modified entropy as in SalUn's code, under a name of its own.
    """
    probs = logits.double().softmax(1)
    found = {
        "correctness": (logits.argmax(1) == labels).double()[:, None],
        "confidence": probs.gather(1, labels[:, None]),
        "entropy": entropy(logits)[:, None],
        "modified entropy": modified_entropy(logits, labels)[:, None],
        "probabilities": probs,
    }
    if published:
        found["published modified entropy"] = published_modified_entropy(logits, labels)[:, None]
    return found


def svc_attacks(
    members: Mapping[str, Float[Tensor, "P E"]],
    others: Mapping[str, Float[Tensor, "M E"]],
    targets: Mapping[str, Float[Tensor, "N E"]],
    limit: int = MAX_ATTACK_SAMPLES,
) -> dict[str, Attack]:
    """Train one attack for each feature on retained training against retained test samples; ask it about the targets.

    Args:    members, others, targets: `attack_features` of retained training, retained test and forgotten training
             samples. limit: most samples of a side to train on, taken evenly.
    Source:  support vector machine with C = 3 and the RBF kernel, as in SalUn (arXiv 2310.12508). Both sides have the
             same number. The power is that of the same attack trained on one half, on the other half.
    """
    return {name: _svc_attack(members[name], others[name], targets[name], limit) for name in targets}


def loss_confidence(losses: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Turn losses -log p into log(p / (1 - p)), which is near normal over models; p = 1 counts as 1 - 1e-15."""
    logprobs = -losses.double()
    return logprobs - torch.log(-torch.expm1(logprobs.clamp(max=-1e-15)))


def lira_scores(
    losses: Float[Tensor, " N"], shadow_losses: Float[Tensor, "S N"], *, pooled: bool = True
) -> Float[Tensor, " N"]:
    """Return how many deviations a sample is more confident than models that were not trained on it.

    Args:    shadow_losses: of models trained without these samples. pooled: one deviation for all samples, better
             while shadow models are few (below about 64).
    Source:  the offline attack of Carlini et al. 2022 (arXiv 2112.03570), before its monotone last step.
    """
    if len(shadow_losses) < 2:
        raise DataError(f"Likelihood-ratio attack: expected 2 or more shadow models, found {len(shadow_losses)}.")
    shadow = loss_confidence(shadow_losses)  # [S, N]
    variance = shadow.var(0)
    variance = variance.mean().expand_as(variance) if pooled else variance
    return (loss_confidence(losses) - shadow.mean(0)) / variance.sqrt().clamp(min=1e-12)


def _float64(sides: Sides) -> tuple[Tensor, Tensor]:
    positive, negative = sides.positive.double(), sides.negative.double()
    if not len(positive) or not len(negative):
        raise DataError(f"Area: expected samples on both sides, found {len(positive)} and {len(negative)}.")
    if bool(positive.isnan().any()) or bool(negative.isnan().any()):
        raise DataError("Area: expected scores that are numbers, found NaN; the model's answers are not finite.")
    return positive, negative


def _beaten(scores: Tensor, others: Tensor) -> Tensor:
    """Give the share of the others that each score beats, ties half."""
    ordered = others.double().sort().values
    sides = [torch.searchsorted(ordered, scores.double(), right=right) for right in (False, True)]
    return (sides[0] + sides[1]).double() / (2 * len(others))


def _components(sides: Sides) -> tuple[Tensor, Tensor]:
    """Give each positive's share of negatives below, and each negative's share of positives above; both mean auc."""
    positive, negative = _float64(sides)
    return _beaten(positive, negative), 1 - _beaten(negative, positive)


def _variance(above: Tensor, below: Tensor) -> float:
    """Add up the variances of both components' means; NaN where a side has one sample."""
    if min(len(above), len(below)) < 2:
        return math.nan
    return float(above.var() / len(above) + below.var() / len(below))


def _evenly(samples: Tensor, num: int) -> Tensor:
    return samples[torch.linspace(0, len(samples) - 1, num, dtype=torch.float64).round().long()]


def _svc_attack(members: Tensor, others: Tensor, targets: Tensor, limit: int) -> Attack:
    num = min(len(members), len(others), limit)
    if num < 4:
        raise DataError(f"Membership attack: expected 4 or more samples of each side, found {num}.")
    both = [_evenly(side, num) for side in (members, others)]
    said = _svc_says(both[0], both[1], targets)
    trained, held = [side[0::2] for side in both], [side[1::2] for side in both]
    right = int(_svc_says(trained[0], trained[1], held[0]).sum() + (~_svc_says(trained[0], trained[1], held[1])).sum())
    shares = wilson_interval(int(said.sum()), len(said)), wilson_interval(right, 2 * len(held[0]))
    return Attack(*(Interval(*(100 * end for end in share)) for share in shares))


def _svc_says(members: Tensor, others: Tensor, targets: Tensor) -> Bool[Tensor, " N"]:
    """Train on both sides and tell which targets are taken for members."""
    from sklearn.svm import SVC

    marks = torch.cat([torch.ones(len(members)), torch.zeros(len(others))])
    machine = SVC(C=3, gamma="auto", kernel="rbf").fit(torch.cat([members, others]).cpu().numpy(), marks.numpy())
    return torch.from_numpy(machine.predict(targets.cpu().numpy()) == 1)
