"""Preference losses: pure functions from log-probabilities of answers to one loss a prompt.

Column 0 is the chosen answer, the columns after it are the rejected ones, best first. Each docstring gives
the formula, with c and j the log-ratios log(policy / reference) of chosen and rejected, d = c - j, n the
number of answer tokens and s the logistic function.

Letters: B prompts, K answers of a prompt (2 but for the multiwise losses).
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from postgrad.alignment.logratios import Logprobs, divergence_scores, parse_divergence
from postgrad.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The numbers in the formulas."""

    beta: float = 0.1
    """Pull towards the reference, > 0."""
    smoothing: float = 0.0
    """Chance e that a label is wrong, in [0, 0.5): cdpo, robust, exo_pair, aot, aot_unpaired, simpo, cpo."""
    gamma: float = 0.5
    """SimPO: margin by which the chosen answer should lead, after beta."""
    tau: float = 0.05
    """DiscoPOP: temperature of the blend, > 0."""
    nll: float = 0.0
    """Weight of the chosen answer's mean negative log-likelihood, added to any loss."""
    divergence: str = "reverse_kl"
    """f-divergence behind d: reverse_kl (plain DPO), forward_kl, js or alpha:<number>."""


PreferenceLoss = Callable[[Logprobs, LossSettings], Tensor]


def sigmoid_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return -log s(beta d).

    Source: DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.
    """
    return -F.logsigmoid(settings.beta * _difference(batch, settings))


def cdpo_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return -q log s(beta d) - (1 - q) log s(-beta d), with q = (1 - e) p + e (1 - p).

    With p = 1 this is conservative DPO; with a judge's probability p it is DPO on soft labels.
    Source: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    q: Tensor | float = 1 - settings.smoothing
    if batch.p is not None:
        q = q * batch.p + settings.smoothing * (1 - batch.p)
    return _noisy_sigmoid(settings.beta * _difference(batch, settings), q)


def robust_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return [-(1 - e) log s(beta d) + e log s(-beta d)] / (1 - 2e), unbiased under label noise e.

    Source: rDPO, Chowdhury et al. 2024 (arXiv 2403.00409), eq. 12.
    """
    e, logits = settings.smoothing, settings.beta * _difference(batch, settings)
    return (-(1 - e) * F.logsigmoid(logits) + e * F.logsigmoid(-logits)) / (1 - 2 * e)


def hinge_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return max(0, 1 - beta d).

    Source: SLiC-HF (arXiv 2305.10425) as normalised in RSO (arXiv 2309.06657).
    """
    return torch.relu(1 - settings.beta * _difference(batch, settings))


def ipo_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return (c / n_w - j / n_l - 1 / (2 beta))^2.

    Source: IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17.
    Differs: log-ratios are means over tokens, as in common practice; the paper does not say.
    """
    return (_mean_difference(batch, settings) - 1 / (2 * settings.beta)) ** 2


def sigmoid_norm_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return -log s(beta (c / n_w - j / n_l)); beta is larger here, about 5.

    Source: length-normalised DPO, Tulu 3 (arXiv 2411.15124), eq. 6.
    """
    return -F.logsigmoid(settings.beta * _mean_difference(batch, settings))


def apo_zero_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return 1 - s(beta c) + s(beta j): for chosen answers better than the model's own.

    Source: APO, D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7.
    """
    c, j = batch.ratio.unbind(1)
    return 1 - torch.sigmoid(settings.beta * c) + torch.sigmoid(settings.beta * j)


def apo_down_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return s(beta c) + 1 - s(beta d): for chosen answers worse than the model's own.

    Source: APO, D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8.
    """
    c, j = batch.ratio.unbind(1)
    return torch.sigmoid(settings.beta * c) + 1 - torch.sigmoid(settings.beta * (c - j))


def nca_pair_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return -log s(beta c) - 0.5 log s(-beta c) - 0.5 log s(-beta j): absolute likelihoods, not their order.

    Source: NCA, Chen et al. 2024 (arXiv 2402.05369), eq. 11 with two answers.
    """
    c, j = (settings.beta * batch.ratio).unbind(1)
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-j)


def bco_pair_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return -log s(beta c) - log s(-beta j).

    Source: BCO, Jung et al. 2024 (arXiv 2404.04656). Differs: no running reward offset.
    """
    c, j = (settings.beta * batch.ratio).unbind(1)
    return -F.logsigmoid(c) - F.logsigmoid(-j)


def sppo_hard_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return (c - 1 / (2 beta))^2 + (j + 1 / (2 beta))^2.

    Source: SPPO, Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with win probabilities 1 and 0.
    """
    c, j = batch.ratio.unbind(1)
    return (c - 0.5 / settings.beta) ** 2 + (j + 0.5 / settings.beta) ** 2


