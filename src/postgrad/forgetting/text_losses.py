"""Losses that make a language model forget some rows and keep others, as sums that add up over micro-batches.

Formula: L = NLL(retain) + beta * mean_s F(s) + kl * KL(base || model)(retain) + alpha * sum_g ||g||_2
         with NLL and KL a token, s the forgotten rows, and g the LoRA matrices of one block taken as one vector;
         F(s) = mean_t relu(bound_t - log((1 - p_t) / p_t)), t the tokens of the answers ("matched"), or
         F(s) = relu(bound - mean_t NLL_t) ("bounded"), or
         F(s) = -2 / b * log sigmoid(-b (log p(s) - log p_base(s))), log p(s) the whole row's ("npo"), or
         F(s) = -mean_t NLL_t ("difference", and without NLL(retain) "ascent"), or
         F(s) = mean_t NLL_t of "I do not know" in its answer's place ("idk").
Source:  GS-LoRA (arXiv 2403.11530) with token means in place of a classifier's cross entropy: "bounded"; NPO (arXiv
         2404.05868); gradient ascent, gradient difference and IDK as in TOFU (arXiv 2401.06121).
Differs: "matched" gives every token a bound of its own, so that together they look like tokens of rows never seen. A
         bound on a row's mean is met by a few tokens made very unlikely, while the model still knows the others, and
         one bound for all makes forgotten rows stand out by their high loss.

Letters: N target tokens, S sequences, D width, V vocabulary, M tokens of rows never seen.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from postgrad.core.ops import TILE_ELEMENTS, Head, sum_by_sequence

SURE = 1e-6
"""Probabilities closer to 1 than this count as equally sure."""

Kind = Literal["matched", "bounded", "npo", "ascent", "difference", "idk"]


@dataclass(frozen=True, kw_only=True)
class TextObjectiveConfig:
    """Weights and bounds of the terms of the objective."""

    kind: Kind = "matched"
    """What is asked of rows to forget: to be like rows never seen (if none are known, "bounded"), one bound, or a
    baseline: NPO, gradient ascent, gradient difference, "I do not know"."""
    bound: float = 0.0
    """Nats a token at which a row counts as forgotten, unless bounds are matched; 0 = ln V."""
    beta: float = 0.2
    """Weight of the forgetting term."""
    npo: float = 0.1
    """NPO's beta: the higher, the sooner a row that became less likely is left alone."""
    kl: float = 0.0
    """Weight of the divergence from the model as it was on retained rows; costs a second forward pass."""
    alpha: float = 0.1
    """Weight of the sum of group norms."""
    alpha_until: float = 0.5
    """Share of the steps in which norms count; then blocks whose norm is near zero are let go, the others train on."""
    kept: int = 4
    """Rows to keep that each row to forget is seen with."""
    tolerance: float = 0.05
    """Training stops when rows are forgotten and the loss of those to keep rose by at most so many nats a token."""


BASELINES: dict[str, TextObjectiveConfig] = {
    kind: TextObjectiveConfig(kind=kind, beta=1.0, alpha=0.0) for kind in ("ascent", "difference", "npo", "idk")
}
"""Published objectives, with their weights: on all blocks, without the penalty on groups."""


class Gone(NamedTuple):
    """Rows to forget, token by token."""

    logprobs: Float[Tensor, " N"]
    sequence: Int[Tensor, " N"]
    """Whose token it is."""
    lengths: Int[Tensor, " S"]
    bounds: Float[Tensor, " N"]
    base: Float[Tensor, " S"]
    """Log-probabilities of the whole rows under the model as it was."""

    def rows(self, values: Float[Tensor, " N"]) -> Float[Tensor, " S"]:
        """Add up values by row."""
        return sum_by_sequence(values, self.sequence, len(self.lengths))


class Share(NamedTuple):
    """What a micro-batch is to be divided by: the counts of the whole step, over all micro-batches and ranks."""

    tokens: int
    """Target tokens of retained rows."""
    rows: int
    """Rows to forget."""
    part: float
    """Share of the step's rows that this micro-batch has."""


def matched_bounds(seen: Float[Tensor, " N"], unseen: Float[Tensor, " M"]) -> Float[Tensor, " N"]:
    """Give each token to forget a loss to reach, so that together they are spread as those of rows never seen.

    Args: seen: losses of the tokens to forget, now; the token with the lowest gets the lowest quantile.
    """
    ranked = unseen.sort().values
    places = (torch.arange(len(seen), device=unseen.device, dtype=torch.float64) + 0.5) / len(seen) * len(unseen)
    bounds = torch.empty_like(seen)
    bounds[seen.argsort(stable=True)] = ranked[places.long()].to(seen.dtype)
    return bounds


