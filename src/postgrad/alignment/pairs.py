"""Which answers of a scored set become chosen and rejected. Plain numpy, one prompt at a time.

The rejected answer always scores strictly below the chosen one. Strategies:

    worst             the lowest score
    random            any lower score
    rank:8            the 8th best of the set
    mu-2sigma         the score nearest to mean - 2 standard deviations of the set
    gap:0.1:0.5       any whose score is 0.1 to 0.5 below the chosen one's
    length            the length nearest to the chosen one's
    near              the mean token log-probability nearest to the chosen one's
    likely            the highest mean token log-probability: what the policy would say most readily

Source: the two published findings behind the default: rejected answers should be close to the policy's own
distribution (arXiv 2405.20335), and mean - 2 sigma keeps improving with more samples where the worst does not
(arXiv 2502.16825).

Letters: N answers of a prompt.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from postgrad.errors import ConfigError

Kind = Literal["worst", "random", "rank", "mu", "gap", "length", "near", "likely"]
STRATEGIES = ("worst", "random", "rank:<r>", "mu-<k>sigma", "gap:<low>:<high>", "length", "near", "likely")
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_PATTERNS: tuple[tuple[Kind, str], ...] = (
    ("worst", "worst"),
    ("random", "random"),
    ("rank", r"rank:(\d+)"),
    ("mu", rf"mu-{_NUMBER}?\*?sigma"),
    ("gap", rf"gap:{_NUMBER}:{_NUMBER}"),
    ("length", "length"),
    ("near", "near"),
    ("likely", "likely"),
)


@dataclass(frozen=True)
class Strategy:
    """How to pick the rejected answer: a kind and its numbers."""

    kind: Kind
    numbers: tuple[float, ...] = ()

    @property
    def needs_logprobs(self) -> bool:
        """Whether answers need their log-probability."""
        return self.kind in ("near", "likely")


@dataclass(frozen=True)
class Candidates:
    """The distinct answers of one prompt."""

    scores: Float[np.ndarray, " N"]
    lengths: Int[np.ndarray, " N"] | None = None
    """In tokens or characters."""
    logprobs: Float[np.ndarray, " N"] | None = None
    """Mean log-probability of a token under the policy."""


@dataclass(frozen=True)
class Pick:
    """The answers picked of one prompt, as positions, rejected ones best first; or why none were."""

    chosen: int = -1
    rejected: tuple[int, ...] = ()
    dropped: str = ""


def parse_strategy(text: str) -> Strategy:
    """Read a strategy such as "rank:8" or "mu-2sigma".

    Raises: ConfigError: no such strategy, with the nearest one; or numbers that make no sense.
    """
    for kind, pattern in _PATTERNS:
        match = re.fullmatch(pattern, text)
        if match:
            numbers = tuple(float(group) if group else 1.0 for group in match.groups())
            return _checked(Strategy(kind, numbers), text)
    nearest = difflib.get_close_matches(text, STRATEGIES, n=1, cutoff=0.0)[0]
    known = ", ".join(STRATEGIES)
    raise ConfigError(f"Unknown rejected strategy {text!r}; did you mean {nearest!r}? Known: {known}.")


def _checked(strategy: Strategy, text: str) -> Strategy:
    if strategy.kind == "rank" and strategy.numbers[0] < 2:
        raise ConfigError(f"The rejected rank counts from the best (1), so it must be >= 2, got {text!r}.")
    if strategy.kind == "gap" and strategy.numbers[0] > strategy.numbers[1]:
        raise ConfigError(f"A gap needs low <= high, got {text!r}.")
    return strategy


def distinct(responses: Sequence[str]) -> list[int]:
    """List the positions of the first occurrence of each text."""
    return sorted({text: i for i, text in reversed(list(enumerate(responses)))}.values())


def ranking(scores: Float[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """List positions from the best score to the worst; of two equal scores the earlier comes first."""
    return np.argsort(-scores, kind="stable")


def lower_than(scores: Float[np.ndarray, " N"], chosen: int) -> Int[np.ndarray, " M"]:
    """List positions with a score strictly below the chosen one's, best first."""
    order = ranking(scores)
    lower: Int[np.ndarray, " M"] = order[scores[order] < scores[chosen]]
    return lower


