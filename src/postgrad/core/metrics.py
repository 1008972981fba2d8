"""Numbers that judge a model, each with its interval. Plain float64 numpy.

Letters: P prompts, N responses of a prompt, K points of a curve, R bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from postgrad.errors import DataError

Scores = Sequence[ArrayLike] | NDArray[Any]
"""[P][N], one score a response; prompts may differ in N."""


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Expected gold score of the best of n, for each n, with a bootstrap interval over prompts."""

    ns: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    num_prompts: tuple[int, ...]
    """Prompts that have at least n responses; only they count at this n."""

    @property
    def best_n(self) -> int:
        """The n with the highest mean; the smaller one of two equals."""
        return self.ns[int(np.argmax(self.mean))]


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean with its normal interval, mean +- z * sd / sqrt(n).

    Args:    values: one number a prompt, so that they are independent.
    Returns: one value alone has no spread to estimate: its low and high are NaN.
    """
    data = _vector(values, "values")
    mean = float(data.mean())
    if len(data) == 1:
        return Interval(mean, math.nan, math.nan)
    half = _z(confidence) * float(data.std(ddof=1)) / math.sqrt(len(data))
    return Interval(mean, mean - half, mean + half)


def bootstrap_interval(values: ArrayLike, seed: int, *, confidence: float = 0.95, resamples: int = 1000) -> Interval:
    """Mean with its percentile bootstrap interval."""
    data = _vector(values, "values")
    low, high = _bootstrap(data[:, None], seed, confidence, resamples)
    return Interval(float(data.mean()), float(low[0]), float(high[0]))


def wilson_interval(successes: float, total: int, confidence: float = 0.95) -> Interval:
    """Share of successes with Wilson's interval, which stays inside [0, 1] and holds for 0 of n too.

    Args:    successes: may be fractional, when ties count half; the interval is then a little too wide.
    Source:  Wilson 1927.
    """
    if total < 1 or not 0 <= successes <= total:
        raise DataError(f"A share needs 0 <= successes <= total and total >= 1, got {successes} of {total}.")
    z = _z(confidence)
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = share * (1 - share) / total + z * z / (4 * total * total)
    half = z * math.sqrt(spread) / (1 + z * z / total)
    # At 0 of n and n of n the end is exact; rounding must not move it past the share.
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def win_rate(preferences: ArrayLike, confidence: float = 0.95) -> Interval:
    """Share of comparisons won, with Wilson's interval.

    Args:    preferences: 1 won, 0 lost, 0.5 a tie; or the judge's probability of a win.
    """
    data = _vector(preferences, "preferences")
    if data.min() < 0 or data.max() > 1:
        raise DataError(f"Preferences lie between 0 and 1, found {data.min():g} to {data.max():g}.")
    return wilson_interval(float(data.sum()), len(data), confidence)


def pair_accuracy(chosen: ArrayLike, rejected: ArrayLike, confidence: float = 0.95) -> Interval:
    """Share of pairs whose chosen side scores higher; equal scores count half."""
    better, worse = _same_length(chosen, rejected)
    return win_rate((better > worse) + 0.5 * (better == worse), confidence)


def length_baseline(chosen: Sequence[str], rejected: Sequence[str], confidence: float = 0.95) -> Interval:
    """Pair accuracy of the rule "the longer text is better": what a reward model has to beat."""
    return pair_accuracy([len(text) for text in chosen], [len(text) for text in rejected], confidence)


def paired_difference(after: ArrayLike, before: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean of after - before on the same prompts; the pairing removes the spread between prompts."""
    new, old = _same_length(after, before)
    return mean_interval(new - old, confidence)


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation, ties sharing their mean rank; NaN when one side is constant."""
    left, right = (_ranks(side) for side in _same_length(a, b))
    left, right = left - left.mean(), right - right.mean()
    scale = math.sqrt(float(left @ left) * float(right @ right))
    return float(left @ right) / scale if scale > 0 else math.nan


def best_of_n(
    proxy: Scores,
    gold: Scores,
    ns: Sequence[int],
    *,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> Curve:
    """Gold score to expect when the proxy picks the best of n responses, for each n.

    The oracle's curve is best_of_n(gold, gold, ns). Prompts may have different N; a prompt with fewer than
    n responses is left out at that n, and `num_prompts` says how many stayed.
    """
    values = best_of_n_per_prompt(proxy, gold, ns)  # [P, K]
    counts = np.sum(~np.isnan(values), axis=0)  # [K]
    if not counts.all():
        most = max(np.size(row) for row in gold)
        raise DataError(f"best-of-{max(ns)} needs {max(ns)} responses of a prompt, found at most {most}.")
    mean = np.nanmean(values, axis=0)
    low, high = _bootstrap(values, seed, confidence, resamples)
    return Curve(
        ns=tuple(int(n) for n in ns),
        mean=tuple(mean.tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        num_prompts=tuple(counts.tolist()),
    )


def best_of_n_per_prompt(proxy: Scores, gold: Scores, ns: Sequence[int]) -> Float[np.ndarray, "P K"]:
    """Unbiased estimate of E[gold of the best of n by proxy] for each prompt, from all its N responses.

    sum_{i=n}^{N} C(i-1, n-1) / C(N, n) * g_(i), responses sorted by proxy, ascending. The weight is the
    chance that response i is the best of n drawn without replacement. Responses with equal proxy share
    the mean of their gold. NaN where n > N.
    """
    if len(proxy) != len(gold) or not len(gold):
        raise DataError(f"Proxy and gold need the same prompts, found {len(proxy)} and {len(gold)}.")
    if not ns or min(ns) < 1:
        raise DataError(f"Best-of-n needs n >= 1, got {list(ns)}.")
    weights: dict[int, NDArray[np.float64]] = {}
    values = np.empty((len(gold), len(ns)))
    for row, (rank_by, judge_by) in enumerate(zip(proxy, gold, strict=True)):
        ranked = _gold_by_rank(rank_by, judge_by, row)
        total = len(ranked)
        if total not in weights:
            weights[total] = np.stack([_best_weights(n, total) for n in ns])  # [K, N]
        values[row] = weights[total] @ ranked
    return values


def best_of_n_kl(n: int) -> float:
    """Upper bound in nats of KL(best of n || one sample), log n - (n - 1) / n.

    Source:  Beirami et al. 2024.
    """
    return math.log(n) - (n - 1) / n


def _best_weights(n: int, total: int) -> NDArray[np.float64]:
    """C(i-1, n-1) / C(N, n) for i = 1..N; through logarithms, because C(64, 32) needs 61 bits already."""
    if n > total:
        return np.full(total, math.nan)
    logs = np.full(total, -math.inf)
    whole = _log_binomial(total, n)
    logs[n - 1 :] = [_log_binomial(i - 1, n - 1) - whole for i in range(n, total + 1)]
    weights: NDArray[np.float64] = np.exp(logs)
    return weights


def _log_binomial(n: int, k: int) -> float:
    """log C(n, k)."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _gold_by_rank(proxy: ArrayLike, gold: ArrayLike, prompt: int) -> NDArray[np.float64]:
    """Gold in ascending order of proxy, averaged where the proxy is equal."""
    rank_by, judge_by = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    if rank_by.shape != judge_by.shape or not len(rank_by):
        shapes = f"{rank_by.shape} and {judge_by.shape}"
        raise DataError(f"Prompt {prompt}: proxy and gold need one score a response each, found {shapes}.")
    if not (np.isfinite(rank_by).all() and np.isfinite(judge_by).all()):
        raise DataError(f"Prompt {prompt}: scores must be finite numbers.")
    _, block, size = np.unique(rank_by, return_inverse=True, return_counts=True)
    mean: NDArray[np.float64] = np.bincount(block, weights=judge_by) / size
    repeated: NDArray[np.float64] = np.repeat(mean, size)
    return repeated


