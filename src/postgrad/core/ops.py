"""Log-probabilities of tokens without the logits ever standing whole in memory, and sums by sequence.

Letters: N target tokens, D width, V vocabulary, S sequences.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
"""Logits of one tile, in elements: what stays near the cache on a CPU, what keeps a GPU busy."""
WHOLE_ELEMENTS = 2**20
"""At most this many logits are kept whole: recomputing so few would cost more than it saves."""


@dataclass(frozen=True)
class Head:
    """The output projection of a language model: ``scale * (h W^T + b)``, then ``cap * tanh(. / cap)`` if capped."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    cap: float = 0.0


def token_logprobs(
    hidden: Float[Tensor, "N D"], head: Head, target: Int[Tensor, " N"], *, whole: int = WHOLE_ELEMENTS
) -> Float[Tensor, " N"]:
    """Return log softmax(logits)[target] of each token, in nats and float32.

    Tiles of tokens are projected, reduced and dropped; the backward pass projects them again and adds the weight
    gradient up in float32. ``whole`` is how many logits may be kept instead.
    """
    if hidden.shape[0] * head.weight.shape[0] <= whole:
        return -F.cross_entropy(_project(hidden, head).float(), target, reduction="none")
    return _TiledLogprobs.apply(hidden, head.weight, head.bias, target, head)  # type: ignore[no-any-return, no-untyped-call]


def token_nll(hidden: Float[Tensor, "N D"], head: Head, target: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """Return the summed negative log-likelihood of the targets, in nats and float32.

    Equals ``-token_logprobs(...).sum()``. Since every token has the same share in the sum, the gradients are made in
    the forward pass and no logit is computed twice.
    """
    return _TiledNll.apply(hidden, head.weight, head.bias, target, head)  # type: ignore[no-any-return, no-untyped-call]


def sum_by_sequence(values: Float[Tensor, " N"], sequence: Int[Tensor, " N"], num: int) -> Float[Tensor, " S"]:
    """Add up the values of each sequence; an empty sequence sums to 0."""
    return values.new_zeros(num).index_add(0, sequence, values)


def matmul_dtype(tensor: Tensor) -> torch.dtype:
    """Give the dtype in which a matrix product of the tensor runs: autocast's inside autocast, else its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _project(hidden: Tensor, head: Head) -> Tensor:
    """Compute logits; [n, D] -> [n, V]."""
    logits = F.linear(hidden, head.weight.to(hidden.dtype), None if head.bias is None else head.bias.to(hidden.dtype))
    if head.scale != 1.0:
        logits = logits * head.scale
    return head.cap * torch.tanh(logits / head.cap) if head.cap else logits


def _tiles(num: int, vocabulary: int, device: torch.device) -> list[slice]:
    size = max(16, TILE_ELEMENTS.get(device.type, 2**27) // vocabulary)
    return [slice(at, min(at + size, num)) for at in range(0, num, size)]


def _logit_gradient(logits: Tensor, lse: Tensor, target: Tensor, upstream: Tensor, head: Head) -> Tensor:
    """Turn float32 logits in place into the gradient of sum(upstream * logprob) before scale and cap; [n, V]."""
    slope = 1 - (logits / head.cap) ** 2 if head.cap else None
    gradient = logits.sub_(lse[:, None]).exp_().mul_(-upstream[:, None])
    gradient[torch.arange(target.shape[0], device=target.device), target] += upstream
    if slope is not None:
        gradient.mul_(slope)
    return gradient.mul_(head.scale) if head.scale != 1.0 else gradient


class _Gradients:
    """Gradients of hidden states, weight and bias, added up tile by tile."""

    def __init__(self, hidden: Tensor, head: Head, needs: tuple[bool, bool, bool]) -> None:
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=torch.float32) if needs[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=torch.float32) if needs[2] and head.bias is not None else None

    def add(self, tile: slice, gradient: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Add the share of one tile; ``gradient`` [n, V], ``hidden`` [n, D] and ``weight`` [V, D] of one dtype."""
        narrow = gradient.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[tile] = (narrow @ weight).to(self.hidden.dtype)
        if self.weight is not None and hidden.dtype == torch.float32:
            self.weight.addmm_(narrow.T, hidden)
        elif self.weight is not None:
            self.weight += narrow.T @ hidden
        if self.bias is not None:
            self.bias += gradient.sum(0)

    def finish(self, head: Head, scale: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three gradients in their parameters' dtypes, times a scale."""
        parts = (self.hidden, self.weight, self.bias)
        if scale is not None:
            parts = tuple(part if part is None else part.mul_(scale.to(part.dtype)) for part in parts)  # type: ignore[assignment]
        hidden, weight, bias = parts
        weight = None if weight is None else weight.to(head.weight.dtype)
        return hidden, weight, bias if bias is None or head.bias is None else bias.to(head.bias.dtype)


class _TiledLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, head: Head) -> Tensor:
        ctx.head, ctx.dtype = head, matmul_dtype(hidden)
        narrow, cast = hidden.to(ctx.dtype), _cast(head, ctx.dtype)
        lse = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)  # [N]
        chosen = torch.empty_like(lse)
        for tile in _tiles(hidden.shape[0], weight.shape[0], hidden.device):
            logits = _project(narrow[tile], cast).float()  # [n, V]
            lse[tile] = torch.logsumexp(logits, dim=1)
            chosen[tile] = logits.gather(1, target[tile, None])[:, 0]
        ctx.save_for_backward(hidden, target, lse)
        return chosen - lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, target, lse = ctx.saved_tensors
        narrow, cast = hidden.to(ctx.dtype), _cast(ctx.head, ctx.dtype)
        gradients = _Gradients(hidden, ctx.head, ctx.needs_input_grad[:3])
        for tile in _tiles(hidden.shape[0], cast.weight.shape[0], hidden.device):
            logits = _project(narrow[tile], cast).float()
            gradient = _logit_gradient(logits, lse[tile], target[tile], upstream[tile], ctx.head)
            gradients.add(tile, gradient, narrow[tile], cast.weight)
        return (*gradients.finish(ctx.head), None, None)


class _TiledNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, head: Head) -> Tensor:
        dtype = matmul_dtype(hidden)
        narrow, cast = hidden.to(dtype), _cast(head, dtype)
        needs = ctx.needs_input_grad[:3]
        gradients = _Gradients(hidden, head, needs)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for tile in _tiles(hidden.shape[0], weight.shape[0], hidden.device):
            logits = _project(narrow[tile], cast).float()  # [n, V]
            lse = torch.logsumexp(logits, dim=1)
            total += (lse - logits.gather(1, target[tile, None])[:, 0]).sum()
            if any(needs):
                minus_one = torch.full_like(lse, -1.0)
                gradient = _logit_gradient(logits, lse, target[tile], minus_one, head)
                gradients.add(tile, gradient, narrow[tile], cast.weight)
        ctx.gradients, ctx.head = gradients, head
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.gradients.finish(ctx.head, upstream), None, None)


def _cast(head: Head, dtype: torch.dtype) -> Head:
    """Detach the head and bring it to one dtype."""
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    return Head(head.weight.detach().to(dtype), bias, head.scale, head.cap)
