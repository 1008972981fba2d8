"""The length-controlled win rate: the fit against scikit-learn's conditions, the rates against published ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from postgrad.alignment.alpaca_eval import won
from postgrad.alignment.length_control import (
    GAMED_WEIGHT,
    STRENGTHS,
    Rows,
    Weights,
    calibrate_difficulty,
    controlled_rate,
    fit_difficulty,
    fit_weights,
    gamed_rows,
    length_feature,
    model_rows,
    read_rates,
    read_weights,
)
from postgrad.core.metrics import spearman
from postgrad.errors import DataError

GAMED = ("gpt4_1106_preview_verbose", "gpt4_1106_preview_concise")
BASELINE = "gpt4_1106_preview"


@dataclass(frozen=True)
class Board:
    """AlpacaEval 2 as stored: judgements of some models, weights and rates of all."""

    wins: dict[str, np.ndarray]
    features: dict[str, np.ndarray]
    weights: dict[str, Weights]
    rates: dict[str, float]
    gamed_features: tuple[np.ndarray, ...]

    @property
    def complete(self) -> list[str]:
        """Models judged on all instructions."""
        return [name for name, wins in self.wins.items() if not np.isnan(wins).any()]


@pytest.fixture(scope="module")
def board(shared: Path) -> Board:
    folder = shared / "data/llm"
    weights = read_weights(folder / "alpaca_eval2_lc_weights.csv")
    rates = read_rates(folder / "alpaca_eval2_leaderboard.csv")
    matrix = np.load(folder / "alpaca_eval2_matrix.npz")
    names = [name for name in matrix["models"].tolist() if name in weights and name in rates]
    place = {name: i for i, name in enumerate(matrix["models"].tolist())}
    names.remove(BASELINE)
    lengths = pq.read_table(folder / "alpaca_eval_lengths.parquet").to_pandas()
    gamed = [lengths[lengths.model == name].sort_values("prompt_id").num_chars.to_numpy() for name in GAMED]
    return Board(
        wins={name: won(matrix["preference"][place[name]]) for name in names},
        features={name: length_feature(matrix["ref_chars"], matrix["output_chars"][place[name]]) for name in names},
        weights=weights,
        rates={name: rate for name, rate in rates.items() if name in weights},
        gamed_features=tuple(length_feature(matrix["ref_chars"], chars) for chars in gamed),
    )


@pytest.fixture(scope="module")
def rough(board: Board) -> np.ndarray:
    """Difficulties from judgements and stored weights alone."""
    names = board.complete
    return fit_difficulty(
        np.stack([board.wins[name] for name in names]),
        np.stack([board.features[name] for name in names]),
        [board.weights[name] for name in names],
    )


@pytest.fixture(scope="module")
def difficulty(board: Board, rough: np.ndarray) -> np.ndarray:
    """Difficulties that agree with all published rates."""
    names = list(board.rates)
    return calibrate_difficulty(rough, [board.weights[n] for n in names], [board.rates[n] for n in names])


def test_feature_by_hand() -> None:
    """Differences 1, 0, -1 have sd 1."""
    np.testing.assert_allclose(length_feature([3, 2, 1], [2, 2, 2]), np.tanh([1, 0, -1]))
    with pytest.raises(DataError, match="that differ"):
        length_feature([3, 3], [2, 2])


def test_rate_ignores_length() -> None:
    assert controlled_rate(Weights(9.0, 0.0, 0.0), np.zeros(3)) == 50
    assert controlled_rate(Weights(0.0, 1.0, np.log(3)), np.zeros(3)) == pytest.approx(75)


def test_fit_finds_the_weights_that_made_the_wins() -> None:
    rng = np.random.default_rng(0)
    true = np.array([-2.0, 1.0, 0.5])
    feature, difficulty = np.tanh(rng.normal(size=800)), rng.normal(size=800)
    features = np.stack([feature, difficulty, np.ones(800)], axis=1)
    rows = model_rows(1 / (1 + np.exp(-features @ true)), feature, difficulty)
    np.testing.assert_allclose(fit_weights(rows, strengths=[1e4]), true, atol=1e-3)
    np.testing.assert_allclose(fit_weights(rows), true, atol=0.05)


@pytest.mark.parametrize("strength", [0.01, 0.1, 3.0])
def test_fit_meets_the_optimality_conditions(strength: float) -> None:
    """At the minimum the loss's slope is -sign(w) where w is not 0, and within [-1, 1] where it is."""
    rng = np.random.default_rng(1)
    rows = Rows(rng.normal(size=(200, 3)), rng.random(200), rng.random(200))
    weights = np.array(fit_weights(rows, strengths=[strength]))
    predicted = 1 / (1 + np.exp(-rows.features @ weights))
    slope = strength * rows.features.T @ (rows.weights * (predicted - rows.wins))
    active = weights != 0
    np.testing.assert_allclose(slope[active], -np.sign(weights[active]), atol=1e-6)
    assert (np.abs(slope[~active]) <= 1 + 1e-9).all()


