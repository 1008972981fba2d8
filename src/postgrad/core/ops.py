"""Log-probabilities of tokens without the logits ever standing whole in memory, and sums by sequence.

Letters: N target tokens, D width, V vocabulary, S sequences.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ROWS = {"cpu": 512}
TILE_COLUMNS = {"cpu": 2048}
"""Tokens and logits a token of one tile on a CPU. A product this wide reads the weights seldom, and what it writes
stays in the cache: 1.4 to 1.6 times as fast as whole rows of 32,000 logits."""
TILE_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""Logits kept at a time, in elements: a bound on memory on a CPU, what keeps a GPU busy."""
WHOLE_ELEMENTS = 2**20
"""At most this many logits are kept whole: recomputing so few would cost more than it saves."""


EVERY = slice(None)


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


def _project(hidden: Tensor, head: Head, columns: slice = EVERY) -> Tensor:
    """Compute logits of some columns; [n, D] -> [n, v]."""
    bias = None if head.bias is None else head.bias[columns].to(hidden.dtype)
    logits = F.linear(hidden, head.weight[columns].to(hidden.dtype), bias)
    if head.scale != 1.0:
        logits = logits * head.scale
    return head.cap * torch.tanh(logits / head.cap) if head.cap else logits


def _tiles(num: int, vocabulary: int, device: torch.device) -> tuple[list[slice], list[slice]]:
    """Cut tokens into rows and the vocabulary into columns; whole rows but for a CPU."""
    rows = max(16, TILE_ELEMENTS.get(device.type, 2**27) // vocabulary)
    return _cut(num, min(rows, TILE_ROWS.get(device.type, rows))), _cut(
        vocabulary, TILE_COLUMNS.get(device.type, vocabulary)
    )


def _cut(num: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, num)) for at in range(0, num, size)]


