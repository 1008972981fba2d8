"""AlpacaEval's length-controlled win rate, and the two files it needs rebuilt from public ones.

Per model a logistic regression without intercept explains its wins over the baseline by three features:
z = tanh(d / sd(d)) with d = characters of the baseline's output - characters of the model's; the difficulty of
the instruction; and a constant. The length-controlled rate is the mean win predicted at z = 0. So that length
keeps its meaning for every model, two "gamed" sets, the baseline told to be verbose and to be concise, are fitted
along with a small weight and constant 0.

The difficulties and the gamed sets are on a hub only. Here the difficulties are estimated from stored judgements
and stored weights (`fit_difficulty`), then made to agree with published rates (`calibrate_difficulty`), and the
gamed sets are predicted from their two models' weights (`gamed_rows`). They are estimates, not the official files.

Letters: I instructions, M models, G rows, 3 = length, difficulty, constant.

Source:  Dubois et al. 2024, Length-controlled AlpacaEval.
Differs: a model with unreadable judgements keeps each difficulty at its instruction. The published rates of such
         models number the remaining rows anew and so pair them with the difficulties of other instructions,
         which moves them by up to 2.6 points (seen on five of the eleven).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from postgrad.errors import DataError

GAMED_WEIGHT = 0.2
"""Weight of the two gamed sets together, relative to the model's own rows."""
STRENGTHS = tuple(10.0 ** (-4 + 8 * i / 9) for i in range(10))
"""Weights of the likelihood against the L1 norm that cross-validation chooses from."""
NUM_FOLDS = 5
RIDGE = 0.3
"""Pull of the difficulties to 0: some instructions almost every model loses, and would have none."""
RATE_TOLERANCE = 1e-4
"""Published rates are matched to about a hundredth of a point."""

Vector = NDArray[np.float64]


class Weights(NamedTuple):
    """What the regression says of one model."""

    length: float
    difficulty: float
    constant: float


class Rows(NamedTuple):
    """Rows to fit: features, wins in [0, 1], weights."""

    features: Float[np.ndarray, "G 3"]
    wins: Float[np.ndarray, " G"]
    weights: Float[np.ndarray, " G"]


def length_feature(baseline_chars: ArrayLike, model_chars: ArrayLike) -> Float[np.ndarray, " I"]:
    """z = tanh(d / sd(d)), d = characters of the baseline's output - characters of the model's."""
    difference = np.asarray(baseline_chars, np.float64) - np.asarray(model_chars, np.float64)
    if difference.ndim != 1 or len(difference) < 2 or not difference.std() > 0:
        raise DataError(f"Expected lengths of two or more outputs that differ, found shape {difference.shape}.")
    feature: Vector = np.tanh(difference / difference.std(ddof=1))
    return feature


def controlled_rate(weights: Weights, difficulty: Float[np.ndarray, " I"]) -> float:
    """Win rate in percent at equal lengths, 100 * mean_i sigmoid(constant + weight * difficulty_i)."""
    return 100 * float(_sigmoid(weights.constant + weights.difficulty * difficulty).mean())


def model_rows(
    wins: Float[np.ndarray, " I"], feature: Float[np.ndarray, " I"], difficulty: Float[np.ndarray, " I"]
) -> Rows:
    """Rows of the model itself; an unreadable judgement (NaN) is left out."""
    keep = ~np.isnan(wins)
    features = np.stack([feature, difficulty, np.ones(len(wins))], axis=1)  # [I, 3]
    return Rows(features[keep], wins[keep], np.ones(int(keep.sum())))


