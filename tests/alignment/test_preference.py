"""Preference losses against numbers worked out by hand, and the properties of their formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.alignment.logratios import Logprobs, divergence_scores, length_desensitised, logratio_metrics
from postgrad.alignment.preference import LOSSES, MULTIWISE, REFERENCE_FREE, LossSettings, preference_loss
from postgrad.errors import ConfigError

GAP_LOSSES = ("sigmoid", "cdpo", "robust", "hinge", "exo_pair", "discopop")
"""Functions of d alone."""


def batch(c: float, j: float, *, p: float = 1.0) -> Logprobs:
    """One pair with log-ratios c and j; the chosen answer has 4 tokens, the rejected one 5."""
    reference = torch.tensor([[-8.0, -10.0]], dtype=torch.float64)
    ratio = torch.tensor([[c, j]], dtype=torch.float64)
    return Logprobs(
        policy=reference + ratio,
        reference=reference,
        lengths=torch.tensor([[4, 5]]),
        p=torch.tensor([p], dtype=torch.float64),
    )


def value(name: str, pair: Logprobs, **numbers: float) -> float:
    """The loss of the only pair."""
    return preference_loss(name, pair, LossSettings(**{"beta": 0.5, **numbers})).item()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # c = 2, j = -1, d = 3, beta = 0.5, e = 0.1; s(1.5) = 0.817574, s(1) = 0.731059, s(-0.5) = 0.377541.
        ("sigmoid", 0.201413),  # -log 0.817574
        ("cdpo", 0.351413),  # 0.9 * 0.201413 + 0.1 * (0.201413 + 1.5)
        ("robust", 0.013913),  # (0.9 * 0.201413 - 0.1 * 1.701413) / 0.8
        ("hinge", 0.0),  # max(0, 1 - 1.5)
        ("ipo", 0.09),  # (2 / 4 + 1 / 5 - 1)^2
        ("sigmoid_norm", 0.533382),  # -log s(0.5 * 0.7) = -log 0.586618
        ("apo_zero", 0.646482),  # 1 - 0.731059 + 0.377541
        ("apo_down", 0.913484),  # 0.731059 + 1 - 0.817574
        ("nca_pair", 1.206931),  # 0.313262 + 0.5 * 1.313262 + 0.5 * 0.474077
        ("bco_pair", 0.787339),  # 0.313262 + 0.474077
        ("sppo_hard", 1.0),  # (2 - 1)^2 + (-1 + 1)^2
        ("exo_pair", 0.031139),  # 0.817574 (-0.201413 + 0.105361) + 0.182426 (-1.701413 + 2.302585)
        ("aot", 0.351413),  # one pair: as cdpo
        ("aot_unpaired", 0.351413),
        ("sft", 1.5),  # -(-8 + 2) / 4
        ("simpo", 0.755957),  # x = 0.5 (-1.5 + 2.2) - 0.5 = -0.15: 0.9 * 0.770957 + 0.1 * 0.620957
        ("cpo", 1.828889),  # 1.5, and x = 0.5 (-6 + 11) = 2.5: 0.9 * 0.078889 + 0.1 * 2.578889
        ("pl_dpo", 0.201413),  # two answers: the sigmoid loss
        ("s_dpo", 0.201413),
    ],
)
def test_hand_values(name: str, expected: float) -> None:
    """Each loss equals the arithmetic of its line."""
    assert value(name, batch(2.0, -1.0), smoothing=0.1) == pytest.approx(expected, abs=2e-6)


def test_orpo_by_hand() -> None:
    """P_w = e^-1.5 = 0.223130, P_l = e^-2.2 = 0.110803; odds 0.287221 and 0.124610; log ratio 0.835036.

    1.5 - 0.5 log s(0.835036) = 1.5 + 0.5 * 0.360355 = 1.680177.
    """
    assert value("orpo", batch(2.0, -1.0)) == pytest.approx(1.680177, abs=2e-5)


def test_discopop_by_hand() -> None:
    """X = 1.5, tau = 1: s(1.5) = 0.817574; 0.182426 * 0.201413 + 0.817574 * e^-1.5 (0.223130) = 0.219168."""
    assert value("discopop", batch(2.0, -1.0), tau=1.0) == pytest.approx(0.219168, abs=2e-6)


def test_soft_labels_mix_both_orders() -> None:
    """With p = 0.8 and e = 0: 0.8 * 0.201413 + 0.2 * 1.701413 = 0.501413."""
    assert value("cdpo", batch(2.0, -1.0, p=0.8)) == pytest.approx(0.501413, abs=2e-6)


def test_plackett_luce_by_hand() -> None:
    """Ratios 2, 1, 0 with beta 1: log(e^2 + e + 1) - 2 + log(e + 1) - 1 = 0.407606 + 0.313262 = 0.720868."""
    ranked = Logprobs(policy=torch.tensor([[2.0, 1.0, 0.0]]), reference=torch.zeros(1, 3))
    loss = preference_loss("pl_dpo", ranked, LossSettings(beta=1.0))
    assert loss.item() == pytest.approx(0.720868, abs=1e-5)


def test_softmax_dpo_by_hand() -> None:
    """Ratios 2, 1, 0 with beta 1: log(e^-1 + e^-2) = -0.686738; -log s(0.686738) = 0.407606."""
    group = Logprobs(policy=torch.tensor([[2.0, 1.0, 0.0]]), reference=torch.zeros(1, 3))
    assert preference_loss("s_dpo", group, LossSettings(beta=1.0)).item() == pytest.approx(0.407606, abs=1e-5)


def test_plackett_luce_sums_to_one_over_rankings() -> None:
    """exp(-loss) is a probability of a ranking, so over all 24 rankings of four answers it sums to 1."""
    ratios = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    orders = torch.cartesian_prod(*[torch.arange(4)] * 4)
    orders = orders[torch.tensor([len(set(row.tolist())) == 4 for row in orders])]
    ranked = Logprobs(policy=ratios[orders], reference=torch.zeros(24, 4, dtype=torch.float64))
    assert preference_loss("pl_dpo", ranked, LossSettings()).neg().exp().sum().item() == pytest.approx(1.0)


def test_nll_is_added_to_any_loss() -> None:
    """0.201413 + 2 * 1.5."""
    assert value("sigmoid", batch(2.0, -1.0), nll=2.0) == pytest.approx(3.201413, abs=2e-6)


ratios = st.floats(-20, 20, allow_nan=False)


@settings(max_examples=50, deadline=None)
@given(ratios, ratios, ratios, st.sampled_from(GAP_LOSSES))
def test_gap_losses_ignore_a_common_shift(c: float, j: float, shift: float, name: str) -> None:
    """Losses of d alone do not see c and j move together."""
    numbers = {"smoothing": 0.1}
    before = value(name, batch(c, j), **numbers)
    after = value(name, batch(c + shift, j + shift), **numbers)
    assert after == pytest.approx(before, rel=1e-6, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(ratios, ratios, st.floats(0.0, 1.0))
def test_swapping_answers_swaps_the_label(c: float, j: float, p: float) -> None:
    """Cdpo of (w, l) with probability p equals cdpo of (l, w) with 1 - p."""
    assert value("cdpo", batch(c, j, p=p)) == pytest.approx(value("cdpo", batch(j, c, p=1 - p)), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(ratios, ratios, st.sampled_from(sorted(set(LOSSES) - REFERENCE_FREE - {"aot"})))
def test_only_log_ratios_matter(c: float, j: float, name: str) -> None:
    """Adding the same to policy and reference changes nothing."""
    pair = batch(c, j)
    assert pair.reference is not None
    moved = Logprobs(policy=pair.policy - 3, reference=pair.reference - 3, lengths=pair.lengths, p=pair.p)
    numbers = {"smoothing": 0.1}
    assert value(name, moved, **numbers) == pytest.approx(value(name, pair, **numbers), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"sft", "apo_down", "discopop"}))
def test_descent_raises_chosen_over_rejected(name: str) -> None:
    """At the reference a step down raises the chosen answer and lowers the rejected one.

    Left out: sft has no rejected answer, apo_down lowers both, discopop has a local maximum near d = 0.
    """
    policy = torch.tensor([[-8.0, -10.0]], dtype=torch.float64, requires_grad=True)
    pair = Logprobs(policy=policy, reference=policy.detach().clone(), lengths=torch.tensor([[4, 5]]))
    preference_loss(name, pair, LossSettings(smoothing=0.1)).sum().backward()
    assert policy.grad is not None
    assert policy.grad[0, 0] < 0 < policy.grad[0, 1]


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_equal_finite_differences(name: str) -> None:
    """Float64 gradients of every loss."""
    generator = torch.Generator().manual_seed(1)
    draw = torch.rand(3, 4 if name in MULTIWISE else 2, generator=generator, dtype=torch.float64)
    reference, lengths = -5 * draw.roll(1, 0) - 1, torch.full(draw.shape, 3)
    policy = (-6 * draw - 1).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return preference_loss(name, Logprobs(x, reference, lengths), LossSettings(smoothing=0.2, nll=0.3))

    assert torch.autograd.gradcheck(loss, (policy,))


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("gap", [-300.0, 300.0])
def test_extreme_ratios_stay_finite(name: str, gap: float) -> None:
    """Losses and gradients far from the reference, in float32; DiscoPOP's exp(-x) ends at beta d = -88."""
    policy = torch.tensor([[-400.0 + gap, -400.0]], requires_grad=True)
    pair = Logprobs(policy, torch.full((1, 2), -400.0), torch.tensor([[50, 60]]))
    loss = preference_loss(name, pair, LossSettings(beta=0.1, smoothing=0.1))
    loss.sum().backward()
    assert policy.grad is not None
    assert loss.isfinite().all() and policy.grad.isfinite().all()


