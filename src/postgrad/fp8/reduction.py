"""Gradients averaged over ranks in FP8: for each element a byte there and a byte back.

"a2a", the default, rounds twice however many ranks there are: all ranks agree on a tensor's greatest magnitude, turn
their gradients into E4M3 with that one scale, send each rank its share of the codes, which adds them in float32, rounds
the mean to E4M3 and sends it to all. "native" is the paper's: codes are added in FP8, by NCCL, with a rounding at every
hop; the scale is pre-multiplied by mu (see scaling_factor), and the mean is g / (N s mu).

Source:  FP8-LM (arXiv 2310.18313), section 2.1, eq. 3 to 6. A minimum of scales is a maximum of magnitudes.
Differs: "a2a" sends as many bytes as an FP8 ring does and needs no mu: at 64 ranks about 28 dB of signal to noise
         where the ring has 16. What does not travel over NCCL is added in FP8 here, in the order of ranks.

A tensor that is not finite on some rank is NaN on all, every element of it. Both ways run any number of tensors as one
flat buffer, padded to a multiple of the ranks by less than a byte a rank.

Letters: N ranks, T tensors, L elements of one rank's share.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from postgrad.errors import ConfigError
from postgrad.fp8.collectives import Ask, Steps, Wire, chain_sum, place, run, simulate
from postgrad.fp8.numerics import E4M3, Quantized, amax_of, quantize, scale_for
from postgrad.fp8.scaling_factor import ScalingFactor, saturated_share

Mode = Literal["a2a", "native"]
FIRST_NCCL, FIRST_CAPABILITY = (2, 24), (9, 0)
"""What sums of float8 need."""


class Segment(NamedTuple):
    """The part of a tensor that lies in one rank's share: which tensor, and where in the share."""

    tensor: int
    start: int
    stop: int


def all_reduce(
    tensors: Sequence[Tensor],
    *,
    mode: Mode = "a2a",
    factor: ScalingFactor | None = None,
    places: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    wire: Wire | None = None,
) -> list[Quantized]:
    """Return the mean of each tensor over the ranks, the same bits on every rank.

    Every rank has to call it with tensors of the same shapes, in the same order.

    Args:    factor: of "native", which moves it; on the tensors' device.   places: of the tensors in the factor, by
             default 0, 1, 2 ...   wire: counts the bytes sent.
    Returns: E4M3 codes; in mode "native" their scale is N s mu, which is a power of two only where N and mu are.
    Raises:  ConfigError: "native" without a factor, or over an NCCL or a device that cannot add FP8.
    """
    if not tensors:
        return []
    rank, world = place(group)
    if mode == "a2a":
        return run(mean_steps(tensors, rank, world), group, wire)
    factor, places = _checked(factor, places, len(tensors))
    fused = _adds_fp8(tensors[0].device, group)
    means, shares = run(native_steps(tensors, factor.factors(places), rank, world, fused=fused), group, wire)
    factor.update(places, shares)
    return means


def simulate_all_reduce(
    ranks: Sequence[Sequence[Tensor]], *, mode: Mode = "a2a", factor: ScalingFactor | None = None
) -> list[Quantized]:
    """Return what `all_reduce` gives when each of these lists is a rank's tensors, bit for bit."""
    world = len(ranks)
    if mode == "a2a":
        return simulate([mean_steps(tensors, rank, world) for rank, tensors in enumerate(ranks)])[0]
    factor, places = _checked(factor, None, len(ranks[0]))
    mu = factor.factors(places)
    means, shares = simulate([native_steps(tensors, mu, rank, world) for rank, tensors in enumerate(ranks)])[0]
    factor.update(places, shares)
    return means


def mean_steps(tensors: Sequence[Tensor], rank: int, world: int) -> Steps[list[Quantized]]:
    """Average with one rounding of each rank's tensors and one of their mean."""
    numels = [tensor.numel() for tensor in tensors]
    share = share_size(numels, world)
    amaxes = yield Ask("max", amaxes_of(tensors))
    scales = shared_scales(amaxes)
    codes = _flat_codes(tensors, scales, share * world)
    received = yield Ask("exchange", codes, [share] * world)
    mean = mean_of_codes(received, world)  # [L]
    segments = list(segments_of(numels, share, rank))
    for segment in segments:
        mean[segment.start : segment.stop] *= inverse_of(scales[segment.tensor], amaxes[segment.tensor])
    amaxes = yield Ask("max", _segment_amaxes(mean, segments, len(tensors)))
    scales = shared_scales(amaxes)
    own = torch.zeros_like(mean, dtype=E4M3.dtype)
    for segment in segments:
        piece = slice(segment.start, segment.stop)
        own[piece] = quantize(mean[piece], E4M3, scales[segment.tensor]).codes
    gathered = yield Ask("gather", own.view(torch.uint8), [share] * world)
    return _split(gathered, tensors, scales)