def exo_pair_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return KL(q || r) of q = (s(beta d), s(-beta d)) and r = (1 - e, e); needs e > 0.

    Source: EXO, Ji et al. 2024 (arXiv 2402.00856), eq. 16.
    """
    logits = settings.beta * _difference(batch, settings)
    win, lose = F.logsigmoid(logits), F.logsigmoid(-logits)
    e = settings.smoothing
    return win.exp() * (win - math.log1p(-e)) + lose.exp() * (lose - math.log(e))


def discopop_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return (1 - s(x / tau)) * -log s(x) + s(x / tau) * exp(-x), with x = beta d.

    Source: DiscoPOP, Lu et al. 2024 (arXiv 2406.08414), eq. 5.
    """
    x = settings.beta * _difference(batch, settings)
    blend = F.logsigmoid(x / settings.tau)
    # exp(-x) alone overflows where its share vanishes, so the two exponents are added first.
    return (1 - blend.exp()) * -F.logsigmoid(x) + torch.exp(blend - x)


def aot_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return the smoothed logistic loss of sorted policy gaps minus sorted reference gaps.

    Source: AOT paired, Melnyk et al. 2024 (arXiv 2406.05882).
    Differs: the sort runs over one micro-batch, so this loss alone depends on how a step is split.
    """
    assert batch.reference is not None, "preference_loss asks for a reference first"
    policy = batch.policy[:, 0] - batch.policy[:, 1]  # [B]
    reference = batch.reference[:, 0] - batch.reference[:, 1]  # [B]
    gap = policy.sort().values - reference.sort().values
    return _noisy_sigmoid(settings.beta * gap, 1 - settings.smoothing)


def aot_unpaired_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return the smoothed logistic loss of sorted chosen minus sorted rejected log-ratios.

    Source: AOT unpaired, Melnyk et al. 2024 (arXiv 2406.05882). Differs: as `aot_loss`.
    """
    c, j = batch.ratio.unbind(1)
    return _noisy_sigmoid(settings.beta * (c.sort().values - j.sort().values), 1 - settings.smoothing)


def sft_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return the mean negative log-likelihood of the chosen answer's tokens.

    Source: the NLL term of iterative RPO, Pang et al. 2024 (arXiv 2404.19733), eq. 1.
    Differs from TRL: a mean for each answer, not over all tokens of the batch.
    """
    return -batch.mean_policy[:, 0]


def simpo_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return -log s(beta (log pi_w / n_w - log pi_l / n_l) - gamma), smoothed by e; no reference.

    Source: SimPO, Meng et al. 2024 (arXiv 2405.14734), eq. 6.
    """
    mean = batch.mean_policy
    logits = settings.beta * (mean[:, 0] - mean[:, 1]) - settings.gamma
    return _noisy_sigmoid(logits, 1 - settings.smoothing)


def cpo_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return -log s(beta (log pi_w - log pi_l)), smoothed by e, plus NLL_w / n_w; no reference.

    Source: CPO, Xu et al. 2024 (arXiv 2401.08417), eq. 3.
    Differs: the likelihood term is a mean over tokens, as in common practice.
    """
    logits = settings.beta * (batch.policy[:, 0] - batch.policy[:, 1])
    return _noisy_sigmoid(logits, 1 - settings.smoothing) - batch.mean_policy[:, 0]


def orpo_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return NLL_w / n_w - beta log s(log odds_w - log odds_l); no reference.

    The odds are P / (1 - P) with P = exp(log pi / n); beta is the paper's lambda.
    Source: ORPO, Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7.
    """
    mean = batch.mean_policy
    odds = mean - _log_one_minus_exp(mean)  # [B, 2]
    return -mean[:, 0] - settings.beta * F.logsigmoid(odds[:, 0] - odds[:, 1])


