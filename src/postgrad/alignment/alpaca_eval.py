"""AlpacaEval's score from stored judgements, without the network: preference, win rate, standard error.

A judgement compares a baseline's output (1) with a model's (2) and is a number from 1 to 2: 1 prefers the
baseline, 2 the model, 1.5 neither. AlpacaEval 2 shows the two outputs in an order drawn from the instruction
and asks for one token, `m` for the output shown first and `M` for the second; the preference is the judge's
probability. The rate that does not reward length is in `length_control.py`.

Source:  Li et al. 2023, AlpacaEval; Dubois et al. 2024, Length-controlled AlpacaEval.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from postgrad.errors import DataError

FIRST, SECOND = "m", "M"
"""The tokens that stand for the output shown first and second."""


class WinRate(NamedTuple):
    """A model against the baseline, as the leaderboard lists it; rates in percent."""

    rate: float
    standard_error: float
    discrete_rate: float
    """Each judgement rounded to a win, a loss or half of both."""
    num_wins: int
    num_losses: int
    num_ties: int

    @property
    def num_total(self) -> int:
        """Judgements that could be read."""
        return self.num_wins + self.num_losses + self.num_ties


def is_swapped(instruction: str, seed: int = 0) -> bool:
    """Tell whether the judge was shown the model's output first; fixed by the instruction."""
    draw = random.Random(f"is_switched_outputs{instruction}{seed}")
    return draw.choices([False, True])[0]


def shown_preference(top_logprobs: Mapping[str, float]) -> float:
    """Preference in the order shown, 2 - p(m) / (p(m) + p(M)), in [1, 2].

    Args:    top_logprobs: log-probability in nats of each token the judge reported.
    Returns: a token that was not reported counts as probability 0; NaN if neither was.
    """
    first = top_logprobs.get(FIRST, -math.inf)
    second = top_logprobs.get(SECOND, -math.inf)
    if max(first, second) == -math.inf:
        return math.nan
    return 1 + 1 / (1 + math.exp(min(700.0, first - second)))


def preference(instruction: str, top_logprobs: Mapping[str, float], seed: int = 0) -> float:
    """Preference for the model over the baseline, in [1, 2], whichever was shown first."""
    shown = shown_preference(top_logprobs)
    return 3 - shown if is_swapped(instruction, seed) else shown


def stored_preference(record: Mapping[str, Any]) -> float:
    """Preference of one stored annotation, read again from its raw completion."""
    try:
        tokens = record["raw_completion"]["logprobs"]["content"][0]["top_logprobs"]
        top_logprobs = {token["token"]: float(token["logprob"]) for token in tokens}
        return preference(record["instruction"], top_logprobs)
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            "Expected an annotation with instruction and raw_completion.logprobs.content[0].top_logprobs, "
            f"found {sorted(record)}; only judges that report log-probabilities have them."
        ) from error


def win_rate(preferences: ArrayLike) -> WinRate:
    """Win rate, 100 * mean(preference - 1), with its standard error, sd / sqrt(n).

    Args:    preferences: 1 to 2; 0 is an old way to write a tie; NaN, a judgement that could not be read, is
             left out.
    """
    wins = won(preferences)
    wins = wins[~np.isnan(wins)]
    if len(wins) < 2:
        raise DataError(f"A win rate needs two readable judgements or more, found {len(wins)}.")
    num_wins, num_losses = int((wins > 0.5).sum()), int((wins < 0.5).sum())
    num_ties = len(wins) - num_wins - num_losses
    return WinRate(
        rate=100 * float(wins.mean()),
        standard_error=100 * float(wins.std(ddof=1)) / math.sqrt(len(wins)),
        discrete_rate=100 * (num_wins + 0.5 * num_ties) / len(wins),
        num_wins=num_wins,
        num_losses=num_losses,
        num_ties=num_ties,
    )


def won(preferences: ArrayLike) -> Float[np.ndarray, " I"]:
    """Turn preferences from 1 to 2 into wins from 0 to 1; NaN stays."""
    values = np.asarray(preferences, np.float64)
    values = np.where(values == 0, 1.5, values)
    if ((values < 1) | (values > 2)).any():
        raise DataError(
            f"Preferences lie between 1 (baseline) and 2 (model), found {np.nanmin(values):g} to "
            f"{np.nanmax(values):g}; add 1 to a probability."
        )
    return values - 1
