"""MT-bench's score from stored judgements: 80 two-turn questions, rated alone or compared in pairs.

Source:  Zheng et al. 2023, Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena.
Differs: a pair with an unreadable verdict is a tie and is counted; the original gives it to the second model when
         both orders are unreadable.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from postgrad.errors import DataError

FIRST_QUESTION = 81
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""Ten questions each, in this order."""
TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Sampling temperature of the model under test."""
WITH_REFERENCE = frozenset({"reasoning", "math", "coding"})
"""Categories whose judge sees a reference answer."""

Verdict = Literal["A", "B", "tie", "unreadable"]
Winner = Literal["first", "second", "tie"]

_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_LOOSE_RATING = re.compile(r"\[(\d+\.?\d*)\]")


class Rating(NamedTuple):
    """The judge's rating of one answer; None if it could not be read."""

    question_id: int
    turn: int
    score: float | None


class Comparison(NamedTuple):
    """Two models on one turn, judged in both orders: `swapped` saw the second model as A."""

    first: str
    second: str
    verdict: Verdict
    swapped: Verdict


@dataclass(frozen=True)
class Ratings:
    """Mean ratings of one model, 1 to 10; NaN where nothing could be read."""

    overall: float
    """Mean over all answers, not the mean of the turns."""
    by_turn: Mapping[int, float]
    by_category: Mapping[str, float]
    num_rated: int
    num_unreadable: int


@dataclass(frozen=True)
class PairResult:
    """Comparisons of one model with all others."""

    num_wins: int
    num_losses: int
    num_ties: int

    @property
    def win_rate(self) -> float:
        """Share won, ties as half."""
        return (self.num_wins + 0.5 * self.num_ties) / (self.num_wins + self.num_losses + self.num_ties)


def category(question_id: int) -> str:
    """Name the category of a question, 81 to 160."""
    place = (question_id - FIRST_QUESTION) // 10
    if not 0 <= place < len(CATEGORIES):
        raise DataError(f"MT-bench has the questions 81 to 160, found {question_id}.")
    return CATEGORIES[place]


def parse_rating(judgement: str) -> float | None:
    """Read the first [[rating]], or else the first [rating]; None if there is neither."""
    match = _RATING.search(judgement) or _LOOSE_RATING.search(judgement)
    return float(match.group(1)) if match else None


def parse_verdict(judgement: str) -> Verdict:
    """Read [[A]], [[B]] or [[C]], which is a tie; the first of this order wins if several are there."""
    if "[[A]]" in judgement:
        return "A"
    if "[[B]]" in judgement:
        return "B"
    return "tie" if "[[C]]" in judgement else "unreadable"


def rate(ratings: Sequence[Rating]) -> Ratings:
    """Average one model's ratings; what could not be read is left out and counted."""
    readable = [(r.question_id, r.turn, r.score) for r in ratings if r.score is not None]
    turns = sorted({r.turn for r in ratings})
    present = {category(r.question_id) for r in ratings}
    return Ratings(
        overall=_mean(score for _, _, score in readable),
        by_turn={turn: _mean(score for _, at, score in readable if at == turn) for turn in turns},
        by_category={
            name: _mean(score for question, _, score in readable if category(question) == name)
            for name in CATEGORIES
            if name in present
        },
        num_rated=len(readable),
        num_unreadable=len(ratings) - len(readable),
    )


def winner(verdict: Verdict, swapped: Verdict) -> Winner:
    """Decide a comparison judged in both orders: a model wins if both say so, anything else is a tie."""
    if (verdict, swapped) == ("A", "B"):
        return "first"
    if (verdict, swapped) == ("B", "A"):
        return "second"
    return "tie"


def compare(comparisons: Sequence[Comparison]) -> dict[str, PairResult]:
    """Count wins, losses and ties of each model."""
    outcomes = [(c.first, c.second, winner(c.verdict, c.swapped)) for c in comparisons]
    names = dict.fromkeys(name for first, second, _ in outcomes for name in (first, second))
    return {
        name: PairResult(
            num_wins=sum((a == name and who == "first") + (b == name and who == "second") for a, b, who in outcomes),
            num_losses=sum((a == name and who == "second") + (b == name and who == "first") for a, b, who in outcomes),
            num_ties=sum(name in (a, b) and who == "tie" for a, b, who in outcomes),
        )
        for name in names
    }


def order_agreement(comparisons: Sequence[Comparison]) -> float:
    """Share of comparisons in which both orders name the same model, or both a tie; NaN without any."""
    same = {("A", "B"), ("B", "A"), ("tie", "tie")}
    return _mean(float((c.verdict, c.swapped) in same) for c in comparisons)


def _mean(values: Iterable[float]) -> float:
    """Average, NaN of nothing."""
    data = list(values)
    return float(np.mean(data)) if data else math.nan