def gamed_rows(
    features: Sequence[Float[np.ndarray, " I"]],
    weights: Sequence[Weights],
    difficulty: Float[np.ndarray, " I"],
) -> Rows:
    """Rows of the gamed sets, their unknown wins replaced by the ones their own weights predict."""
    parts, wins = [], []
    for feature, weight in zip(features, weights, strict=True):
        parts.append(np.stack([feature, difficulty, np.zeros(len(feature))], axis=1))  # [I, 3]
        wins.append(_sigmoid(weight.length * feature + weight.difficulty * difficulty + weight.constant))
    stacked = np.concatenate(parts)  # [G, 3]
    each = GAMED_WEIGHT / len(parts)
    return Rows(stacked, np.concatenate(wins), np.full(len(stacked), each))


def fit_weights(own: Rows, gamed: Rows | None = None, strengths: Sequence[float] = STRENGTHS) -> Weights:
    """Fit one model's regression; the L1 penalty is chosen by cross-validation over rows.

    minimise |w|_1 + C * sum_g s_g * (log(1 + exp(x_g w)) - y_g * x_g w).

    Args:    strengths: the values of C to choose from; a single one is taken as it is.
    """
    rows = own if gamed is None else Rows(*(np.concatenate(pair) for pair in zip(gamed, own, strict=True)))
    best = strengths[0]
    if len(strengths) > 1:
        fold = np.arange(len(rows.wins)) % NUM_FOLDS
        losses = sum(_fold_losses(rows, fold == k, strengths) for k in range(NUM_FOLDS))
        best = strengths[int(np.argmin(losses))]
    return Weights(*_fit_l1(rows, best, np.zeros(3)).tolist())


def fit_difficulty(
    wins: Float[np.ndarray, "M I"], features: Float[np.ndarray, "M I"], weights: Sequence[Weights]
) -> Float[np.ndarray, " I"]:
    """Estimate each instruction's difficulty from the wins of models whose weights are known.

    Maximum likelihood with a normal prior, one Newton search an instruction. Leave out models with NaN: their
    published weights rest on difficulties of other instructions (see above).
    """
    length, slope, constant = (np.array(column)[:, None] for column in zip(*weights, strict=True))  # [M, 1]
    difficulty = np.zeros(wins.shape[1])
    for _ in range(200):
        predicted = _sigmoid(length * features + slope * difficulty + constant)  # [M, I]
        gradient = (slope * (wins - predicted)).sum(axis=0) - RIDGE * difficulty  # [I]
        curvature = (slope**2 * predicted * (1 - predicted)).sum(axis=0) + RIDGE
        step = np.clip(gradient / curvature, -1, 1)
        difficulty = difficulty + step
        if np.abs(step).max() < 1e-10:
            break
    return difficulty


def calibrate_difficulty(
    start: Float[np.ndarray, " I"], weights: Sequence[Weights], rates: Sequence[float]
) -> Float[np.ndarray, " I"]:
    """Move difficulties as little as needed for the known weights to give the published rates.

    minimise |d - start|^2 + sum_m ((controlled_rate_m(d) - rate_m) / 100 / RATE_TOLERANCE)^2, by damped
    Gauss-Newton steps.
    """
    slope, constant = (np.array([w[i] for w in weights])[:, None] for i in (1, 2))  # [M, 1]
    target = np.array(rates) / 100  # [M]

    def residuals(difficulty: Vector) -> tuple[Vector, Vector]:
        wins = _sigmoid(slope * difficulty + constant)  # [M, I]
        jacobian = slope * wins * (1 - wins) / len(start)
        return (wins.mean(axis=1) - target) / RATE_TOLERANCE, jacobian / RATE_TOLERANCE

    difficulty, damping = start, 1e-3
    error, jacobian = residuals(difficulty)
    value = float(error @ error)
    for _ in range(60):
        gradient = jacobian.T @ error + difficulty - start  # [I]
        pull = 1 + damping
        inner = jacobian @ jacobian.T + pull * np.eye(len(target))  # [M, M]; fewer models than instructions
        step = -(gradient - jacobian.T @ np.linalg.solve(inner, jacobian @ gradient)) / pull
        error_there, jacobian_there = residuals(difficulty + step)
        moved = difficulty + step - start
        value_there = float(error_there @ error_there + moved @ moved)
        if value_there >= value:
            damping *= 4
            continue
        gain = value - value_there
        difficulty, error, jacobian, value = difficulty + step, error_there, jacobian_there, value_there
        damping /= 5
        if gain < 1e-3 * value:
            break
    return difficulty


