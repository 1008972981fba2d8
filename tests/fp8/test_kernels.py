"""The kernels' integer rounding against torch's casts, and the machine code they become.

The interpreter has to be chosen before Triton is imported, so the checks run in a process of their own, which prints
what it found; so does the compiler, which needs no GPU to compile for one.
"""

import json
import re
import sys

import pytest
import torch
from elsewhere import elsewhere, report

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from postgrad.fp8.adam import BF16, F32, noise, noise_keys, with_room  # noqa: E402
from postgrad.fp8.kernels import (  # noqa: E402
    KERNELS,
    _codes,
    _cut,
    _floats,
    _largest,
    _noise,
    _round_at_random,
    _scale_for,
)
from postgrad.fp8.numerics import E4M3, E5M2, F16, round_with, scale_for  # noqa: E402

FORMATS = {"E4M3": (E4M3, 0), "E5M2": (E5M2, 1), "F16": (F16, 2), "BF16": (BF16, 3), "F32": (F32, 4)}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
BLOCK = 1024


@triton.jit
def decode(codes, out, num, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, _floats(tl.load(codes + at, mask=at < num, other=0), KIND), mask=at < num)


@triton.jit
def encode(x, noise, out, num, KIND: tl.constexpr, RANDOM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = _cut(tl.load(x + at, mask=at < num, other=0), _largest(KIND))
    if RANDOM:
        value = _round_at_random(value, tl.load(noise + at, mask=at < num, other=0), KIND)
    tl.store(out + at, _codes(value, KIND), mask=at < num)


@triton.jit
def draw(keys, first, out, BLOCK: tl.constexpr):
    at = first.to(tl.int64) + tl.arange(0, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), _noise(keys, at).to(tl.int64))


@triton.jit
def scales(amax, out, num, KIND: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = _scale_for(tl.load(amax + at, mask=at < num, other=0), tl.full((BLOCK,), 8.0, tl.float32), KIND, ROOM)
    tl.store(out + at, found, mask=at < num)


def grid(x):
    return (triton.cdiv(x.numel(), BLOCK),)


def all_codes(format):
    """Every code of the format; of float32 a sample."""
    size = format.dtype.itemsize
    if size == 4:
        return torch.randint(-(2**31), 2**31, (2**14,), generator=torch.Generator().manual_seed(0)).int()
    return torch.arange(2 ** (8 * size), dtype=torch.int32).to(INTEGERS[size])


def hard_values(format):
    """All finite numbers of the format, those half way between two and their neighbours, and what is out of range."""
    exact = all_codes(format).view(format.dtype).float()
    exact = exact[exact.isfinite()].sort().values.unique()
    middle = ((exact[1:].double() + exact[:-1].double()) / 2).float()
    infinity = torch.tensor(float("inf"))
    near = [middle.nextafter(infinity), middle.nextafter(-infinity), exact.nextafter(infinity)]
    rest = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-45, 38, 4000)
    beyond = torch.tensor([float("inf"), float("nan"), 464.0, 465.0, 65520.0, 3e38, 1e-45, 0.0])
    return torch.cat([exact, middle, *near, rest, beyond, -beyond])


def check_decoding(name):
    format, kind = FORMATS[name]
    codes = all_codes(format)
    out = torch.empty(codes.shape)
    decode[grid(codes)](codes, out, codes.numel(), KIND=kind, BLOCK=BLOCK)
    expected = codes.view(format.dtype).float()
    assert out[~expected.isnan()].view(torch.int32).equal(expected[~expected.isnan()].view(torch.int32))
    assert out.isnan().equal(expected.isnan())


def assert_codes(out, expected, format):
    size = format.dtype.itemsize
    ours = out.to(INTEGERS[size])
    nan = expected.isnan()
    assert ours[~nan].equal(expected.to(format.dtype).view(INTEGERS[size])[~nan])
    assert ours.view(format.dtype).float()[nan].isnan().all() and nan.any()


def check_encoding(name):
    format, kind = FORMATS[name]
    x = hard_values(format)
    out = torch.empty(x.shape, dtype=torch.int32)
    encode[grid(x)](x, x, out, x.numel(), KIND=kind, RANDOM=False, BLOCK=BLOCK)
    assert_codes(out, x.clamp(-format.largest, format.largest), format)