def native_steps(
    tensors: Sequence[Tensor], mu: Float[Tensor, " T"], rank: int, world: int, *, fused: bool = False
) -> Steps[tuple[list[Quantized], Float[Tensor, " T"]]]:
    """Add in FP8, and return the means and the shares of saturated elements, NaN of what was not finite.

    Args: fused: the backend adds FP8; otherwise codes are added where they are sent, in the order of ranks.
    """
    share = share_size([tensor.numel() for tensor in tensors], world)
    amaxes = yield Ask("max", amaxes_of(tensors))
    scales = shared_scales(amaxes)
    raised = torch.stack(scales) * mu
    codes = _flat_codes(tensors, torch.where(torch.isfinite(amaxes), raised, torch.nan).unbind(), share * world)
    if fused:
        summed = yield Ask("sum", codes.view(E4M3.dtype))
        codes = summed.view(torch.uint8)
    else:
        received = yield Ask("exchange", codes, [share] * world)
        own = chain_sum(received.view(E4M3.dtype).view(world, share).unbind())  # [L]
        codes = yield Ask("gather", own.view(torch.uint8), [share] * world)
    means = _split(codes, tensors, (raised * world).unbind())
    shares = torch.stack([saturated_share(mean.codes) for mean in means])
    return means, torch.where(torch.isfinite(amaxes), shares, torch.nan)


def share_size(numels: Sequence[int], world: int) -> int:
    """Return how many elements each rank adds: those of all tensors, over the ranks, rounded up; at least 1."""
    return max(1, -(-sum(numels) // world))


def segments_of(numels: Sequence[int], share: int, rank: int) -> list[Segment]:
    """Return the parts of the tensors, laid end to end, that fall in a rank's share."""
    segments = []
    begin = -rank * share
    for i, numel in enumerate(numels):
        start, stop = max(begin, 0), min(begin + numel, share)
        if start < stop:
            segments.append(Segment(i, start, stop))
        begin += numel
    return segments


def amaxes_of(tensors: Sequence[Tensor]) -> Float[Tensor, " T"]:
    """Return each tensor's greatest magnitude; infinity, never NaN, which a maximum over ranks may lose."""
    amaxes = torch.stack([amax_of(tensor) for tensor in tensors])
    return torch.where(torch.isfinite(amaxes), amaxes, torch.inf)


def shared_scales(amaxes: Float[Tensor, " T"]) -> list[Float[Tensor, ""]]:
    """Return the scale of each tensor, from the greatest magnitude on any rank."""
    return [scale_for(amax, E4M3) for amax in amaxes.unbind()]


def inverse_of(scale: Float[Tensor, ""], amax: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return 1 / scale, exactly, or NaN where a tensor was not finite on some rank."""
    return torch.where(torch.isfinite(amax), 1 / scale, torch.nan)


def mean_of_codes(received: UInt8[Tensor, " NL"], world: int) -> Float[Tensor, " L"]:
    """Return the float32 mean of the ranks' codes; their sum is exact for up to 73 ranks, and its order fixed."""
    return sum_of_rows(received.view(E4M3.dtype), world) * (1.0 / world)  # a quotient's last bits depend on the device


def sum_of_rows(received: Shaped[Tensor, " NL"], world: int) -> Float[Tensor, " L"]:
    """Return the float32 sum of what the ranks sent, in the order of ranks."""
    rows = received.view(world, received.numel() // world).unbind()  # N of [L]
    total = rows[0].float()
    for row in rows[1:]:
        total += row.float()
    return total


def _flat_codes(tensors: Sequence[Tensor], scales: Sequence[Float[Tensor, ""]], numel: int) -> UInt8[Tensor, " NL"]:
    """Return the E4M3 codes of all tensors end to end, then zeros."""
    flat = torch.zeros(numel, dtype=torch.uint8, device=tensors[0].device)
    begin = 0
    for tensor, scale in zip(tensors, scales, strict=True):
        codes = quantize(tensor, E4M3, scale).codes.reshape(-1)
        flat[begin : begin + tensor.numel()] = codes.view(torch.uint8)
        begin += tensor.numel()
    return flat


def _segment_amaxes(mean: Float[Tensor, " L"], segments: Sequence[Segment], num: int) -> Float[Tensor, " T"]:
    """Return each tensor's greatest magnitude in this rank's share, 0 of those that are not in it."""
    pieces = [mean[:0]] * num
    for segment in segments:
        pieces[segment.tensor] = mean[segment.start : segment.stop]
    return amaxes_of(pieces)


def _split(
    codes: UInt8[Tensor, " NL"], tensors: Sequence[Tensor], scales: Sequence[Float[Tensor, ""]]
) -> list[Quantized]:
    """Return the codes as tensors; they are views of the one buffer."""
    numels = [tensor.numel() for tensor in tensors]
    pieces = torch.split(codes.view(E4M3.dtype)[: sum(numels)], numels)
    return [
        Quantized(piece.view(tensor.shape), scale, E4M3)
        for piece, tensor, scale in zip(pieces, tensors, scales, strict=True)
    ]


def _checked(
    factor: ScalingFactor | None, places: Sequence[int] | None, num: int
) -> tuple[ScalingFactor, Sequence[int]]:
    """Return the factor and the places of the tensors in it."""
    if factor is None:
        raise ConfigError('mode "native" moves a scaling factor from step to step: give one, or use mode "a2a".')
    return factor, range(num) if places is None else places


def _adds_fp8(device: torch.device, group: dist.ProcessGroup | None) -> bool:
    """Say whether the backend is one that adds FP8, or refuse one that should but does not."""
    if device.type != "cuda" or not dist.is_initialized() or "cuda:nccl" not in dist.get_backend_config(group):
        return False
    nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    capability = torch.cuda.get_device_capability(device)
    if nccl < FIRST_NCCL or capability < FIRST_CAPABILITY:
        raise ConfigError(
            f"Sums of FP8 need NCCL {FIRST_NCCL} and compute capability {FIRST_CAPABILITY} or later; here are NCCL "
            f'{nccl} and {capability}. Use mode "a2a", which needs neither.'
        )
    return True