def _bootstrap(
    values: Float[np.ndarray, "P K"], seed: int, confidence: float, resamples: int
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Percentile interval of the column means over resampled rows; NaN cells do not count."""
    num = len(values)
    draws = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=resamples)  # [R, P]
    present = ~np.isnan(values)
    sums = draws @ np.where(present, values, 0.0)  # [R, K]
    weights = draws @ present.astype(np.float64)  # [R, K]
    means = np.divide(sums, weights, out=np.full_like(sums, math.nan), where=weights > 0)
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(means, [tail, 100 - tail], axis=0)
    return low, high


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, ties sharing their mean rank."""
    _, block, size = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(size)
    ranks: NDArray[np.float64] = (last - (size - 1) / 2)[block]
    return ranks


def _same_length(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both sides as vectors of one length."""
    left, right = _vector(a, "the first side"), _vector(b, "the second side")
    if len(left) != len(right):
        raise DataError(f"Both sides need one number a prompt, found {len(left)} and {len(right)}.")
    return left, right


def _vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """A non-empty, finite float64 vector."""
    data = np.asarray(values, np.float64)
    if data.ndim != 1 or not len(data):
        raise DataError(f"Expected a non-empty list of numbers for {name}, found shape {data.shape}.")
    if not np.isfinite(data).all():
        num_others = int((~np.isfinite(data)).sum())
        raise DataError(f"Expected finite numbers for {name}, found {num_others} others.")
    return data


def _z(confidence: float) -> float:
    """Two-sided normal quantile."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)
