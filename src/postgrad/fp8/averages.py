"""Gradients that are codes already, averaged over ranks: in place, or at the rank that owns each.

Codes are sent on with one scale for all ranks. Scales being powers of two, a code only changes where it falls below
the smallest number of the shared scale, so a gradient is rounded once when it is made and once as a mean.

Source:  FP8-LM (arXiv 2310.18313), sections 2.1 and 2.3.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from postgrad.core.distributed import all_reduce_gradients
from postgrad.fp8.adam import Gradient, full
from postgrad.fp8.collectives import Wire, over_ranks, place
from postgrad.fp8.gradients import Gradients, square_of, take
from postgrad.fp8.numerics import E4M3, amax_of, dequantize
from postgrad.fp8.partition import Partition, reduce_to_owners
from postgrad.fp8.reduction import Mode, all_reduce
from postgrad.fp8.scaling_factor import ScalingFactor

BUCKET_ELEMENTS = 2**24
"""Gradients are averaged in buckets of about so many: what is held in float32 at a time."""


def average_gradients(
    gradients: Gradients,
    coded: Sequence[Parameter],
    plain: Sequence[Parameter] = (),
    *,
    mode: Mode = "a2a",
    factor: ScalingFactor | None = None,
    group: dist.ProcessGroup | None = None,
    wire: Wire | None = None,
) -> None:
    """Replace every gradient by its mean over the ranks: those of `coded` as codes, `grad` of `plain` in float32.

    A rank without a gradient counts as zero; one that no rank has stays missing. Every rank has to call it with the
    same parameters in the same order.

    Args: factor: mu of mode "native", with places by the order of `coded`.   wire: counts the bytes of codes.
    """
    _, world = place(group)
    if world == 1:
        return
    for places in _buckets(coded, gradients, group):
        tensors = [value_of(gradients.of(coded[i]), coded[i]) for i in places]
        means = all_reduce(tensors, mode=mode, factor=factor, places=places, group=group, wire=wire)
        for i, mean in zip(places, means, strict=True):
            gradients.put(coded[i], Gradient(mean, amax_of(mean.codes) / mean.scale))
    average_plain(plain, group)


def average_to_owners(
    gradients: Gradients,
    coded: Sequence[Parameter],
    partition: Partition,
    *,
    group: dist.ProcessGroup | None = None,
    wire: Wire | None = None,
) -> dict[int, Gradient]:
    """Return the means of the gradients this rank owns, by place, as the codes `average_gradients` would give.

    The gradients themselves are dropped on the way.
    """
    _, world = place(group)
    owned: dict[int, Gradient] = {}
    if world == 1:
        found = ((i, gradients.pop(param)) for i, param in enumerate(coded))
        return {i: gradient for i, gradient in found if gradient is not None}
    for places in _buckets(coded, gradients, group):
        tensors = [value_of(gradients.pop(coded[i]), coded[i]) for i in places]
        means = reduce_to_owners(tensors, part_of(partition, places, coded), group=group, wire=wire)
        owned |= {places[j]: take(mean, E4M3) for j, mean in means.items()}
    return owned


def part_of(partition: Partition, places: Sequence[int], tensors: Sequence[Tensor]) -> Partition:
    """Return the partition of some of the tensors, counted anew."""
    new = {place: j for j, place in enumerate(places)}
    owned = [[new[i] for i in indices if i in new] for indices in partition.owned]
    return Partition(owned, [sum(tensors[places[j]].numel() for j in indices) for indices in owned])


def value_of(gradient: Gradient | None, like: Tensor) -> Float[Tensor, "*shape"]:
    """Return a gradient's values: zeros where there is none, NaN where one was not finite."""
    if gradient is None:
        return torch.zeros(like.shape, device=like.device)
    return dequantize(gradient.q) + 0 * gradient.amax


def square_or_nan(gradient: Gradient) -> Float[Tensor, ""]:
    """Return the sum of a gradient's squares in float64, NaN where it was not finite."""
    return torch.where(gradient.amax.isfinite(), square_of(gradient.q), torch.nan)


def plain_square(gradient: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Return the sum of a float32 gradient's squares in float64."""
    return square_of(full(gradient).q)


def plain_gradients(params: Sequence[Parameter]) -> list[Tensor]:
    """List the float32 gradients there are."""
    return [param.grad for param in params if param.grad is not None]


def average_plain(plain: Sequence[Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Average float32 gradients over the ranks, in place; nothing to do for one."""
    _, world = place(group)
    if world == 1:
        return
    all_reduce_gradients(plain)
    found = plain_gradients(plain)
    if found:
        torch._foreach_mul_(found, 1.0 / world)


def _buckets(coded: Sequence[Parameter], gradients: Gradients, group: dist.ProcessGroup | None) -> Iterator[list[int]]:
    """Split the places of parameters that have a gradient on any rank into runs of about `BUCKET_ELEMENTS`."""
    bucket: list[int] = []
    size = 0
    for i in _present(coded, gradients, group):
        if bucket and size + coded[i].numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
        bucket.append(i)
        size += coded[i].numel()
    if bucket:
        yield bucket


def _present(coded: Sequence[Parameter], gradients: Gradients, group: dist.ProcessGroup | None) -> list[int]:
    """List the places of parameters that have a gradient on any rank."""
    if not coded:
        return []
    here = torch.tensor([float(gradients.of(param) is not None) for param in coded], device=coded[0].device)
    return torch.nonzero(over_ranks("max", here, group))[:, 0].tolist()