def odds_against(logprobs: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return log((1 - p) / p): as -log p where p is small, but falling without end as p goes to 1.

    Its gradient reaches tokens that the model is sure of, where that of log p vanishes.
    """
    return torch.log(-torch.expm1(logprobs - SURE)) - logprobs


def matched(gone: Gone) -> Float[Tensor, " S"]:
    """Return what each row's tokens lack to their bounds, on average; in logarithms of odds."""
    return gone.rows(F.relu(gone.bounds - odds_against(gone.logprobs))) / gone.lengths


def bounded(gone: Gone) -> Float[Tensor, " S"]:
    """Return what each row's loss a token lacks to its bound."""
    return F.relu(gone.rows(gone.bounds + gone.logprobs)) / gone.lengths


def npo(gone: Gone, beta: float) -> Float[Tensor, " S"]:
    """Return NPO's loss of each row: 2 / beta * log(1 + (p / p_base)^beta)."""
    return -2 / beta * F.logsigmoid(-beta * (gone.rows(gone.logprobs) - gone.base))


def project(hidden: Float[Tensor, "N D"], head: Head) -> Float[Tensor, "N V"]:
    """Compute logits, in float32."""
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    logits = head.scale * F.linear(hidden, head.weight.to(hidden.dtype), bias).float()
    return head.cap * torch.tanh(logits / head.cap) if head.cap else logits


def token_kl(hidden: Float[Tensor, "N D"], base: Float[Tensor, "N D"], head: Head) -> Float[Tensor, ""]:
    """Return the sum over tokens of KL(base || model), in nats; logits stand a tile at a time, both ways.

    Args: hidden, base: what the head reads, of the model and of the model as it was.
    """

    def tile(ours: Tensor, theirs: Tensor) -> Tensor:
        target = F.log_softmax(project(theirs, head), dim=1)
        return F.kl_div(F.log_softmax(project(ours, head), dim=1), target, reduction="sum", log_target=True)

    total = hidden.new_zeros((), dtype=torch.float32)
    size = tile_rows(head)
    for at in range(0, len(hidden), size):
        part = hidden[at : at + size], base[at : at + size]
        total = total + (tile(*part) if len(hidden) <= size else checkpoint(tile, *part, use_reentrant=False))
    return total


@torch.no_grad()
def greedy_hits(hidden: Float[Tensor, "N D"], head: Head, target: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Say for each token whether it is the likeliest one: 1 or 0."""
    size = tile_rows(head)
    tiles = [project(hidden[at : at + size], head).argmax(1) for at in range(0, len(hidden), size)]
    return (torch.cat(tiles) == target).float() if tiles else hidden.new_zeros(0, dtype=torch.float32)


def tile_rows(head: Head) -> int:
    """Count the tokens whose logits are kept at a time."""
    return max(16, TILE_ELEMENTS.get(head.weight.device.type, 2**24) // head.weight.shape[0])


def answered(gone: Gone) -> Float[Tensor, " S"]:
    """Return each row's loss a token."""
    return -gone.rows(gone.logprobs) / gone.lengths


def to_forget(gone: Gone, config: TextObjectiveConfig) -> Float[Tensor, " S"]:
    """Return each row's forgetting term."""
    match config.kind:
        case "npo":
            return npo(gone, config.npo)
        case "ascent" | "difference":
            return -answered(gone)
        case "idk":
            return answered(gone)
        case _:
            return lacking(gone, config)


def lacking(gone: Gone, config: TextObjectiveConfig) -> Float[Tensor, " S"]:
    """Return what each row lacks to be forgotten, in nats a token: token by token where bounds are matched."""
    return matched(gone) if config.kind == "matched" else bounded(gone)


class Terms(NamedTuple):
    """A micro-batch's part of the objective, and of its terms, each times its weight and detached."""

    total: Float[Tensor, ""]
    retain: Float[Tensor, ""]
    forget: Float[Tensor, ""]
    structure: Float[Tensor, ""]


def unlearn_loss(
    retain: Float[Tensor, ""], gone: Gone, structure: Float[Tensor, ""], share: Share, config: TextObjectiveConfig
) -> Terms:
    """Return a micro-batch's part of the objective at the top of this file; the parts of a step add up to it.

    Args: retain: sum over retained tokens, of their losses and, times its weight, the divergence.
          structure: `losses.structure(groups)`; 0 where it does not count.
    """
    kept = (config.kind != "ascent") * retain / max(1, share.tokens)
    lack = config.beta * to_forget(gone, config).sum() / max(1, share.rows)
    sparse = config.alpha * share.part * structure
    return Terms(kept + lack + sparse, kept.detach(), lack.detach(), sparse.detach())