def test_orpo_survives_certainty() -> None:
    """A mean log-probability of 0 has infinite odds; loss and gradient stay finite."""
    policy = torch.tensor([[0.0, -3.0]], requires_grad=True)
    preference_loss("orpo", Logprobs(policy, lengths=torch.tensor([[2, 2]])), LossSettings()).sum().backward()
    assert policy.grad is not None and policy.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_divergence_tends_to_the_log_ratio(alpha: float) -> None:
    """(e^{(a-1)x} - 1) / (a - 1): at 0.5 and x = 2, (e^-1 - 1) / -0.5 = 1.264241; at 2, e^2 - 1."""
    x = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    expected = {0.5: 1.264241, 1.0: 2.0, 2.0: math.exp(2) - 1}[alpha]
    assert divergence_scores(x, f"alpha:{alpha}")[0, 0].item() == pytest.approx(expected, abs=1e-6)


def test_divergences_share_the_slope_at_the_reference() -> None:
    """Where policy equals reference: slope 1 for reverse and forward KL and alpha, 1/2 for Jensen-Shannon."""
    for divergence, slope in (("reverse_kl", 1), ("forward_kl", 1), ("alpha:0.3", 1), ("js", 0.5)):
        x = torch.zeros(1, 2, requires_grad=True)
        divergence_scores(x, divergence).sum().backward()
        assert x.grad is not None
        assert x.grad[0, 0].item() == pytest.approx(slope)


