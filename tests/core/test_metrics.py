"""Metrics against hand values, enumeration, simulation and known formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.core.metrics import (
    best_of_n,
    best_of_n_kl,
    best_of_n_per_prompt,
    bootstrap_interval,
    length_baseline,
    mean_interval,
    pair_accuracy,
    paired_difference,
    spearman,
    wilson_interval,
    win_rate,
)
from postgrad.errors import DataError


def enumerated(proxy: list[float], gold: list[float], n: int) -> float:
    """Mean over every subset of size n of the gold of its proxy-best; ties among the best average."""
    picks = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        # A tie is broken at random, among all responses of that score that could stand in for it.
        block = [gold[i] for i in range(len(proxy)) if proxy[i] == top]
        picks.append(sum(block) / len(block))
    return sum(picks) / len(picks)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 5)), min_size=1, max_size=7))
def test_best_of_n_equals_enumeration_of_all_subsets(pairs: list[tuple[int, float]]) -> None:
    proxy, gold = [float(p) for p, _ in pairs], [g for _, g in pairs]
    ns = range(1, len(pairs) + 1)
    got = best_of_n_per_prompt([proxy], [gold], list(ns))[0]
    np.testing.assert_allclose(got, [enumerated(proxy, gold, n) for n in ns], atol=1e-9)


def test_random_tie_breaking_gives_the_same_expectation() -> None:
    """Subset first, tie at random inside the subset: the tied-block mean is its expectation."""
    proxy, gold = [1.0, 2.0, 2.0, 0.0, 2.0], [0.1, 0.9, 0.3, 0.7, 0.2]
    values = []
    for subset in itertools.combinations(range(5), 3):
        top = max(proxy[i] for i in subset)
        values.append(np.mean([gold[i] for i in subset if proxy[i] == top]))
    assert best_of_n_per_prompt([proxy], [gold], [3])[0, 0] == pytest.approx(np.mean(values))


def test_best_of_n_equals_simulation_for_64_responses() -> None:
    rng = np.random.default_rng(0)
    gold = rng.normal(size=64)
    proxy = gold + rng.normal(size=64)
    draws = np.argsort(rng.random((20000, 64)), axis=1)[:, :8]
    picked = draws[np.arange(20000), proxy[draws].argmax(axis=1)]
    value = best_of_n_per_prompt([proxy], [gold], [8])[0, 0]
    assert abs(value - gold[picked].mean()) < 4 * gold[picked].std() / math.sqrt(20000)


def test_best_of_n_ends_are_the_mean_and_the_top() -> None:
    rng = np.random.default_rng(1)
    proxy, gold = rng.random((5, 200)), rng.random((5, 200))
    values = best_of_n_per_prompt(proxy, gold, [1, 200])
    np.testing.assert_allclose(values[:, 0], gold.mean(axis=1))
    np.testing.assert_allclose(values[:, 1], gold[np.arange(5), proxy.argmax(axis=1)])


def test_oracle_curve_rises_and_bounds_the_proxy() -> None:
    rng = np.random.default_rng(2)
    gold = rng.random((30, 16))
    proxy = gold + 0.5 * rng.normal(size=gold.shape)
    ns = (1, 2, 4, 8, 16)
    oracle, curve = best_of_n(gold, gold, ns), best_of_n(proxy, gold, ns)
    assert list(oracle.mean) == sorted(oracle.mean)
    assert all(a >= b - 1e-12 for a, b in zip(oracle.mean, curve.mean, strict=True))
    assert all(low <= mean <= high for low, mean, high in zip(curve.low, curve.mean, curve.high, strict=True))
    assert oracle.best_n == 16


def test_prompts_with_fewer_responses_leave_the_curve_where_they_end() -> None:
    curve = best_of_n([[1, 2], [1, 2, 3]], [[0, 1], [0, 0, 1]], [1, 2, 3])
    assert curve.num_prompts == (2, 2, 1)
    assert curve.mean == pytest.approx(((0.5 + 1 / 3) / 2, (1 + 2 / 3) / 2, 1.0))


def test_same_seed_same_interval_and_coverage_is_close_to_nominal() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(100):
        gold = rng.random((40, 4))
        curve = best_of_n(gold, gold, [4], seed=trial, resamples=200)
        hits += curve.low[0] <= 0.8 <= curve.high[0]  # the mean of the largest of 4 uniforms is 4/5
    assert hits >= 87
    assert best_of_n(gold, gold, [2], seed=7) == best_of_n(gold, gold, [2], seed=7)


def test_best_of_n_says_what_is_wrong() -> None:
    with pytest.raises(DataError, match="same prompts, found 1 and 2"):
        best_of_n([[1.0]], [[1.0], [2.0]], [1])
    with pytest.raises(DataError, match=r"Prompt 0.*one score a response"):
        best_of_n([[1.0, 2.0]], [[1.0]], [1])
    with pytest.raises(DataError, match="best-of-8 needs 8 responses of a prompt, found at most 2"):
        best_of_n([[1.0, 2.0]], [[1.0, 2.0]], [8])
    with pytest.raises(DataError, match="finite"):
        best_of_n([[math.nan]], [[1.0]], [1])
    with pytest.raises(DataError, match="n >= 1"):
        best_of_n([[1.0]], [[1.0]], [0])


def test_kl_bound_of_64_is_3_17_nats() -> None:
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(64) == pytest.approx(3.17, abs=0.01)


def test_mean_interval_by_hand() -> None:
    """Values 1, 2, 3: sd 1, so the half width is 1.96 / sqrt(3)."""
    value, low, high = mean_interval([1, 2, 3])
    assert value == 2
    assert high - value == pytest.approx(1.959964 / math.sqrt(3))
    assert value - low == pytest.approx(high - value)
    assert math.isnan(mean_interval([5.0]).low)
    with pytest.raises(DataError, match="non-empty"):
        mean_interval([])


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    data = np.random.default_rng(4).normal(size=500)
    normal, boot = mean_interval(data), bootstrap_interval(data, seed=0, resamples=4000)
    assert boot.low == pytest.approx(normal.low, abs=0.01)
    assert boot.high == pytest.approx(normal.high, abs=0.01)


def test_wilson_by_hand() -> None:
    """8 of 10: the interval of the literature is 0.4902 to 0.9433."""
    assert wilson_interval(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10).low == 0 and wilson_interval(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert wilson_interval(10, 10).high == 1
    with pytest.raises(DataError, match="got 3 of 2"):
        wilson_interval(3, 2)


def test_ties_count_half() -> None:
    assert win_rate([1, 0.5, 0, 0.5]).value == 0.5
    assert pair_accuracy([3, 1, 2], [1, 1, 5]).value == 0.5
    assert length_baseline(["long", "a", "same"], ["x", "bb", "size"]).value == 0.5
    with pytest.raises(DataError, match="between 0 and 1"):
        win_rate([1, 2])


def test_pairing_shrinks_the_interval() -> None:
    rng = np.random.default_rng(5)
    before = rng.normal(size=200)
    after = before + 0.1
    gain = paired_difference(after, before)
    assert gain.value == pytest.approx(0.1)
    assert gain.high - gain.low < 1e-9
    with pytest.raises(DataError, match="found 2 and 1"):
        paired_difference([1, 2], [1])


def test_spearman() -> None:
    assert spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman([1, 1], [1, 2]))
