"""Losses of unlearning: hand values, sums over micro-batches, tiles."""

import math

import pytest
import torch

from postgrad.core.ops import Head
from postgrad.forgetting import text_losses
from postgrad.forgetting.text_losses import (
    BASELINES,
    Gone,
    Share,
    TextObjectiveConfig,
    bounded,
    greedy_hits,
    matched,
    matched_bounds,
    npo,
    odds_against,
    project,
    token_kl,
    unlearn_loss,
)


def gone(logprobs, lengths, bounds, base):
    """Rows of so many tokens, laid end to end."""
    sizes = torch.tensor(lengths, dtype=torch.int64)
    own = [torch.as_tensor(each, dtype=torch.float32) for each in (logprobs, bounds, base)]
    return Gone(own[0], torch.repeat_interleave(sizes), sizes, own[1], own[2])


def test_bounded_by_hand() -> None:
    """Losses a token 1, 2 and 3 against bounds 2.5, 2 and 1: 1.5 is lacking, then nothing."""
    rows = gone([-1.0, -0.5, -1.5, -2.0, -3.0], [3, 1, 1], [2.5, 2.5, 2.5, 2.0, 1.0], [0.0] * 3)
    assert bounded(rows).tolist() == [1.5, 0.0, 0.0]


def test_matched_by_hand() -> None:
    """A token of probability 1/2 has even odds: it lacks its whole bound; one beyond its bound lacks nothing."""
    rows = gone([math.log(0.5), math.log(0.1)], [2], [3.0, 1.0], [0.0])
    assert matched(rows).tolist() == pytest.approx([1.5], abs=1e-4)
    assert odds_against(torch.tensor([math.log(0.1)])).item() == pytest.approx(math.log(9), abs=1e-4)


def test_odds_reach_tokens_that_are_sure() -> None:
    """Where p is 1 in single precision, the loss is finite and its gradient is not 0."""
    logprobs = torch.tensor([0.0, -1e-9], requires_grad=True)
    (gradient,) = torch.autograd.grad(odds_against(logprobs).sum(), logprobs)
    assert torch.isfinite(gradient).all() and (gradient < -1).all()


def test_npo_by_hand() -> None:
    """A row as likely as before costs 2 / b log 2; one e times less likely 2 / b log(1 + e^-b)."""
    rows = gone([-3.0, -1.5, -2.5], [1, 2], [9.0] * 3, [-3.0, -3.0])
    expected = [2 / 0.5 * math.log(2), 2 / 0.5 * math.log1p(math.exp(-0.5))]
    assert npo(rows, 0.5).tolist() == pytest.approx(expected)