def test_length_desensitised_by_hand() -> None:
    """Chosen -1 -1 -1, rejected -2 -2; alpha 0.5: chosen -1 -1 -0.5 = -2.5, rejected -4."""
    values = torch.tensor([-1.0, -1.0, -1.0, -2.0, -2.0])
    sequence = torch.tensor([0, 0, 0, 1, 1])
    summed = length_desensitised(values, sequence, torch.tensor([[3, 2]]), alpha=0.5)
    assert summed.tolist() == [[-2.5, -4.0]]
    assert length_desensitised(values, sequence, torch.tensor([[3, 2]]), alpha=1.0).tolist() == [[-3.0, -4.0]]


def test_metrics_by_hand() -> None:
    """Ratios (2, -1) and (-1, 0): sums 1 and -1, margin 0.5 * 2, one of two right, kl -0.5 + 0.5."""
    pairs = Logprobs(torch.tensor([[2.0, -1.0], [-1.0, 0.0]]), torch.zeros(2, 2), torch.tensor([[3, 4], [5, 6]]))
    metrics = {name: (float(total), weight) for name, (total, weight) in logratio_metrics(pairs, 0.5).items()}
    assert metrics == {
        "chosen_logratio": (1.0, 2.0),
        "rejected_logratio": (-1.0, 2.0),
        "margin": (1.0, 2.0),
        "accuracy": (1.0, 2.0),
        "kl": (0.0, 2.0),
        "chosen_length": (8.0, 2.0),
        "rejected_length": (10.0, 2.0),
    }


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("sigmiod", {}, "did you mean 'sigmoid'"),
        ("sigmoid", {"beta": 0.0}, "beta must be > 0, got 0.0"),
        ("sigmoid", {"beta": math.nan}, "beta must be > 0, got nan"),
        ("robust", {"smoothing": 0.5}, "below 0.5, got 0.5"),
        ("exo_pair", {}, "set smoothing > 0"),
        ("discopop", {"tau": 0.0}, "tau must be > 0"),
        ("sigmoid", {"nll": -1.0}, "nll must be >= 0"),
        ("sigmoid", {"divergence": "kl"}, "divergence must be one of"),
        ("sigmoid", {"divergence": "alpha:x"}, "divergence must be one of"),
        ("bco_pair", {"divergence": "js"}, "has no f-divergence"),
    ],
)
def test_bad_settings_are_refused(name: str, numbers: dict[str, float], message: str) -> None:
    """The message says what was found and what to do."""
    with pytest.raises(ConfigError, match=message):
        preference_loss(name, batch(1.0, 0.0), LossSettings(**numbers))


def test_a_batch_that_lacks_something_is_refused() -> None:
    """No lengths, no reference, too many answers."""
    policy = torch.zeros(1, 2)
    with pytest.raises(ConfigError, match=r"'ipo'.* needs answer lengths, found none"):
        preference_loss("ipo", Logprobs(policy, policy), LossSettings())
    with pytest.raises(ConfigError, match="needs answer lengths"):
        preference_loss("sigmoid", Logprobs(policy, policy), LossSettings(nll=0.1))
    with pytest.raises(ConfigError, match="needs reference log-probabilities"):
        preference_loss("sigmoid", Logprobs(policy), LossSettings())
    with pytest.raises(ConfigError, match="found 3 columns"):
        preference_loss("sigmoid", Logprobs(torch.zeros(1, 3), torch.zeros(1, 3)), LossSettings())


def test_shapes_are_checked() -> None:
    """A reference of one row is not broadcast over the policy's three."""
    with pytest.raises(TypeError):
        Logprobs(torch.zeros(3, 2), torch.zeros(1, 2))
