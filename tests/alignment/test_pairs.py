"""Pair strategies on sets small enough to check by eye, and their properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.alignment.pairs import (
    Candidates,
    Pick,
    distinct,
    lower_than,
    parse_strategy,
    pick_pair,
    pick_ranking,
    ranking,
)
from postgrad.errors import ConfigError

SCORES = np.array([0.2, 0.9, 0.5, 0.9, 0.0, 0.7])
EVERY = ("worst", "random", "rank:3", "mu-2sigma", "mu-0.5sigma", "gap:0.1:0.5", "length", "near", "likely")


def candidates(scores: np.ndarray = SCORES) -> Candidates:
    """A set with lengths 10, 11, ... and log-probabilities -1, -0.9, ..."""
    return Candidates(scores=scores, lengths=np.arange(scores.size) + 10, logprobs=np.arange(scores.size) / 10 - 1)


def pick(strategy: str, rank: int = 1, scores: np.ndarray = SCORES, seed: int = 0) -> Pick:
    """Pick one pair."""
    return pick_pair(
        candidates(scores),
        rank=rank,
        strategy=parse_strategy(strategy),
        generator=np.random.default_rng(seed),
    )


@pytest.mark.parametrize(
    ("strategy", "rejected"),
    [
        ("worst", 4),
        ("rank:3", 5),
        ("rank:4", 2),
        # mean 0.5333, sd 0.3350: mean - 1 sd = 0.1983, nearest 0.2; mean - 2 sd = -0.137, nearest 0.0
        ("mu-1sigma", 0),
        ("mu-sigma", 0),
        ("mu-2sigma", 4),
        ("mu-0.2sigma", 2),
        ("gap:0.3:0.45", 2),
        ("length", 2),  # the chosen one, at 1, has length 11: 10 and 12 are as near, 12 has the better score
        ("near", 2),
        ("likely", 5),
    ],
)
def test_each_strategy_by_eye(strategy: str, rejected: int) -> None:
    """The chosen answer is the first of the two best; the rejected one as the strategy says."""
    assert pick(strategy) == Pick(1, (rejected,))


def test_the_chosen_rank_counts_from_the_best() -> None:
    """Rank 3 is score 0.7; below it the worst is still 0.0."""
    assert pick("worst", rank=3) == Pick(5, (4,))


def test_a_rank_of_equal_score_is_no_rejected_answer() -> None:
    """Ranks 1 and 2 both score 0.9."""
    assert pick("rank:2").dropped == "no rejected answer by rank"


def test_random_is_keyed_and_covers_every_lower_answer() -> None:
    """The same generator gives the same answer; over seeds all four lower answers come up."""
    assert pick("random", seed=3) == pick("random", seed=3)
    assert {pick("random", seed=seed).rejected[0] for seed in range(60)} == {0, 2, 4, 5}


@pytest.mark.parametrize(
    ("scores", "rank", "strategy", "reason"),
    [
        ([1.0], 1, "worst", "fewer than two distinct responses"),
        ([], 1, "worst", "fewer than two distinct responses"),
        ([0.5, 0.5, 0.5], 1, "worst", "all scores equal"),
        ([0.5, 0.1], 3, "worst", "fewer responses than the chosen rank"),
        ([0.5, 0.1], 2, "worst", "no rejected answer by worst"),
        ([0.5, 0.1], 1, "rank:3", "no rejected answer by rank"),
        ([0.5, 0.1], 1, "gap:0.5:1", "no rejected answer by gap"),
    ],
)
def test_sets_without_a_pair_say_why(scores: list[float], rank: int, strategy: str, reason: str) -> None:
    """The reason is what the run counts."""
    assert pick(strategy, rank, np.array(scores, dtype=np.float64)).dropped == reason


score_lists = st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=20)


@settings(max_examples=100, deadline=None)
@given(score_lists, st.sampled_from(EVERY), st.integers(1, 3))
def test_rejected_always_scores_lower(scores: list[float], strategy: str, rank: int) -> None:
    """Whatever the strategy; and what the chosen rank is, it is that rank."""
    found = pick(strategy, rank, np.array(scores))
    if not found.dropped:
        assert scores[found.rejected[0]] < scores[found.chosen]
        assert scores[found.chosen] == sorted(scores, reverse=True)[rank - 1]


@settings(max_examples=100, deadline=None)
@given(score_lists, st.sampled_from(EVERY))
def test_the_scale_of_scores_does_not_matter(scores: list[float], strategy: str) -> None:
    """For every strategy but the gap window; a power of two keeps the arithmetic exact."""
    if not strategy.startswith("gap"):
        assert pick(strategy, 1, np.array(scores)) == pick(strategy, 1, np.array(scores) * 4)


def test_ranking_and_lower_than() -> None:
    """Equal scores keep their order."""
    assert ranking(SCORES).tolist() == [1, 3, 5, 2, 0, 4]
    assert lower_than(SCORES, 3).tolist() == [5, 2, 0, 4]


def test_pick_ranking_spreads_over_distinct_scores() -> None:
    """Distinct scores 0.9 0.7 0.5 0.2 0.0 sit at 1 5 2 0 4; three of them evenly spaced: 1, 2, 4."""
    assert pick_ranking(candidates(), num=3) == Pick(1, (2, 4))
    assert pick_ranking(candidates(), num=5) == Pick(1, (5, 2, 0, 4))
    assert pick_ranking(candidates(), num=6).dropped == "fewer than 6 distinct scores"


def test_distinct_keeps_first_occurrences() -> None:
    """Order is kept."""
    assert distinct(["a", "b", "a", "c", "b"]) == [0, 1, 3]
    assert distinct([]) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wurst", "did you mean 'worst'"),
        ("mu-sigm", "did you mean 'mu-<k>sigma'"),
        ("rank:1", "must be >= 2"),
        ("gap:0.5:0.1", "low <= high"),
        ("rank:x", "did you mean 'rank:<r>'"),
    ],
)
def test_bad_strategies_are_refused(text: str, message: str) -> None:
    """With the nearest one."""
    with pytest.raises(ConfigError, match=message):
        parse_strategy(text)


@pytest.mark.parametrize(("strategy", "wanted"), [("length", "lengths"), ("near", "log-probabilities")])
def test_missing_features_are_named(strategy: str, wanted: str) -> None:
    """A set without lengths or log-probabilities cannot be matched on them."""
    with pytest.raises(ConfigError, match=f"needs the {wanted}"):
        pick_pair(
            Candidates(SCORES),
            rank=1,
            strategy=parse_strategy(strategy),
            generator=np.random.default_rng(0),
        )
