# mypy: disable-error-code="untyped-decorator,misc"
"""Triton kernels of the optimizer's step: many tensors in one launch, one pass, the bits of the torch reference.

A table has a row of addresses for each tensor; a program takes one chunk of one tensor. Rounding to 8 bits, to BF16 and
at random is done on integers: the casts of Triton's interpreter round otherwise. Products must stay unfused (launch
with enable_fp_fusion=False); roots and quotients are the correctly rounded ones.

Source:  the formulas are those of `postgrad.fp8.numerics` and `postgrad.fp8.adam`, which say where they are from.

A row of the table (T 13): addresses of the codes of w, m, v, g, of their scales, of their amaxes; how many elements.
A row of numbers (T 12): `Coefficients`, the factor of the gradient, `Bounds`. Of keys (T 6): two for each of w, m, v.

A row of chunks (C 2): the tensor, the first element.

Letters: T tensors, C chunks. Kinds of codes: 0 E4M3, 1 E5M2, 2 F16, 3 BF16, 4 float32. KINDS: those of w, m, v, g as
the digits of a number to base 16, lowest first, then 1 to round at random (tuples of constants are new in Triton).
"""

from typing import Any, no_type_check

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether these kernels run in the interpreter, on a CPU: Triton decides it when it is first imported."""


@triton.jit
@no_type_check
def _cut(x, limit):
    """Bring into [-limit, limit]; NaN stays."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