def nearest_to(values: Float[np.ndarray, " M"], aim: float) -> int:
    """Give the position of the value nearest to the aim; the first of two equally near."""
    return int(np.argmin(np.abs(values - aim)))


def reject(candidates: Candidates, chosen: int, strategy: Strategy, generator: np.random.Generator) -> int | None:
    """Pick the rejected answer for a chosen one.

    Returns: its position, or None where no answer qualifies.
    Raises: ConfigError: the strategy needs lengths or log-probabilities that are not there.
    """
    scores = candidates.scores
    lower = lower_than(scores, chosen)
    if strategy.kind == "gap":
        low, high = strategy.numbers
        gap = scores[chosen] - scores[lower]
        lower = lower[(gap >= low) & (gap <= high)]
    if strategy.kind == "rank":
        rank = int(strategy.numbers[0])
        at = ranking(scores)[rank - 1 : rank]
        return int(at[0]) if at.size and scores[at[0]] < scores[chosen] else None
    if not lower.size:
        return None
    if strategy.kind == "worst":
        return int(lower[-1])
    if strategy.kind in ("random", "gap"):
        return int(lower[generator.integers(lower.size)])
    if strategy.kind == "mu":
        aim = float(scores.mean() - strategy.numbers[0] * scores.std())
        return int(lower[nearest_to(scores[lower], aim)])
    return _by_feature(candidates, chosen, lower, strategy)


def _by_feature(candidates: Candidates, chosen: int, lower: Int[np.ndarray, " M"], strategy: Strategy) -> int:
    """Pick by length or log-probability among lower-scored answers."""
    feature = candidates.lengths if strategy.kind == "length" else candidates.logprobs
    if feature is None:
        wanted = "lengths" if strategy.kind == "length" else "log-probabilities"
        raise ConfigError(f"The strategy {strategy.kind!r} needs the {wanted} of the answers, found none.")
    values = feature.astype(np.float64)
    if strategy.kind == "likely":
        return int(lower[np.argmax(values[lower])])
    return int(lower[nearest_to(values[lower], float(values[chosen]))])


def pick_pair(candidates: Candidates, *, rank: int, strategy: Strategy, generator: np.random.Generator) -> Pick:
    """Pick a chosen answer by its rank (1 = best) and a rejected one by the strategy, or say why not."""
    problem = _problem(candidates.scores, rank)
    if problem:
        return Pick(dropped=problem)
    chosen = int(ranking(candidates.scores)[rank - 1])
    rejected = reject(candidates, chosen, strategy, generator)
    if rejected is None:
        return Pick(dropped=f"no rejected answer by {strategy.kind}")
    return Pick(chosen, (rejected,))


def pick_ranking(candidates: Candidates, *, num: int) -> Pick:
    """Pick ``num`` answers evenly spaced from the best to the worst, best first, or say why not.

    Of answers with equal scores only the first counts, so that the order picked is a true order.
    """
    problem = _problem(candidates.scores, 1)
    if problem:
        return Pick(dropped=problem)
    order = ranking(candidates.scores)
    order = order[np.append(True, np.diff(candidates.scores[order]) < 0)]
    if order.size < num:
        return Pick(dropped=f"fewer than {num} distinct scores")
    picked = order[np.linspace(0, order.size - 1, num).round().astype(int)]
    return Pick(int(picked[0]), tuple(int(i) for i in picked[1:]))


def _problem(scores: Float[np.ndarray, " N"], rank: int) -> str:
    """Say why no pair can come of the set; empty where one can."""
    if scores.size < 2:
        return "fewer than two distinct responses"
    if scores.max() == scores.min():
        return "all scores equal"
    return "fewer responses than the chosen rank" if scores.size < rank else ""
