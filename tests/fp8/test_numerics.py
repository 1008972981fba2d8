"""Numerics: every code, every half, the hand values of the reference, saturation, stochastic rounding."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postgrad.fp8.numerics import (
    E4M3,
    E5M2,
    F16,
    Quantized,
    amax_of,
    dequantize,
    power_of_two,
    quantize,
    round_with,
    scale_for,
    share_saturated,
    share_underflown,
    snr_db,
)

ONE = torch.tensor(1.0)
eights = pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda format: format.name)
formats = pytest.mark.parametrize("format", [E4M3, E5M2, F16], ids=lambda format: format.name)


def halves():
    """All 2^16 half-precision numbers, in float32."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()


def decode(code, mantissa, bias):
    """The value of an 8-bit code by the definition of the formats, in Python."""
    field, low = (code & 0x7F) >> mantissa, code & ((1 << mantissa) - 1)
    value = (low / 2**mantissa + (field > 0)) * 2.0 ** (max(field, 1) - bias)
    return math.copysign(value, -1.0 if code & 0x80 else 1.0)


def grid(format):
    """The format's numbers that are not negative, rising."""
    if format is F16:
        return torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).double()
    mantissa, bias, top = (3, 7, 0x7E) if format is E4M3 else (2, 15, 0x7B)
    return torch.tensor([decode(code, mantissa, bias) for code in range(top + 1)], dtype=torch.float64)


def nearest(x, format):
    """Round to nearest, ties to even, too large to the largest: by search in the list of numbers, in float64."""
    numbers, magnitude = grid(format), x.double().abs().clamp(max=format.largest)
    above = torch.searchsorted(numbers, magnitude).clamp(max=len(numbers) - 1)
    below = (above - 1).clamp(min=0)
    up, down = numbers[above] - magnitude, magnitude - numbers[below]
    chosen = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return torch.copysign(numbers[chosen], x.double()).float()


@eights
def test_every_finite_code_has_its_value_and_comes_back(format):
    finite = [code for code in range(256) if code & 0x7F < len(grid(format))]
    codes = torch.tensor(finite, dtype=torch.uint8).view(format.dtype)
    values = dequantize(Quantized(codes, ONE, format))
    mantissa, bias = (3, 7) if format is E4M3 else (2, 15)
    assert values.tolist() == [decode(code, mantissa, bias) for code in finite]
    assert quantize(values, format, ONE).codes.view(torch.uint8).tolist() == finite  # -0 too


@eights
@pytest.mark.parametrize("exponent", [0, 5, -7])
def test_every_half_is_rounded_to_the_nearest_number(format, exponent):
    x = halves()
    x = x[~x.isnan()]
    scale = power_of_two(torch.tensor(exponent))
    q = quantize(x, format, scale)
    assert q.codes.float().equal(nearest(x * scale, format))
    assert q.codes.float().signbit().equal(x.signbit())
    inside = (x * scale).abs() <= format.largest
    assert q.codes.view(torch.uint8)[inside].equal((x * scale)[inside].to(format.dtype).view(torch.uint8))