def _at_target(logits: Float[Tensor, "n v"], target: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Pick each row's logit at its target, counted from the first column; 0 where it is in another tile."""
    inside = (target >= 0) & (target < logits.shape[1])
    picked = logits.gather(1, target.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return torch.where(inside, picked, 0.0)


def _logit_gradient(logits: Tensor, lse: Tensor, target: Tensor, upstream: Tensor, head: Head) -> Tensor:
    """Turn float32 logits in place into the gradient of sum(upstream * logprob) before scale and cap; [n, v].

    Targets count from the first column and may be in another tile.
    """
    slope = 1 - (logits / head.cap) ** 2 if head.cap else None
    gradient = logits.sub_(lse[:, None]).exp_().mul_(-upstream[:, None])
    inside = (target >= 0) & (target < gradient.shape[1])
    place = target.clamp(0, gradient.shape[1] - 1)
    gradient[torch.arange(len(place), device=place.device), place] += torch.where(inside, upstream, 0.0)
    if slope is not None:
        gradient.mul_(slope)
    return gradient.mul_(head.scale) if head.scale != 1.0 else gradient


class _Gradients:
    """Gradients of hidden states, weight and bias, added up in float32 tile by tile."""

    def __init__(self, hidden: Tensor, head: Head, needs: tuple[bool, bool, bool]) -> None:
        self.dtype = hidden.dtype
        self.hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=torch.float32) if needs[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=torch.float32) if needs[2] and head.bias is not None else None

    def add(self, tile: tuple[slice, slice], gradient: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Add the share of one tile; ``gradient`` [n, v], ``hidden`` [n, D] and ``weight`` [v, D] of one dtype."""
        rows, columns = tile
        narrow = gradient.to(hidden.dtype)
        if self.hidden is not None:
            _add_product(self.hidden[rows], narrow, weight)
        if self.weight is not None:
            _add_product(self.weight[columns], narrow.T, hidden)
        if self.bias is not None:
            self.bias[columns] += gradient.sum(0)

    def finish(self, head: Head, scale: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three gradients in their parameters' dtypes, times a scale."""
        parts = (self.hidden, self.weight, self.bias)
        if scale is not None:
            parts = tuple(part if part is None else part.mul_(scale.to(part.dtype)) for part in parts)  # type: ignore[assignment]
        hidden, weight, bias = parts
        hidden = None if hidden is None else hidden.to(self.dtype)
        weight = None if weight is None else weight.to(head.weight.dtype)
        return hidden, weight, bias if bias is None or head.bias is None else bias.to(head.bias.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a float32 total, in place."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total += left @ right


class _TiledLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, head: Head) -> Tensor:
        ctx.head, ctx.dtype = head, matmul_dtype(hidden)
        narrow, cast = hidden.to(ctx.dtype), _cast(head, ctx.dtype)
        lse = torch.full((hidden.shape[0],), -torch.inf, dtype=torch.float32, device=hidden.device)  # [N]
        chosen = torch.zeros_like(lse)
        for rows, columns in product(*_tiles(hidden.shape[0], weight.shape[0], hidden.device)):
            logits = _project(narrow[rows], cast, columns).float()  # [n, v]
            lse[rows] = torch.logaddexp(lse[rows], torch.logsumexp(logits, dim=1))
            chosen[rows] += _at_target(logits, target[rows] - columns.start)
        ctx.save_for_backward(hidden, target, lse)
        return chosen - lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, target, lse = ctx.saved_tensors
        narrow, cast = hidden.to(ctx.dtype), _cast(ctx.head, ctx.dtype)
        gradients = _Gradients(hidden, ctx.head, ctx.needs_input_grad[:3])
        for rows, columns in product(*_tiles(hidden.shape[0], cast.weight.shape[0], hidden.device)):
            logits = _project(narrow[rows], cast, columns).float()
            gradient = _logit_gradient(logits, lse[rows], target[rows] - columns.start, upstream[rows], ctx.head)
            gradients.add((rows, columns), gradient, narrow[rows], cast.weight[columns])
        return (*gradients.finish(ctx.head), None, None)


class _TiledNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, head: Head) -> Tensor:
        dtype = matmul_dtype(hidden)
        narrow, cast = hidden.to(dtype), _cast(head, dtype)
        needs = ctx.needs_input_grad[:3]
        ctx.gradients, ctx.head = _Gradients(hidden, head, needs), head
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        row_tiles, column_tiles = _tiles(hidden.shape[0], weight.shape[0], hidden.device)
        for rows in row_tiles:
            total += _nll_of_rows(rows, column_tiles, narrow[rows], target[rows], cast, any(needs), ctx.gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.gradients.finish(ctx.head, upstream), None, None)


def _nll_of_rows(
    rows: slice, column_tiles: list[slice], hidden: Tensor, target: Tensor, head: Head, train: bool, total: _Gradients
) -> Tensor:
    """Return the rows' summed loss; to train, keep their logits until all are known and add their gradients up."""
    lse = torch.full((hidden.shape[0],), -torch.inf, dtype=torch.float32, device=hidden.device)  # [n]
    chosen = torch.zeros_like(lse)
    kept: list[Tensor] = []
    for columns in column_tiles:
        logits = _project(hidden, head, columns).float()  # [n, v]
        lse = torch.logaddexp(lse, torch.logsumexp(logits, dim=1))
        chosen += _at_target(logits, target - columns.start)
        kept += [logits] if train else []
    minus_one = torch.full_like(lse, -1.0)
    for columns, logits in zip(column_tiles, kept, strict=False):
        gradient = _logit_gradient(logits, lse, target - columns.start, minus_one, head)
        total.add((rows, columns), gradient, hidden, head.weight[columns])
    return (lse - chosen).sum()


def _cast(head: Head, dtype: torch.dtype) -> Head:
    """Detach the head and bring it to one dtype."""
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    return Head(head.weight.detach().to(dtype), bias, head.scale, head.cap)