def read_weights(path: Path) -> dict[str, Weights]:
    """Read the regression weights of AlpacaEval's repository: model, length, difficulty, constant."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    if not rows or [len(row) for row in rows[:2]] != [4, 4]:
        raise DataError(f"{path}: expected the columns model, length, difficulty, constant, found {rows[:1]}.")
    return {name: Weights(*map(float, values)) for name, *values in rows[1:]}


def read_rates(path: Path) -> dict[str, float]:
    """Read the length-controlled rates of a leaderboard, for the models that have one."""
    column = "length_controlled_winrate"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or column not in rows[0]:
        raise DataError(f"{path}: expected a leaderboard with the column {column}, found {list(rows[:1])}.")
    return {row[""]: float(row[column]) for row in rows if row[column]}


def _fold_losses(rows: Rows, held_out: NDArray[np.bool_], strengths: Sequence[float]) -> Vector:
    """Mean held-out loss for each strength."""
    train = Rows(*(part[~held_out] for part in rows))
    test = Rows(*(part[held_out] for part in rows))
    losses, weights = [], np.zeros(3)
    for strength in strengths:  # each fit starts where the weaker one ended
        weights = _fit_l1(train, strength, weights)
        losses.append(_loss(test, weights) / len(test.wins))
    return np.array(losses)


def _fit_l1(rows: Rows, strength: float, start: Vector) -> Vector:
    """Minimise |w|_1 + strength * loss by Newton steps, each a small L1 quadratic solved by coordinates."""
    weights = start
    value = float(np.abs(weights).sum()) + strength * _loss(rows, weights)
    for _ in range(100):
        predicted = _sigmoid(rows.features @ weights)  # [G]
        gradient = strength * rows.features.T @ (rows.weights * (predicted - rows.wins))  # [3]
        spread = rows.weights * predicted * (1 - predicted)
        curvature = strength * (rows.features * spread[:, None]).T @ rows.features  # [3, 3]
        step = _l1_newton(gradient, curvature, weights) - weights
        size = 1.0
        while size > 1e-8:
            there = weights + size * step
            value_there = float(np.abs(there).sum()) + strength * _loss(rows, there)
            if value_there <= value:
                break
            size /= 2
        if size <= 1e-8 or np.abs(there - weights).max() < 1e-9:
            return weights
        weights, value = there, value_there
    return weights


def _l1_newton(gradient: Vector, curvature: Vector, weights: Vector) -> Vector:
    """Minimise g (u - w) + (u - w) H (u - w) / 2 + |u|_1 over u, one coordinate after the other."""
    slopes, bends, old = gradient.tolist(), (curvature + 1e-12 * np.eye(3)).tolist(), weights.tolist()
    new = list(old)
    for _ in range(500):
        change = 0.0
        for j in range(3):
            pull = slopes[j] + sum(bends[j][k] * (new[k] - old[k]) for k in range(3)) - bends[j][j] * new[j]
            value = -math.copysign(max(abs(pull) - 1, 0.0), pull) / bends[j][j]
            change = max(change, abs(value - new[j]))
            new[j] = value
        if change < 1e-12:
            break
    return np.array(new)


def _loss(rows: Rows, weights: Vector) -> float:
    """Weighted logistic loss, summed."""
    logits = rows.features @ weights
    return float(rows.weights @ (np.logaddexp(0, logits) - rows.wins * logits))


def _sigmoid(x: Vector) -> Vector:
    """1 / (1 + exp(-x)) without overflow."""
    result: Vector = np.exp(-np.logaddexp(0, -x))
    return result
