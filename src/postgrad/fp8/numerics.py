"""Numbers of 8 and 16 bits with one scale a tensor: the reference that every other back end must equal.

Formula: value = code / scale, scale = 2^e, the greatest with amax * scale <= the format's largest number.
Source:  FP8-LM (arXiv 2310.18313), section 2 and appendix A.
Differs: the exponent comes from frexp, where floor(log2(largest / amax)) is one too high for an amax just above
         1.75 * 2^k; it stays in [-126, 126], where tiny amaxes gave an infinite scale. What is too large is cut by hand
         to the largest number, since releases of torch disagree on what a cast makes of it.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]
MAX_EXPONENT = 126
"""Of a scale: 2^126 and its inverse are both normal float32 numbers."""
_NOISE_BITS = 32


@dataclass(frozen=True)
class Format:
    """A format of codes: its name, its dtype and its largest finite number."""

    name: str
    dtype: torch.dtype
    largest: float


E4M3 = Format("E4M3", torch.float8_e4m3fn, 448.0)
"""8 bits with 3 of mantissa, no infinity; subnormals down to 2^-9."""
E5M2 = Format("E5M2", torch.float8_e5m2, 57344.0)
"""8 bits with 2 of mantissa; subnormals down to 2^-16."""
F16 = Format("F16", torch.float16, 65504.0)
"""16 bits with 10 of mantissa; subnormals down to 2^-24."""


class Quantized(NamedTuple):
    """A tensor's codes and their scale, a power of two: value = codes / scale."""

    codes: Tensor
    scale: Float[Tensor, ""]
    format: Format


def power_of_two(exponent: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return 2^exponent in float32, exactly, for exponents in [-126, 127]."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def amax_of(x: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Return the greatest magnitude in float32; it is not finite where any element is not, and 0 of no elements."""
    if not x.numel():
        return torch.zeros((), device=x.device)
    low, high = torch.aminmax(x.detach() if x.element_size() > 1 else x.detach().float())
    return torch.maximum(-low.float(), high.float()).abs()


def scale_for(amax: Float[Tensor, ""], format: Format, before: Float[Tensor, ""] | None = None) -> Float[Tensor, ""]:
    """Return the greatest power of two that brings amax into the format, without a wait for the device.

    Args: before: what an amax of 0, or one that is not finite, gives; 1 by default.
    """
    limit, limit_exponent = math.frexp(format.largest)
    significand, exponent = torch.frexp(amax.float())
    over = (significand > limit).int()
    scale = power_of_two((limit_exponent - exponent - over).clamp(-MAX_EXPONENT, MAX_EXPONENT))
    usable = torch.isfinite(amax) & (amax > 0)
    return torch.where(usable, scale, torch.ones_like(scale) if before is None else before)


def quantize(
    x: Float[Tensor, "*shape"],
    format: Format,
    scale: Float[Tensor, ""] | None = None,
    *,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> Quantized:
    """Turn a tensor into codes; too large magnitudes, infinite ones too, become the format's largest; NaN stays.

    Whether x was finite is told by `amax_of(x)`, never by the codes.

    Args: scale: just in time from x by default.   rounding: "nearest" takes ties to even; "stochastic" rounds up with
          the probability of the share cut off, so that the mean is x.   generator: of the stochastic bits.
    """
    if scale is None:
        scale = scale_for(amax_of(x), format)
    scaled = (x.detach().float() * scale).clamp(-format.largest, format.largest)
    if rounding == "stochastic":
        noise = torch.randint(2**_NOISE_BITS, x.shape, generator=generator, dtype=torch.int64, device=x.device)
        scaled = round_with(scaled, format, noise)
    return Quantized(scaled.to(format.dtype), scale, format)


def dequantize(q: Quantized) -> Float[Tensor, "*shape"]:
    """Return the values of the codes in float32; exact but for the few below float32's smallest normal number."""
    return q.codes.float() / q.scale


def round_with(
    scaled: Float[Tensor, "*shape"], format: Format, noise: Int[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Round float32 to a number of the format by random bits: add them below the last bit kept, then cut off.

    With d bits to cut, the top d bits of the noise are added to the significand. Where d > 32, under the format's
    smallest subnormal, bits worth less than 2^-32 of a step are dropped.

    Args: scaled: in the format's range.   noise: uniform in [0, 2^32).
    """
    info = torch.finfo(format.dtype)
    mantissa, lowest = 1 - _exponent(info.eps), _exponent(info.smallest_normal) - 1
    bits = scaled.abs().view(torch.int32).long()
    field = bits >> 23
    significand = (bits & 0x7FFFFF) | ((field > 0).long() << 23)
    exponent = field.clamp(min=1) - 127  # value = significand * 2^(exponent - 23)
    cut = 23 - mantissa + (lowest - exponent).clamp(min=0)
    significand = significand >> (cut - _NOISE_BITS).clamp(0, 62)
    cut = cut.clamp(max=_NOISE_BITS)
    steps = (significand + (noise >> (_NOISE_BITS - cut))) >> cut
    rounded = steps.float() * power_of_two(exponent.clamp(min=lowest) - mantissa)
    return torch.where(scaled.isnan(), scaled, torch.copysign(rounded, scaled))


def _exponent(number: float) -> int:
    """Return e of number = m * 2^e with m in [1/2, 1)."""
    return math.frexp(number)[1]


def share_saturated(q: Quantized) -> Float[Tensor, ""]:
    """Return the share of elements at the format's largest magnitude."""
    return (q.codes.float().abs() == q.format.largest).float().mean()


def share_underflown(x: Float[Tensor, "*shape"], q: Quantized) -> Float[Tensor, ""]:
    """Return the share of elements that are not 0 but became 0."""
    return ((x != 0) & (q.codes.float() == 0)).float().mean()


def snr_db(x: Float[Tensor, "*shape"], q: Quantized) -> Float[Tensor, ""]:
    """Return the signal-to-noise ratio, 10 log10(sum x^2 / sum (x - value)^2), in dB; inf where nothing was lost."""
    signal = x.detach().double()
    noise = (signal - dequantize(q).double()).square().sum()
    ratio = 10 * torch.log10(signal.square().sum() / noise)
    return torch.where(noise == 0, torch.inf, ratio).float()