@formats
def test_floats_are_rounded_to_the_nearest_number(format):
    bits = torch.randint(-(2**31), 2**31, (50_000,), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    spread = torch.linspace(-1.2, 1.2, 50_001) * format.largest * torch.logspace(-9, 0, 50_001)
    x = torch.cat([x[~x.isnan()], spread])
    assert quantize(x, format, ONE).codes.float().equal(nearest(x, format))


@formats
def test_too_large_becomes_the_largest_and_nan_stays(format):
    just = format.largest * (1 + 1 / 64)
    x = torch.tensor([just, -just, 2 * format.largest, 3e38, math.inf, -math.inf, math.nan])
    for rounding in ("nearest", "stochastic"):
        codes = quantize(x, format, ONE, rounding=rounding).codes.float()
        assert (codes[:6] / format.largest).tolist() == [1, -1, 1, 1, 1, -1]
        assert codes[6].isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_amax_tells_of_what_is_not_finite(bad, dtype):
    x = torch.tensor([[1.0, -3.0], [bad, 2.0]], dtype=dtype)
    assert not amax_of(x).isfinite()
    assert amax_of(x[0]) == 3
    assert scale_for(amax_of(x), E4M3) == 1
    assert scale_for(amax_of(x), E4M3, torch.tensor(8.0)) == 8


def test_nothing_at_all_and_codes_have_an_amax():
    assert amax_of(torch.zeros(0, 3)) == 0
    assert amax_of(quantize(torch.tensor([1.0, -2.0]), E5M2, ONE).codes) == 2
    assert quantize(torch.zeros(3), E4M3).scale == 1


@pytest.mark.parametrize(
    ("format", "amax", "scale"),
    [
        (E4M3, 0, 1), (E4M3, 10, 32), (E4M3, 10_000, 1 / 32), (E4M3, 448, 1), (E4M3, 449, 0.5), (E4M3, 1, 256),
        (E4M3, 7, 64), (E5M2, 1, 32768), (E5M2, 3, 16384), (F16, 1, 32768), (F16, 1000, 64), (F16, 1e-6, 2.0**35),
        (E4M3, 3e38, 2.0**-120), (E4M3, 1e-45, 2.0**126), (F16, 2.0**-140, 2.0**126),
    ],
)  # fmt: skip
def test_scales_of_the_reference(format, amax, scale):
    assert scale_for(torch.tensor(float(amax)), format) == scale


@pytest.mark.parametrize("k", [-40, -3, 0, 11])
def test_the_scale_turns_just_where_the_range_ends(k):
    edge = torch.tensor(1.75 * 2.0**k)
    assert scale_for(edge, E4M3) == 2.0 ** (8 - k)
    assert scale_for(torch.nextafter(edge, torch.tensor(0.0)), E4M3) == 2.0 ** (8 - k)
    assert scale_for(torch.nextafter(edge, torch.tensor(math.inf)), E4M3) == 2.0 ** (7 - k)


@formats
@given(amax=st.floats(2.0**-100, 2.0**120, width=32))
def test_the_scale_is_the_greatest_that_fits(format, amax):
    scale = scale_for(torch.tensor(amax), format).item()
    assert amax * scale <= format.largest < amax * scale * 2
    assert math.frexp(scale)[0] == 0.5


def test_casts_of_the_reference():
    x = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    assert (dequantize(quantize(x.half(), E4M3)) - x).abs().max() < 0.1
    assert (dequantize(quantize(x, F16)) - x).abs().max() < 1e-3
    tiny = torch.tensor([2.0**-17], dtype=torch.float16)
    assert dequantize(quantize(dequantize(quantize(tiny, F16)), E4M3)) == tiny
    assert quantize(torch.tensor([5.0, 16.0, 8.0, 24.0]), E4M3, ONE).codes.view(torch.uint8).tolist() == [
        0x4A, 0x58, 0x50, 0x5C,
    ]  # fmt: skip
    ties = torch.tensor([1.0625, 17.0, 19.0, 2.0**-10, 1.5 * 2.0**-9])
    assert quantize(ties, E4M3, ONE).codes.float().tolist() == [1, 16, 20, 0, 2.0**-8]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_taken_as_float32(dtype):
    x = torch.linspace(-2, 2, 101).to(dtype)
    assert quantize(x, E4M3).codes.float().equal(quantize(x.float(), E4M3).codes.float())


@eights
def test_stochastic_rounding_is_exact_in_the_mean(format):
    """A half cuts at most 15 bits, so that 2^15 evenly spaced noises make every outcome as often as it is due."""
    x = halves()
    x = x[(x.abs() <= format.largest)][::523]
    noise = (torch.arange(2**15) << 17)[:, None].expand(-1, len(x))
    rounded = round_with(x.expand(2**15, -1), format, noise)
    assert rounded.double().mean(0).equal(x.double())
    assert rounded.to(format.dtype).float().equal(rounded)  # all are numbers of the format
    assert ((rounded == rounded.amax(0)) | (rounded == rounded.amin(0))).all()  # two outcomes at most


@formats
def test_stochastic_rounding_keeps_the_formats_numbers(format):
    numbers = torch.cat([grid(format), -grid(format)]).float()
    generator = torch.Generator().manual_seed(0)
    q = quantize(numbers, format, ONE, rounding="stochastic", generator=generator)
    assert q.codes.float().equal(numbers)
    assert q.codes.float().signbit().equal(numbers.signbit())


@formats
@pytest.mark.parametrize("value", [0.3017, 1.0001, -7.77, 3e-3])
def test_stochastic_rounding_is_unbiased_over_a_million_draws(format, value):
    x = torch.full((10**6,), value)
    generator = torch.Generator().manual_seed(3)
    drawn = dequantize(quantize(x, format, ONE, rounding="stochastic", generator=generator)).double()
    assert (drawn.mean() - x[0]).abs() <= 3 * drawn.std() / 1e3 + 1e-12
    assert drawn.unique().numel() == 2


def test_stochastic_rounding_is_repeated_by_its_generator():
    x = torch.randn(999, generator=torch.Generator().manual_seed(5))
    one, two, other = (
        quantize(x, E4M3, rounding="stochastic", generator=torch.Generator().manual_seed(seed)).codes.float()
        for seed in (1, 1, 2)
    )
    assert one.equal(two) and not one.equal(other)


def test_far_below_the_smallest_number_stochastic_rounding_rarely_leaves_zero():
    x = torch.full((4,), 2.0**-9 * 2.0**-32)
    assert round_with(x, E4M3, torch.tensor([0, 1, 2**31, 2**32 - 1])).tolist() == [0, 0, 0, 2.0**-9]
    assert not round_with(torch.full((2,), 1e-45), E4M3, torch.tensor([0, 2**32 - 1])).any()


def test_shares_and_snr():
    x = torch.tensor([448.0, -448.0, 500.0, 1.0, 1e-4, 0.0, 1.0625, -1e-4])
    q = quantize(x, E4M3, ONE)
    assert share_saturated(q) == 3 / 8
    assert share_underflown(x, q) == 2 / 8
    assert snr_db(x[:2], quantize(x[:2], E4M3)) == math.inf
    y = torch.tensor([17.0, 3.0])  # 16 and 3
    assert snr_db(y, quantize(y, E4M3, ONE)).item() == pytest.approx(10 * math.log10(298), rel=1e-6)