def test_npo_tends_to_the_plain_gradient() -> None:
    """With a small beta the gradient is that of the log-probability itself (gradient ascent)."""
    logprobs = torch.tensor([-3.0, -9.0], requires_grad=True)
    rows = gone(logprobs, [1, 1], [0.0, 0.0], [-1.0, -2.0])
    (gradient,) = torch.autograd.grad(npo(rows, 1e-4).sum(), logprobs)
    torch.testing.assert_close(gradient, torch.ones(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("kind", "total"), [("ascent", -3.0), ("difference", 2 - 3.0), ("idk", 2 + 3.0)])
def test_baselines_by_hand(kind: str, total: float) -> None:
    """Rows of 2 and 4 nats a token, 12 nats on 6 kept tokens; ascent takes no notice of what is kept."""
    rows = gone([-1.0, -3.0, -4.0], [2, 1], [0.0] * 3, [0.0] * 2)
    loss = unlearn_loss(torch.tensor(12.0), rows, torch.tensor(9.0), Share(6, 2, 1.0), BASELINES[kind])
    assert loss.total.item() == pytest.approx(total)


def test_matched_bounds_are_the_quantiles_in_the_rows_order() -> None:
    """Three rows get the quantiles 1/6, 1/2 and 5/6 of 0..6, lowest loss first."""
    bounds = matched_bounds(torch.tensor([0.3, 0.1, 0.2]), torch.arange(7.0))
    torch.testing.assert_close(bounds, torch.tensor([5.0, 1.0, 3.0]))


def test_matched_bounds_of_equal_groups_are_the_group() -> None:
    """Rows never seen, taken as the rows to forget, keep their middle: the median stays the median."""
    losses = torch.rand(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bounds = matched_bounds(losses, losses)
    assert bounds.median() == losses.median()
    assert (bounds.argsort() == losses.argsort()).all() and (bounds - losses).abs().max() < 0.03


def head(cap: float = 0.0) -> Head:
    noise = torch.Generator().manual_seed(1)
    return Head(torch.randn(11, 5, generator=noise), torch.randn(11, generator=noise), 0.7, cap)


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("tile", [3, 100])
def test_token_kl(monkeypatch: pytest.MonkeyPatch, tile: int, cap: float) -> None:
    """The sum of KL(base || model) over tokens and its gradient, whatever the tiles."""
    monkeypatch.setattr(text_losses, "tile_rows", lambda head: tile)
    noise = torch.Generator().manual_seed(2)
    ours, base = (torch.randn(8, 5, generator=noise) for _ in range(2))
    found, expected = (ours.clone().requires_grad_() for _ in range(2))
    divergence = token_kl(found, base, head(cap))
    p, q = (project(each, head(cap)).softmax(1) for each in (base, expected))
    reference = (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(divergence, reference)
    torch.testing.assert_close(
        torch.autograd.grad(divergence, found), torch.autograd.grad(reference, expected), atol=1e-5, rtol=1e-4
    )
    assert abs(float(token_kl(ours, ours, head(cap)))) < 1e-5


def test_greedy_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 where the target is the likeliest token."""
    monkeypatch.setattr(text_losses, "tile_rows", lambda head: 3)
    hidden = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
    best = project(hidden, head()).argmax(1)
    wrong = torch.tensor([0, 1, 0, 0, 1, 0, 0, 1])
    assert greedy_hits(hidden, head(), (best + wrong) % 11).tolist() == (1 - wrong).tolist()
    assert greedy_hits(hidden[:0], head(), best[:0]).shape == (0,)


@pytest.mark.parametrize("kind", ["matched", "bounded", "npo", "ascent", "difference", "idk"])
def test_parts_of_a_step_add_up(kind: str) -> None:
    """Two micro-batches, one without rows to forget, make the whole step's objective."""
    config = TextObjectiveConfig(kind=kind, beta=0.5, alpha=0.1)
    penalty = torch.tensor(4.0)
    rows = gone([-1.0, -0.5, -2.0], [2, 1], [2.0, 2.0, 3.0], [-1.0, -1.0])
    whole = unlearn_loss(torch.tensor(12.0), rows, penalty, Share(6, 2, 1.0), config)
    first = unlearn_loss(torch.tensor(5.0), rows, penalty, Share(6, 2, 0.75), config)
    second = unlearn_loss(torch.tensor(7.0), gone([], [], [], []), penalty, Share(6, 2, 0.25), config)
    for term, a, b in zip(whole, first, second, strict=True):
        torch.testing.assert_close(a + b, term)
    if kind == "bounded":
        assert whole.total.item() == pytest.approx(12 / 6 + 0.5 * (1.25 + 1) / 2 + 0.1 * 4)


def test_a_forgotten_row_is_left_alone() -> None:
    """Beyond its bound a row has no gradient; below it has that of its mean loss."""
    logprobs = torch.tensor([-10.0, -9.0, -1.0, -1.0], requires_grad=True)
    rows = gone(logprobs, [2, 2], [4.0] * 4, [0.0, 0.0])
    config = TextObjectiveConfig(kind="bounded", beta=1.0)
    loss = unlearn_loss(torch.tensor(0.0), rows, torch.tensor(0.0), Share(1, 2, 1.0), config)
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    assert gradient.tolist() == [0.0, 0.0, 0.25, 0.25] and loss.total.item() == 1.5