def check_random_rounding(name):
    format, kind = FORMATS[name]
    x = hard_values(format).clamp(-format.largest, format.largest)
    if name == "BF16":  # round_with has no step below 2^-126, which smaller numbers of this format would need
        x = x[(x.abs() > 2.0**-110) | (x == 0) | x.isnan()]
    for bits in (noise(torch.tensor(noise_keys(1)[0]), 0, x.numel()), torch.full(x.shape, 2**32 - 1)):
        out = torch.empty(x.shape, dtype=torch.int32)
        encode[grid(x)](x, bits, out, x.numel(), KIND=kind, RANDOM=True, BLOCK=BLOCK)
        assert_codes(out, round_with(x, format, bits), format)


def check_noise():
    keys = torch.tensor(noise_keys(123))
    for first in (0, 2**31 - 100, 2**32 - 100, 5 * 2**33):
        for key in keys:
            out = torch.empty(BLOCK, dtype=torch.int64)
            draw[(1,)](key.contiguous(), first, out, BLOCK=BLOCK)
            assert out.equal(noise(key, first, BLOCK))


def check_scales(name):
    format, kind = FORMATS[name]
    exponents = torch.arange(-149.0, 128.0)
    amax = torch.cat([significand * 2**exponents for significand in (1.0, 1.25, 1.75, 1.9990234375)])
    amax = torch.cat([amax, amax.nextafter(torch.tensor(4e38)), amax.nextafter(torch.tensor(0.0))])
    amax = torch.cat([amax, torch.tensor([0.0, float("inf"), float("nan"), 448.0, 449.0])])
    for room in (False, True):
        out = torch.empty(amax.shape)
        scales[grid(amax)](amax, out, amax.numel(), KIND=kind, ROOM=room, BLOCK=BLOCK)
        target = with_room(format) if room else format
        assert out.equal(scale_for(amax, target, torch.full_like(amax, 8.0)))


TYPES = {"numbers": "*fp32", "after": "*fp32", "tops": "*i32", "out": "*fp64"}
CONSTANTS = {"KINDS": 0x10202, "G": 0, "PREDICT": True, "CHUNK": 4096}


def assembly(kernel, fused):
    """Compile a kernel for an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in CONSTANTS else TYPES.get(name, "*i64") for name in names}
    constants = {(i,): CONSTANTS[name] for i, name in enumerate(names) if name in CONSTANTS}
    options = {"enable_fp_fusion": fused, "num_warps": 8}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def check_machine_code():
    """No product is fused with a sum; roots and quotients are rounded correctly; whole chunks move 16 bytes at once."""
    for kernel in KERNELS:
        code = assembly(kernel, False)
        assert not re.search(r"\b(fma|mad)\.(rn\.)?(ftz\.)?f(32|64)", code), kernel
        assert ".ftz" not in code and not re.search(r"\b(div\.(full|approx)|sqrt\.approx|rcp\.)", code), kernel
    step = assembly(KERNELS[3], False)
    assert "sqrt.rn.f32" in step and "div.rn.f32" in step
    assert "ld.global.v4.b32" in step and "st.global.v4.b32" in step
    assert re.search(r"\bfma\.rn\.f32", assembly(KERNELS[3], True)), "the control: this is what the option forbids"


INTERPRETED = [(check, name) for name in FORMATS for check in ("check_decoding", "check_encoding")]
INTERPRETED += [("check_random_rounding", name) for name in FORMATS if name != "F32"]
INTERPRETED += [("check_scales", name) for name in ("E4M3", "E5M2", "F16")] + [("check_noise",)]


@pytest.fixture(scope="module")
def interpreted():
    return elsewhere(__file__, INTERPRETED, TRITON_INTERPRET="1")


@pytest.mark.parametrize("check", INTERPRETED, ids=" ".join)
def test_the_kernels_numbers_are_torchs(interpreted, check):
    assert interpreted[str([*check])] == ""


def test_the_machine_code_keeps_the_order_and_rounding_of_the_reference():
    assert list(elsewhere(__file__, [("check_machine_code",)], TRITON_INTERPRET="0").values()) == [""]


if __name__ == "__main__":
    report(json.loads(sys.argv[1]), globals())