@pytest.mark.slow
def test_fit_equals_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model", reason="compares with scikit-learn where it is installed")
    rng = np.random.default_rng(2)
    rows = Rows(rng.normal(size=(300, 3)), rng.random(300), np.ones(300))
    model = linear.LogisticRegression(
        C=0.5, l1_ratio=1, solver="liblinear", fit_intercept=False, tol=1e-10, max_iter=10000
    )
    twice = np.concatenate([rows.features, rows.features])
    model.fit(twice, np.repeat([1, 0], 300), sample_weight=np.concatenate([rows.wins, 1 - rows.wins]))
    np.testing.assert_allclose(fit_weights(rows, strengths=[0.5]), model.coef_[0], atol=1e-5)


def test_gamed_rows_weigh_little_and_have_no_constant() -> None:
    rows = gamed_rows([np.zeros(4), np.ones(4)], [Weights(0, 0, 0), Weights(1, 0, -1)], np.arange(4.0))
    assert rows.weights.sum() == pytest.approx(4 * GAMED_WEIGHT)
    assert not rows.features[:, 2].any()
    np.testing.assert_allclose(rows.wins, 0.5)


def test_unreadable_judgements_are_left_out() -> None:
    rows = model_rows(np.array([0.0, np.nan, 1.0]), np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))
    np.testing.assert_array_equal(rows.features, [[1, 4, 1], [3, 6, 1]])
    np.testing.assert_array_equal(rows.wins, [0, 1])


def test_stored_weights_give_the_published_rates(board: Board, rough: np.ndarray) -> None:
    """Difficulties from the judgements of 50 models; the rates of all 199 follow."""
    names = list(board.rates)
    ours = [controlled_rate(board.weights[name], rough) for name in names]
    theirs = [board.rates[name] for name in names]
    assert (len(board.complete), len(names)) == (50, 199)
    assert np.abs(np.subtract(ours, theirs)).mean() < 0.4
    assert np.corrcoef(ours, theirs)[0, 1] > 0.999


@pytest.mark.parametrize("seed", range(5))
def test_rates_of_held_out_models_follow_from_the_others(board: Board, rough: np.ndarray, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(sorted(board.rates)).tolist()
    held, known = order[:50], order[50:]
    calibrated = calibrate_difficulty(
        rough, [board.weights[name] for name in known], [board.rates[name] for name in known]
    )
    errors = [abs(controlled_rate(board.weights[name], calibrated) - board.rates[name]) for name in held]
    assert np.mean(errors) < 0.02 and max(errors) < 0.2


@pytest.mark.parametrize(
    "strengths", [(20.0,), pytest.param(STRENGTHS, marks=pytest.mark.slow)], ids=["fixed", "cross-validated"]
)
def test_refitted_rates_are_close_to_the_published_ones(
    board: Board, difficulty: np.ndarray, strengths: tuple[float, ...]
) -> None:
    """From judgements and lengths to rates; tests the fit, since all rates shaped the difficulties."""
    gamed = gamed_rows(board.gamed_features, [board.weights[name] for name in GAMED], difficulty)
    implied = gamed.wins.reshape(2, -1).mean(axis=1)
    np.testing.assert_allclose(implied, [0.643, 0.229], atol=0.005)  # published raw rates 64.30 and 22.92
    names = board.complete
    own = [model_rows(board.wins[name], board.features[name], difficulty) for name in names]
    ours = [controlled_rate(fit_weights(rows, gamed, strengths), difficulty) for rows in own]
    theirs = [board.rates[name] for name in names]
    errors = np.abs(np.subtract(ours, theirs))
    assert errors.mean() < 0.7 and np.median(errors) < 0.5 and errors.max() < 2
    assert spearman(ours, theirs) > 0.998
    assert ours[names.index("NullModel")] == pytest.approx(86.9, abs=0.1)
    assert ours[names.index("gpt-3.5-turbo-1106")] == pytest.approx(20.6, abs=0.1)


def test_published_rates_of_incomplete_models_rest_on_shifted_difficulties(
    board: Board, difficulty: np.ndarray
) -> None:
    """Numbering the readable rows anew gives the published weights; the right difficulties give others."""
    gamed = gamed_rows(board.gamed_features, [board.weights[name] for name in GAMED], difficulty)
    # A sixth model lacks row 689 of 805 only, too late to show.
    incomplete = [name for name in board.wins if np.isnan(board.wins[name][:500]).any()]
    assert len(incomplete) == 5
    for name in incomplete:
        keep = ~np.isnan(board.wins[name])
        shifted = difficulty[: keep.sum()]
        wins, feature = board.wins[name][keep], board.features[name][keep]
        right = fit_weights(model_rows(wins, feature, difficulty[keep]), gamed, [20.0])
        wrong = fit_weights(model_rows(wins, feature, shifted), gamed, [20.0])
        published = board.weights[name].difficulty
        assert abs(wrong.difficulty - published) < 0.15 < right.difficulty - published


def test_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("model,a\nx,1\n")
    with pytest.raises(DataError, match="expected the columns model, length"):
        read_weights(path)
    with pytest.raises(DataError, match="length_controlled_winrate"):
        read_rates(path)
