"""Log-probabilities of answers under a policy and its reference, as the preference losses take them.

Log-probabilities are sums over an answer's tokens, in nats; column 0 is the chosen answer.

Letters: B prompts, K answers of a prompt, N target tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from postgrad.errors import ConfigError

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha:<number>")
EXPONENT_LIMIT = 80.0  # exp(80) still fits float32 and bfloat16


@dataclass(frozen=True)
class Logprobs:
    """What a preference loss sees of a batch."""

    policy: Float[Tensor, "B K"]
    reference: Float[Tensor, "B K"] | None = None
    lengths: Int[Tensor, "B K"] | None = None
    """Answer tokens, the stop token included."""
    p: Float[Tensor, " B"] | None = None
    """Probability that the chosen answer is the better one; none means 1."""

    @property
    def ratio(self) -> Float[Tensor, "B K"]:
        """Log-ratio of policy to reference; without a reference, the policy's log-probability."""
        return self.policy if self.reference is None else self.policy - self.reference

    @property
    def mean_policy(self) -> Float[Tensor, "B K"]:
        """Policy log-probability of an answer token, on average."""
        return self.policy / self.tokens

    @property
    def tokens(self) -> Float[Tensor, "B K"]:
        """Lengths to divide by."""
        assert self.lengths is not None, "preference_loss asks for lengths before a loss uses them"
        return self.lengths.clamp(min=1).to(self.policy.dtype)


def divergence_scores(ratio: Float[Tensor, "B K"], divergence: str) -> Float[Tensor, "B K"]:
    """Return f'(exp(ratio)) up to a constant: what takes the log-ratio's place under another f-divergence.

    reverse_kl: x; forward_kl: 1 - e^-x; js: log 2 + log s(x); alpha:a: (e^{(a - 1) x} - 1) / (a - 1).
    Source: Wang et al. 2023, "Beyond reverse KL" (arXiv 2309.16240), table 2.
    """
    kind, alpha = parse_divergence(divergence)
    if kind == "forward_kl":
        return 1 - torch.exp((-ratio).clamp(max=EXPONENT_LIMIT))
    if kind == "js":
        return math.log(2) + F.logsigmoid(ratio)
    if kind == "alpha" and abs(alpha - 1) > 1e-6:  # at 1 the limit is the plain log-ratio
        return torch.expm1(((alpha - 1) * ratio).clamp(max=EXPONENT_LIMIT)) / (alpha - 1)
    return ratio


def parse_divergence(divergence: str) -> tuple[str, float]:
    """Split "alpha:0.5" into its kind and number; the other kinds have none (0)."""
    kind, _, number = divergence.partition(":")
    if kind in ("reverse_kl", "forward_kl", "js") and not number:
        return kind, 0.0
    try:
        return {"alpha": kind}[kind], float(number)
    except (KeyError, ValueError):
        known = ", ".join(DIVERGENCES)
        raise ConfigError(f"divergence must be one of {known}; got {divergence!r}.") from None


def length_desensitised(
    values: Float[Tensor, " N"], sequence: Int[Tensor, " N"], lengths: Int[Tensor, "B 2"], *, alpha: float
) -> Float[Tensor, "B 2"]:
    """Sum log-probabilities by answer, weighting tokens past the pair's shorter length by alpha.

    Args: values: of target tokens, grouped by sequence. alpha: in [0, 1].
    Source: LD-DPO, Liu et al. 2024 (arXiv 2409.06411), eq. 9.
    """
    flat = lengths.flatten()  # [2B]
    first = flat.cumsum(0) - flat  # [2B] where each sequence begins
    place = torch.arange(values.shape[0], device=values.device) - first[sequence]  # [N]
    shared = lengths.amin(1, keepdim=True).expand_as(lengths).flatten()  # [2B]
    weight = torch.where(place < shared[sequence], 1.0, alpha).to(values.dtype)  # [N]
    return values.new_zeros(flat.shape[0]).index_add(0, sequence, values * weight).view_as(lengths)


def logratio_metrics(batch: Logprobs, beta: float) -> dict[str, tuple[Tensor, float]]:
    """Sum up what tells whether preference training goes well, as (sum, weight) over the batch's prompts.

    Both log-ratios falling together is likelihood displacement. ``kl`` is the mean of -log-ratio over all
    answers: an estimate of KL(reference || policy) where the reference wrote the answers. Without a reference,
    mean log-probabilities of a token stand in for the log-ratios.
    """
    values = (batch.mean_policy if batch.reference is None else batch.ratio).detach().float()  # [B, K]
    chosen, rejected = values[:, 0], values[:, 1:].mean(1)  # [B]
    gap = values[:, :1] - values[:, 1:]  # [B, K-1]
    kind = "logprob" if batch.reference is None else "logratio"
    metrics = {
        f"chosen_{kind}": chosen,
        f"rejected_{kind}": rejected,
        "margin": beta * (chosen - rejected),
        "accuracy": ((gap > 0) + 0.5 * (gap == 0)).float().mean(1),
    }
    if batch.reference is not None:
        metrics["kl"] = -values.mean(1)
    if batch.lengths is not None:
        metrics["chosen_length"] = batch.lengths[:, 0].float()
        metrics["rejected_length"] = batch.lengths[:, 1:].float().mean(1)
    return {name: (value.sum(), float(values.shape[0])) for name, value in metrics.items()}