@no_type_check
def _floats(codes, KIND: tl.constexpr):
    """Return the numbers that integer codes stand for, exactly."""
    codes = codes.to(tl.int32)
    if KIND == 0:
        size = codes & 0x7F
        value = (size << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120, so subnormals come right too
        bits = tl.where(size == 0x7F, 0x7FC00000, value.to(tl.int32, bitcast=True)) | ((codes & 0x80) << 24)
    elif KIND == 1:
        bits = (codes << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    elif KIND == 2:
        bits = codes.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    elif KIND == 3:
        bits = codes << 16
    else:
        bits = codes
    return bits.to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _codes(x, KIND: tl.constexpr):
    """Round float32 in the format's range to integer codes, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    sign = (bits >> 31) & 1
    if KIND == 0:
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
        small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(size < 0x3C800000, small, normal)
        code = tl.where(size > 0x7F800000, 0x7F, code) | (sign << 7)
    elif KIND == 1:
        normal = ((size + 0xFFFFF + ((size >> 21) & 1)) >> 21) - 448
        small = (tl.abs(x) + 128.0).to(tl.int32, bitcast=True) - 0x43000000
        code = tl.where(size < 0x38800000, small, normal)
        code = tl.where(size > 0x7F800000, 0x7F, code) | (sign << 7)
    elif KIND == 2:
        code = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    elif KIND == 3:
        code = (size + 0x7FFF + ((size >> 16) & 1)) >> 16
        code = tl.where(size > 0x7F800000, 0x7FC0, code) | (sign << 15)
    else:
        code = bits
    return code


@triton.jit
@no_type_check
def _size(codes, KIND: tl.constexpr):
    """Return codes without their sign: they are in the order of the magnitudes, with NaN above all."""
    if KIND < 2:
        size = codes & 0x7F
    elif KIND < 4:
        size = codes & 0x7FFF
    else:
        size = codes & 0x7FFFFFFF
    return size


@triton.jit
@no_type_check
def _integers(address, KIND: tl.constexpr):
    """Turn an address into a pointer to codes, seen as integers."""
    if KIND < 2:
        pointer = address.to(tl.pointer_type(tl.uint8))
    elif KIND < 4:
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address.to(tl.pointer_type(tl.int32))
    return tl.multiple_of(pointer, 16)


@triton.jit
@no_type_check
def _scalar(address):
    """Load a float32 from an address."""
    return tl.load(address.to(tl.pointer_type(tl.float32)))


@triton.jit
@no_type_check
def _inverse(scale):
    """Return 1 / scale of a power of two, exactly: dividing by the one is multiplying by the other."""
    return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _largest(KIND: tl.constexpr):
    """Return the format's largest finite number."""
    if KIND == 0:
        largest = 448.0
    elif KIND == 1:
        largest = 57344.0
    elif KIND == 2:
        largest = 65504.0
    elif KIND == 3:
        largest = 3.3895313892515355e38
    else:
        largest = 3.4028234663852886e38
    return largest


@triton.jit
@no_type_check
def _mix(x):
    """Mix 32 bits: see `postgrad.fp8.adam`."""
    x = (x ^ (x >> 16)) * tl.full((), 0x21F0AAAD, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0xD35A2D97, tl.uint32)
    return x ^ (x >> 15)


@triton.jit
@no_type_check
def _noise(keys, index):
    """Return 32 random bits for each index."""
    key0, key1 = tl.load(keys).to(tl.uint32), tl.load(keys + 1).to(tl.uint32)
    high = (index >> 32).to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32)
    return _mix(_mix(index.to(tl.uint32) ^ key0) ^ key1 ^ high)


@triton.jit
@no_type_check
def _round_at_random(x, noise, KIND: tl.constexpr):
    """Round float32 to a number of the format, still in float32, as `round_with` does."""
    MANTISSA: tl.constexpr = 3 if KIND == 0 else 2 if KIND == 1 else 10 if KIND == 2 else 7
    LOWEST: tl.constexpr = -6 if KIND == 0 else -14 if KIND < 3 else -126
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    field = size >> 23
    significand = ((size & 0x7FFFFF) | tl.where(field > 0, 0x800000, 0)).to(tl.int64)
    exponent = tl.maximum(field, 1) - 127
    cut = 23 - MANTISSA + tl.maximum(LOWEST - exponent, 0)
    significand = significand >> tl.minimum(tl.maximum(cut - 32, 0), 62)
    cut = tl.minimum(cut, 32)
    steps = (significand + (noise.to(tl.int64) >> (32 - cut))) >> cut
    unit = ((tl.maximum(exponent, LOWEST) + 127) << 23).to(tl.float32, bitcast=True)
    rounded = steps.to(tl.float32) * (1.0 / (1 << MANTISSA)) * unit  # in this order no factor is subnormal
    rounded = rounded.to(tl.int32, bitcast=True) | (bits & -0x80000000)
    return tl.where(size > 0x7F800000, x, rounded.to(tl.float32, bitcast=True))


@triton.jit
@no_type_check
def _load(address, at, num, KIND: tl.constexpr, WHOLE: tl.constexpr):
    """Load a part of a tensor's codes as float32; a part that is whole needs no mask, and so is loaded in vectors."""
    pointer = _integers(address, KIND) + at
    return _floats(tl.load(pointer) if WHOLE else tl.load(pointer, mask=at < num, other=0), KIND)


@triton.jit
@no_type_check
def _next(row, number, at, KINDS: tl.constexpr, WHOLE: tl.constexpr):
    """Load a part of a tensor's codes and return w', m', v' in float32: the operations of `adam`, in its order."""
    num = tl.load(row + 12)
    w = _load(tl.load(row), at, num, KINDS % 16, WHOLE) * _inverse(_scalar(tl.load(row + 4)))
    m = _load(tl.load(row + 1), at, num, KINDS // 16 % 16, WHOLE) * _inverse(_scalar(tl.load(row + 5)))
    v = _load(tl.load(row + 2), at, num, KINDS // 256 % 16, WHOLE) * _inverse(_scalar(tl.load(row + 6)))
    g = _load(tl.load(row + 3), at, num, KINDS // 4096 % 16, WHOLE)
    scale = _scalar(tl.load(row + 7))
    if (scale.to(tl.int32, bitcast=True) & 0x7FFFFF) == 0:  # noqa: SIM108 - a power of two, and so is its inverse
        g = g * _inverse(scale)
    else:
        g = tl.div_rn(g, scale)
    g = g * tl.load(number + 9)
    m = m * tl.load(number) + g * tl.load(number + 1)
    v = v * tl.load(number + 2) + (g * tl.load(number + 3)) * g
    update = tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), tl.load(number + 4)) + tl.load(number + 5))
    update = _cut(update, tl.load(number + 6))
    return w * tl.load(number + 7) - update * tl.load(number + 8), m, v


@triton.jit
@no_type_check
def _rounded(x, scale, keys, at, KIND: tl.constexpr, RANDOM: tl.constexpr):
    """Turn values into codes."""
    x = _cut(x * scale, _largest(KIND))
    if RANDOM and KIND < 4:
        x = _round_at_random(x, _noise(keys, at), KIND)
    return _codes(x, KIND)


@triton.jit
@no_type_check
def _raise(top, sizes, at, num, WHOLE: tl.constexpr):
    """Raise a tensor's greatest code."""
    if not WHOLE:
        sizes = tl.where(at < num, sizes, 0)
    tl.atomic_max(top, tl.max(sizes, 0), sem="relaxed")


@triton.jit
@no_type_check
def _put(codes, address, top, at, num, KIND: tl.constexpr, WHOLE: tl.constexpr):
    """Store a part of a tensor."""
    pointer = _integers(address, KIND)
    stored = codes.to(pointer.dtype.element_ty)
    if WHOLE:
        tl.store(pointer + at, stored)
    else:
        tl.store(pointer + at, stored, mask=at < num)
    _raise(top, _size(codes, KIND), at, num, WHOLE)


@triton.jit
@no_type_check
def _step(row, number, keys, after, tops, at, KINDS: tl.constexpr, WHOLE: tl.constexpr):
    """Take the step of a part of a tensor and store it."""
    num = tl.load(row + 12)
    w, m, v = _next(row, number, at, KINDS, WHOLE)
    w = _rounded(w, tl.load(after), keys, at, KINDS % 16, KINDS // 65536)
    m = _rounded(m, tl.load(after + 1), keys + 2, at, KINDS // 16 % 16, KINDS // 65536)
    v = _rounded(v, tl.load(after + 2), keys + 4, at, KINDS // 256 % 16, KINDS // 65536)
    _put(w, tl.load(row), tops, at, num, KINDS % 16, WHOLE)
    _put(m, tl.load(row + 1), tops + 1, at, num, KINDS // 16 % 16, WHOLE)
    _put(v, tl.load(row + 2), tops + 2, at, num, KINDS // 256 % 16, WHOLE)


@triton.jit
@no_type_check
def step_kernel(table, numbers, keys, after, tops, chunks, KINDS: tl.constexpr, CHUNK: tl.constexpr):
    """Take the step of one chunk and store it: after (T 3) scales, tops (T 3) the greatest codes."""
    tensor, first = tl.load(chunks + 2 * tl.program_id(0)), tl.load(chunks + 2 * tl.program_id(0) + 1)
    row, number, keys = table + tensor * 13, numbers + tensor * 12, keys + tensor * 6
    after, tops = after + tensor * 3, tops + tensor * 3
    at = tl.multiple_of(first, CHUNK) + tl.arange(0, CHUNK)
    if first + CHUNK <= tl.load(row + 12):
        _step(row, number, keys, after, tops, at, KINDS, True)
    else:
        _step(row, number, keys, after, tops, at, KINDS, False)


@triton.jit
@no_type_check
def look_kernel(table, numbers, tops, chunks, KINDS: tl.constexpr, CHUNK: tl.constexpr):
    """Find the greatest magnitudes of w', m', v', as bits of float32, without storing anything."""
    tensor, first = tl.load(chunks + 2 * tl.program_id(0)), tl.load(chunks + 2 * tl.program_id(0) + 1)
    row, number, tops = table + tensor * 13, numbers + tensor * 12, tops + tensor * 3
    num, at = tl.load(row + 12), tl.multiple_of(first, CHUNK) + tl.arange(0, CHUNK)
    if first + CHUNK <= num:
        w, m, v = _next(row, number, at, KINDS, True)
    else:
        w, m, v = _next(row, number, at, KINDS, False)
    _raise(tops, _size(_codes(w, 4), 4), at, num, False)
    _raise(tops + 1, _size(_codes(m, 4), 4), at, num, False)
    _raise(tops + 2, _size(_codes(v, 4), 4), at, num, False)


@triton.jit
@no_type_check
def _scale_for(amax, before, KIND: tl.constexpr, ROOM: tl.constexpr):
    """Return the greatest power of two that brings amax into the format: `scale_for` on bits; 1 without scales."""
    if KIND > 2:
        scale = before
    else:
        EXPONENT: tl.constexpr = 9 if KIND == 0 else 15 if KIND == 2 and ROOM else 16
        LIMIT: tl.constexpr = 0x600000 if KIND < 2 else 0x7FE000
        bits = amax.to(tl.int32, bitcast=True)
        over = tl.where((bits & 0x7FFFFF) > LIMIT, 1, 0)
        exponent = EXPONENT - ((bits >> 23) - 126) - over
        exponent = tl.minimum(tl.maximum(exponent, -126), 126)
        scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
        scale = tl.where((bits > 0) & (bits < 0x7F800000), scale, before)
    return scale


@triton.jit
@no_type_check
def scales_kernel(table, numbers, after, tops, KINDS: tl.constexpr, PREDICT: tl.constexpr):
    """Find the scales of one tensor's new states: from bounds, or from the greatest magnitudes; clear those."""
    tensor = tl.program_id(0)
    row, number = table + tensor * 13, numbers + tensor * 12
    after, tops = after + tensor * 3, tops + tensor * 3
    if PREDICT:
        scale = _scalar(tl.load(row + 7))
        g = _floats(
            _codes(_cut(_scalar(tl.load(row + 11)) * scale, _largest(KINDS // 4096 % 16)), KINDS // 4096 % 16),
            KINDS // 4096 % 16,
        )
        g = tl.div_rn(g, scale) * tl.load(number + 9)
        w = _scalar(tl.load(row + 8)) * tl.load(number + 10) + tl.load(number + 11)
        m = _scalar(tl.load(row + 9)) * tl.load(number) + g * tl.load(number + 1)
        v = _scalar(tl.load(row + 10)) * tl.load(number + 2) + (g * tl.load(number + 3)) * g
        slack = 1.000003814697265625  # 1 + 2^-18
        tl.store(after, _scale_for(w * slack, _scalar(tl.load(row + 4)), KINDS % 16, True))
        tl.store(after + 1, _scale_for(m * slack, _scalar(tl.load(row + 5)), KINDS // 16 % 16, True))
        tl.store(after + 2, _scale_for(v * slack, _scalar(tl.load(row + 6)), KINDS // 256 % 16, True))
    else:
        tl.store(after, _scale_for(tl.load(tops).to(tl.float32, bitcast=True), 1.0, KINDS % 16, False))
        tl.store(after + 1, _scale_for(tl.load(tops + 1).to(tl.float32, bitcast=True), 1.0, KINDS // 16 % 16, False))
        tl.store(after + 2, _scale_for(tl.load(tops + 2).to(tl.float32, bitcast=True), 1.0, KINDS // 256 % 16, False))
        for i in tl.static_range(3):
            tl.store(tops + i, 0)


@triton.jit
@no_type_check
def _keep(row, scale, top, KIND: tl.constexpr):
    """Store a tensor's new scale and the amax of what was stored."""
    tl.store(tl.load(row).to(tl.pointer_type(tl.float32)), scale)
    tl.store(tl.load(row + 4).to(tl.pointer_type(tl.float32)), _floats(top, KIND) * _inverse(scale))


@triton.jit
@no_type_check
def keep_kernel(table, after, tops, KINDS: tl.constexpr):
    """Store one tensor's new scales and amaxes, once every chunk is done."""
    tensor = tl.program_id(0)
    row, after, tops = table + tensor * 13 + 4, after + tensor * 3, tops + tensor * 3
    _keep(row, tl.load(after), tl.load(tops), KINDS % 16)
    _keep(row + 1, tl.load(after + 1), tl.load(tops + 1), KINDS // 16 % 16)
    _keep(row + 2, tl.load(after + 2), tl.load(tops + 2), KINDS // 256 % 16)


@triton.jit
@no_type_check
def norm_kernel(table, out, chunks, G: tl.constexpr, CHUNK: tl.constexpr):
    """Sum the squares of one chunk in float64; rows of the table (T 3): codes, scale, number of elements."""
    tensor, first = tl.load(chunks + 2 * tl.program_id(0)), tl.load(chunks + 2 * tl.program_id(0) + 1)
    row = table + tensor * 3
    at = tl.multiple_of(first, CHUNK) + tl.arange(0, CHUNK)
    if first + CHUNK <= tl.load(row + 2):
        g = _load(tl.load(row), at, 0, G, True).to(tl.float64)
    else:
        g = _load(tl.load(row), at, tl.load(row + 2), G, False).to(tl.float64)
    scale = _scalar(tl.load(row + 1)).to(tl.float64)
    tl.store(out + tl.program_id(0), tl.sum(g * g, 0) / (scale * scale))


KERNELS: tuple[Any, ...] = (norm_kernel, look_kernel, scales_kernel, step_kernel, keep_kernel)
"""All that are launched."""