def pl_dpo_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return -sum_k log softmax over {k..K} of beta * log-ratio at k: the likelihood of the whole ranking.

    Columns are ranked best first. With K = 2 it is the sigmoid loss.
    Source: DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 20.
    """
    x = settings.beta * batch.ratio  # [B, K]
    tail = x.flip(1).logcumsumexp(1).flip(1)  # [B, K] log sum over {k..K}
    return (tail - x)[:, :-1].sum(1)  # the last softmax has one member


def s_dpo_loss(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return -log s(-log sum_j exp(beta (j - c))): one chosen against all rejected, unranked.

    With K = 2 it is the sigmoid loss.
    Source: Softmax-DPO, Chen et al. 2024 (arXiv 2406.09215), eq. 9.
    """
    x = settings.beta * batch.ratio
    return -F.logsigmoid(-torch.logsumexp(x[:, 1:] - x[:, :1], dim=1))


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": sigmoid_loss,
    "cdpo": cdpo_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "exo_pair": exo_pair_loss,
    "discopop": discopop_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "sft": sft_loss,
    "simpo": simpo_loss,
    "cpo": cpo_loss,
    "orpo": orpo_loss,
    "pl_dpo": pl_dpo_loss,
    "s_dpo": s_dpo_loss,
}
REFERENCE_FREE = frozenset({"sft", "simpo", "cpo", "orpo"})
MULTIWISE = frozenset({"pl_dpo", "s_dpo"})
_NEEDS_LENGTHS = REFERENCE_FREE | {"ipo", "sigmoid_norm"}
_USES_DIVERGENCE = frozenset({"sigmoid", "cdpo", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop"})


def preference_loss(name: str, batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    """Return the loss of each prompt, by the loss's name, plus ``settings.nll`` times `sft_loss`.

    Raises: ConfigError: an unknown name, a number out of range, or a batch that lacks what the loss needs.
    """
    check_loss(name, settings)
    num = batch.policy.shape[1]
    if num < 2 or (num > 2 and name not in MULTIWISE):
        wanted = "at least 2" if name in MULTIWISE else "2 (chosen, rejected)"
        raise ConfigError(f"The loss {name!r} needs {wanted} answers a prompt, found {num} columns.")
    if batch.reference is None and name not in REFERENCE_FREE:
        raise ConfigError(f"The loss {name!r} needs reference log-probabilities, found none.")
    if batch.lengths is None and (name in _NEEDS_LENGTHS or settings.nll > 0):
        raise ConfigError(f"The loss {name!r} with nll={settings.nll:g} needs answer lengths, found none.")
    loss = LOSSES[name](batch, settings)
    return loss + settings.nll * sft_loss(batch, settings) if settings.nll > 0 else loss


def check_loss(name: str, settings: LossSettings) -> None:
    """Refuse an unknown loss or a number its formula cannot take."""
    if name not in LOSSES:
        nearest = difflib.get_close_matches(name, LOSSES, n=1, cutoff=0.0)[0]
        known = ", ".join(LOSSES)
        raise ConfigError(f"Unknown preference loss {name!r}; did you mean {nearest!r}? Known: {known}.")
    if not settings.beta > 0:
        raise ConfigError(f"beta must be > 0, got {settings.beta}.")
    if not 0 <= settings.smoothing < 0.5:
        raise ConfigError(f"smoothing must be at least 0 and below 0.5, got {settings.smoothing}.")
    if name == "exo_pair" and settings.smoothing == 0:
        raise ConfigError("The loss 'exo_pair' takes log(smoothing): set smoothing > 0, for instance 0.001.")
    if not settings.tau > 0:
        raise ConfigError(f"tau must be > 0, got {settings.tau}.")
    if settings.nll < 0:
        raise ConfigError(f"nll must be >= 0, got {settings.nll}.")
    parse_divergence(settings.divergence)
    if settings.divergence != "reverse_kl" and name not in _USES_DIVERGENCE:
        users = ", ".join(sorted(_USES_DIVERGENCE))
        raise ConfigError(f"The loss {name!r} has no f-divergence; divergence may be set for: {users}.")


def _difference(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    scores = divergence_scores(batch.ratio, settings.divergence)
    return scores[:, 0] - scores[:, 1]


def _mean_difference(batch: Logprobs, settings: LossSettings) -> Float[Tensor, " B"]:
    scores = divergence_scores(batch.ratio, settings.divergence) / batch.tokens
    return scores[:, 0] - scores[:, 1]


def _noisy_sigmoid(logits: Float[Tensor, " B"], q: Tensor | float) -> Float[Tensor, " B"]:
    """Return the cross-entropy of s(logits) with the label's probability q."""
    return -q * F.logsigmoid(logits) - (1 - q) * F.logsigmoid(-logits)


def _log_one_minus_exp(x: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Return log(1 - e^x) for x < 0 without cancellation; x is kept away from 0, where it is -inf."""
    x = x.clamp(max=-1e-6)
    near = x > -math.log(2)
    # Each branch sees only arguments it can take, or its gradient would be NaN under the mask.
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, small, large)
