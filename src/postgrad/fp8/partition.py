"""Whole tensors dealt to ranks, as sharded optimizers want them: each scale travels with its tensor.

A step of a sharded optimizer is `reduce_to_owners`, the update of one's own tensors, `gather_from_owners`: an element
costs one byte there and its code's bytes back.

Source:  FP8-LM (arXiv 2310.18313), section 2.3 and algorithm 1.
Differs: gradients reach their owner as codes and are added there in float32, with one rounding in all.

Letters: N ranks, T tensors.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor

from postgrad.fp8.collectives import Ask, Steps, Wire, place, run
from postgrad.fp8.numerics import E4M3, Format, Quantized, quantize
from postgrad.fp8.reduction import amaxes_of, inverse_of, mean_of_codes, shared_scales

_SCALE = 4
"""Bytes of a scale; every tensor starts at a multiple of them, so that scales and codes are read in place."""


class Partition(NamedTuple):
    """Which tensors each rank owns, in the order of tensors, and how many elements these have."""

    owned: list[list[int]]
    loads: list[int]


class Like(NamedTuple):
    """What every rank knows of a tensor, its owner or not."""

    shape: tuple[int, ...]
    format: Format


def greedy_partition(numels: Sequence[int], world: int) -> Partition:
    """Deal the tensors out, greatest first, each to the rank with the least so far; the first of equals gets it.

    The greatest load is at most 4/3 - 1/(3 N) of what the best deal has.
    """
    owned: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for i in sorted(range(len(numels)), key=lambda i: -numels[i]):
        rank = loads.index(min(loads))
        owned[rank].append(i)
        loads[rank] += numels[i]
    return Partition([sorted(indices) for indices in owned], loads)


def reduce_to_owners(
    tensors: Sequence[Tensor],
    partition: Partition,
    *,
    group: dist.ProcessGroup | None = None,
    wire: Wire | None = None,
) -> dict[int, Tensor]:
    """Return the float32 mean over the ranks of each tensor that this rank owns, by its place in the list.

    One that is not finite on some rank is NaN.
    """
    rank, world = place(group)
    return run(owner_steps(tensors, partition, rank, world), group, wire) if tensors else {}


def gather_from_owners(
    owned: Mapping[int, Quantized],
    likes: Sequence[Like],
    partition: Partition,
    *,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
    wire: Wire | None = None,
) -> list[Quantized]:
    """Return all tensors on every rank, codes and scales as their owners hold them.

    Args: owned: this rank's tensors, by their place.   likes: of all tensors.   device: where the tensors are, which a
          rank that owns none cannot tell.
    """
    rank, _ = place(group)
    return run(spread_steps(owned, likes, partition, rank, device), group, wire) if likes else []


def owner_steps(tensors: Sequence[Tensor], partition: Partition, rank: int, world: int) -> Steps[dict[int, Tensor]]:
    """Send each owner the codes of its tensors, and average one's own."""
    amaxes = yield Ask("max", amaxes_of(tensors))
    scales = shared_scales(amaxes)
    order = [i for indices in partition.owned for i in indices]
    codes = [quantize(tensors[i], E4M3, scales[i]).codes.view(torch.uint8).reshape(-1) for i in order]
    received = yield Ask("exchange", torch.cat(codes), partition.loads)
    own = partition.owned[rank]
    if not own:
        return {}
    pieces = torch.split(mean_of_codes(received, world), [tensors[i].numel() for i in own])
    return {
        i: (piece * inverse_of(scales[i], amaxes[i])).view(tensors[i].shape)
        for i, piece in zip(own, pieces, strict=True)
    }


def spread_steps(
    owned: Mapping[int, Quantized],
    likes: Sequence[Like],
    partition: Partition,
    rank: int,
    device: torch.device | str = "cpu",
) -> Steps[list[Quantized]]:
    """Send all others one's scales and codes, and read theirs."""
    packed = [_pack(owned[i]) for i in partition.owned[rank]]
    own = torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *packed])
    sizes = [sum(_packed_size(likes[i]) for i in indices) for indices in partition.owned]
    gathered = yield Ask("gather", own, sizes)
    found: dict[int, Quantized] = {}
    begin = 0
    for i in (i for indices in partition.owned for i in indices):
        size = _packed_size(likes[i])
        found[i] = _unpack(gathered[begin : begin + size], likes[i])
        begin += size
    return [found[i] for i in range(len(likes))]


def _packed_size(like: Like) -> int:
    """Return the bytes of a scale and of codes, rounded up so that the next tensor is aligned."""
    return _SCALE + -(-prod(like.shape) * like.format.dtype.itemsize // _SCALE) * _SCALE


def _pack(q: Quantized) -> UInt8[Tensor, " bytes"]:
    """Return the bytes of the scale, then those of the codes."""
    packed = torch.zeros(_packed_size(Like(q.codes.shape, q.format)), dtype=torch.uint8, device=q.codes.device)
    packed[:_SCALE] = q.scale.float().reshape(1).view(torch.uint8)
    packed[_SCALE : _SCALE + q.codes.nbytes] = q.codes.reshape(-1).view(torch.uint8)
    return packed


def _unpack(packed: UInt8[Tensor, " bytes"], like: Like) -> Quantized:
    """Return views of the bytes as a scale and codes."""
    stop = _SCALE + prod(like.shape) * like.format.dtype.itemsize
    scale = packed[:_SCALE].view(torch.float32).view(())
    return Quantized(packed[_SCALE:stop].view(like.format.dtype).view(like.shape), scale, like.format)
