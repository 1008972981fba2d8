"""AdamW on states of few bits: the step in float32, its formats, and scales that are known before the step.

Formula: m' = b1 m + (1 - b1) g;  v' = b2 v + (1 - b2) g^2;  w' = (1 - lr wd) w - lr / c1 * m' / (sqrt(v' / c2) + eps)
         with c = 1 - b^t; m', v' enter the update unrounded, then all three are stored rounded.
         Predictive scales are those of upper bounds of what will be stored, from amaxes A of what is stored:
         A_m' <= b1 A_m + (1 - b1) A_g;  A_v' <= b2 A_v + (1 - b2) A_g^2;  A_w' <= (1 - lr wd) A_w + lr U.
Source:  FP8-LM (arXiv 2310.18313), section 2.2, for the formats and just-in-time scales.
Differs: predictive scales and the guard are additions. In exact arithmetic Adam's update is at most
         U = (1 - b1) / c1 * sqrt(c2 / (1 - b2) * sum_{i<t} (b1^2 / b2)^i)  (Cauchy-Schwarz, b1^2 < b2).
         Rounded states break that: to nearest, the lowest codes of m stop decaying when gradients end; at random, a
         gradient too small for v may still leave m, and the update is up to m / eps. The guard cuts updates at 2 U, so
         that the bound of A_w' holds too.

A step goes through a tensor in slices and writes in place, so that it never holds float32 of a tensor's size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from postgrad.errors import ConfigError
from postgrad.fp8.numerics import (
    E4M3,
    F16,
    Format,
    Quantized,
    Rounding,
    amax_of,
    dequantize,
    quantize,
    round_with,
    scale_for,
)

Scales = Literal["predictive", "jit"]
BF16 = Format("BF16", torch.bfloat16, torch.finfo(torch.bfloat16).max)
"""Brain floats; they need no scale."""
F32 = Format("F32", torch.float32, torch.finfo(torch.float32).max)
"""Full precision; it needs no scale."""
GUARD = 2.0
"""Times the largest update of exact Adam: what the guard lets through, so that rounding of states is not cut."""
SLACK = 1 + 2**-18
"""Times a bound: what float32 may add to it when it is computed."""
SMALLEST_SLICE, LARGEST_SLICE, NUM_SLICES = 2**14, 2**20, 1024
"""Of a tensor's elements: a 1024th at a time, between these, takes below 0.2 bytes an element of a large tensor."""
_MASK, _GOLDEN, _MULTIPLIERS = 0xFFFFFFFF, 0x9E3779B9, (0x21F0AAAD, 0xD35A2D97)


@dataclass(frozen=True)
class StateFormats:
    """Formats of the weight of record, the two moments and the gradient, and whether updates are guarded."""

    master: Format = F16
    m: Format = E4M3
    v: Format = F16
    gradient: Format = E4M3
    guard: bool = True


STATES = {
    "paper": StateFormats(),
    "fp32": StateFormats(F32, F32, F32, F32, guard=False),
    "O1": StateFormats(master=F16, m=F32, v=F32),
    "bf16": StateFormats(BF16, BF16, BF16, BF16, guard=False),
    "bf16_master": StateFormats(master=BF16, guard=False),
    "e4m3_master": StateFormats(master=E4M3, guard=False),
    "e4m3_v": StateFormats(v=E4M3, guard=False),
}
"""Named choices: "paper" is its level O2, "O1" has moments of full precision. All after that lose accuracy or diverge:
they are the paper's ablations, as it ran them."""


class Hyper(NamedTuple):
    """The settings of one step; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


class Held(NamedTuple):
    """A stored tensor and the greatest magnitude of its stored values."""

    q: Quantized
    amax: Float[Tensor, ""]


class Moments(NamedTuple):
    """What the optimizer stores of a parameter: itself and its two moments."""

    master: Held
    m: Held
    v: Held


class Gradient(NamedTuple):
    """A gradient's codes, and the amax it was scaled by: not finite if any of its summands was not.

    No value of the codes is above that amax, rounded as they were: bounds of the next states count on it.
    """

    q: Quantized
    amax: Float[Tensor, ""]


class Store(NamedTuple):
    """How to store: which scales, which rounding, the seed of stochastic rounding, and whether to compile the step."""

    scales: Scales = "predictive"
    rounding: Rounding = "nearest"
    seed: int = 0
    compile: bool = False


class Coefficients(NamedTuple):
    """The numbers of one step, each rounded to float32 where it is used; `limit` is infinite without the guard."""

    beta1: float | Tensor
    rest1: float | Tensor
    beta2: float | Tensor
    rest2: float | Tensor
    root2: float | Tensor
    eps: float | Tensor
    limit: float | Tensor
    shrink: float | Tensor
    rate: float | Tensor


class Bounds(NamedTuple):
    """The numbers of the bound of A_w': |1 - lr wd| and lr times what the guard lets through."""

    shrink: float
    add: float


def needs_scale(format: Format) -> bool:
    """Say whether the format's range is too small to do without a scale."""
    return format.largest <= F16.largest


def hold(x: Float[Tensor, "*shape"], format: Format) -> Held:
    """Store a tensor with a scale just in time, if its format has any, and note the amax of what was stored."""
    return noted(quantize(x, format, None if needs_scale(format) else torch.ones((), device=x.device)))


def full(x: Float[Tensor, "*shape"]) -> Held:
    """Take a tensor as one that is stored in full precision, where no amax is asked for."""
    one = torch.ones((), device=x.device)
    return Held(Quantized(x.detach().float(), one, F32), torch.zeros_like(one))


def check_betas(betas: tuple[float, float]) -> None:
    """Refuse betas for which Adam's update has no bound."""
    beta1, beta2 = betas
    if not (0 <= beta1 < 1 and beta1**2 < beta2 < 1):
        raise ConfigError(f"betas must have 0 <= beta1 < 1 and beta1^2 < beta2 < 1; found {(beta1, beta2)}")


def noted(q: Quantized) -> Held:
    """Note the amax of stored values."""
    codes = flat(q.codes)
    return Held(q, _greatest([amax_of(codes[part]) for part in slices(codes.numel())], codes.device) / q.scale)


def start(master: Held, formats: StateFormats) -> Moments:
    """Return the states before the first step: the weight, and moments of 0."""
    shape, device = master.q.codes.shape, master.q.codes.device
    m, v = (
        Held(
            Quantized(torch.zeros(shape, dtype=format.dtype, device=device), torch.ones((), device=device), format),
            torch.zeros((), device=device),
        )
        for format in (formats.m, formats.v)
    )
    return Moments(master, m, v)


def update_limit(hyper: Hyper) -> float:
    """Return U, the largest update of exact Adam in units of the learning rate; the formula is at the top."""
    ratio = hyper.beta1**2 / hyper.beta2
    powers = (1 - ratio**hyper.step) / (1 - ratio)
    correct1, correct2 = 1 - hyper.beta1**hyper.step, 1 - hyper.beta2**hyper.step
    return float((1 - hyper.beta1) / correct1 * (correct2 / (1 - hyper.beta2) * powers) ** 0.5)


def hyper_of(group: Mapping[str, Any], step: int) -> Hyper:
    """Return the settings of a step of an optimizer's group."""
    beta1, beta2 = group["betas"]
    return Hyper(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], step)


def coefficients(hyper: Hyper, guard: bool) -> Coefficients:
    """Return the numbers of a step."""
    correct1, correct2 = 1 - hyper.beta1**hyper.step, 1 - hyper.beta2**hyper.step
    return Coefficients(
        beta1=hyper.beta1,
        rest1=1 - hyper.beta1,
        beta2=hyper.beta2,
        rest2=1 - hyper.beta2,
        root2=correct2**0.5,
        eps=hyper.eps,
        limit=GUARD * update_limit(hyper) * correct1 if guard else float("inf"),
        shrink=1 - hyper.lr * hyper.weight_decay,
        rate=hyper.lr / correct1,
    )


def bounds_of(hyper: Hyper) -> Bounds:
    """Return the numbers of the bound of A_w'."""
    return Bounds(abs(1 - hyper.lr * hyper.weight_decay), GUARD * update_limit(hyper) * hyper.lr)


def adam(
    w: Float[Tensor, "*shape"],
    m: Float[Tensor, "*shape"],
    v: Float[Tensor, "*shape"],
    g: Float[Tensor, "*shape"],
    k: Coefficients,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return w', m', v' in float32; every product is rounded before it is added (no fused multiply-add).

    The root goes through float64, which rounds it correctly: float32 roots of libraries differ in the last bit.
    """
    m = m * k.beta1 + g * k.rest1
    v = v * k.beta2 + (g * k.rest2) * g
    root = v.double().sqrt().to(v.dtype)
    update = m / (root / k.root2 + k.eps)
    update = update.clamp(-k.limit, k.limit)  # type: ignore[arg-type]
    return w * k.shrink - update * k.rate, m, v


def stored_amax(gradient: Gradient) -> Float[Tensor, ""]:
    """Return the amax of a gradient's stored values, from the amax that it was scaled by: rounding keeps the order."""
    return dequantize(quantize(gradient.amax, gradient.q.format, gradient.q.scale))


def predicted_scales(
    before: Moments, amax: Float[Tensor, ""], hyper: Hyper
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the scales of w', m', v' from upper bounds, without a look at w', m' or v'.

    Formats of 16 bits keep the upper half of their range free. A bound of 0 keeps the scale before.

    Args: amax: of the gradient that the step takes, clipping included.
    """
    of_master = bounds_of(hyper)
    bounds = (
        before.master.amax * of_master.shrink + of_master.add,
        before.m.amax * hyper.beta1 + amax * (1 - hyper.beta1),
        before.v.amax * hyper.beta2 + (amax * (1 - hyper.beta2)) * amax,
    )
    master, m, v = (
        scale_for(bound * SLACK, with_room(held.q.format), held.q.scale) if needs_scale(held.q.format) else held.q.scale
        for bound, held in zip(bounds, before, strict=True)
    )
    return master, m, v


def step_states(
    before: Moments, gradient: Gradient, hyper: Hyper, *, guard: bool = True, factor: float = 1.0, store: Store
) -> Moments:
    """Take one step of one parameter; codes are written in place, scales and amaxes are new tensors.

    Args: gradient: finite.   factor: times the gradient, clipping for example.
    """
    stored = (*(held.q for held in before), gradient.q)
    codes, scales = [flat(q.codes) for q in stored], [q.scale for q in stored]
    device, num = codes[0].device, codes[0].numel()
    parts = [slice(0, num)] if store.compile and num else slices(num)
    look, write = (_compiled(_look), _compiled(_write)) if store.compile else (_look, _write)
    numbers = torch.tensor([*coefficients(hyper, guard), factor], device=device)
    formats = [held.q.format for held in before]
    if store.scales == "predictive":
        after = list(predicted_scales(before, stored_amax(gradient) * numbers[-1], hyper))
    else:
        seen = [look([x[part] for x in codes], scales, numbers) for part in parts]
        after = [
            scale_for(_greatest([amaxes[i] for amaxes in seen], device), format) if needs_scale(format) else scales[i]
            for i, format in enumerate(formats)
        ]
    keys = torch.tensor(noise_keys(store.seed), device=device) if store.rounding == "stochastic" else None
    for part in parts:
        write([x[part] for x in codes], scales, after, numbers, formats, keys, part.start)
    for q, values in zip(stored[:3], codes, strict=False):
        if not q.codes.is_contiguous():
            q.codes.copy_(values.view(q.codes.shape))
    w, m, v = (noted(held.q._replace(scale=scale)) for held, scale in zip(before, after, strict=True))
    return Moments(w, m, v)


def _look(codes: list[Tensor], scales: list[Tensor], numbers: Float[Tensor, " K"]) -> list[Tensor]:
    """Return the amaxes of w', m', v' before they are rounded."""
    return [amax_of(x) for x in _next(codes, scales, numbers)]


def _write(
    codes: list[Tensor],
    scales: list[Tensor],
    after: list[Tensor],
    numbers: Float[Tensor, " K"],
    formats: list[Format],
    keys: Int[Tensor, "3 2"] | None,
    start: int,
) -> None:
    """Write w', m', v' over the codes before."""
    for i, x in enumerate(_next(codes, scales, numbers)):
        scaled = (x * after[i]).clamp(-formats[i].largest, formats[i].largest)
        if keys is not None and formats[i].dtype != torch.float32:
            scaled = round_with(scaled, formats[i], noise(keys[i], start, x.numel()))
        codes[i].copy_(scaled)


def _next(codes: list[Tensor], scales: list[Tensor], numbers: Float[Tensor, " K"]) -> tuple[Tensor, Tensor, Tensor]:
    w, m, v, g = (x.float() / scale for x, scale in zip(codes, scales, strict=True))
    *k, factor = numbers.unbind()
    return adam(w, m, v, g * factor, Coefficients(*k))


@cache
def _compiled(function: Any) -> Any:
    """Compile for vectors of any length; float32 products stay unfused, as in the reference."""
    options: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "off"}
    return torch.compile(function, dynamic=True, fullgraph=True, options=options)


def slices(num: int) -> list[slice]:
    """Cut a vector into slices that are small beside it."""
    size = min(max(num // NUM_SLICES, SMALLEST_SLICE), LARGEST_SLICE)
    return [slice(first, min(first + size, num)) for first in range(0, num, size)]


def flat(x: Tensor) -> Tensor:
    """Return a tensor as a vector: the same memory where it is contiguous."""
    return x.reshape(-1)


def noise_keys(seed: int) -> list[list[int]]:
    """Return two 32-bit keys for each of w, m, v."""
    return [[_spread(seed + 2 * i), _spread(seed + 2 * i + 1)] for i in range(3)]


def noise(keys: Int[Tensor, "2"], start: int, num: int) -> Int[Tensor, " num"]:
    """Return 32 random bits for each element from `start` on: a hash of its index and the keys, the same anywhere."""
    index = torch.arange(num, device=keys.device) + start
    first = _mix((index & _MASK) ^ keys[0])
    return _mix(first ^ keys[1] ^ (((index >> 32) * _GOLDEN) & _MASK))


def _mix(x: Int[Tensor, " num"]) -> Int[Tensor, " num"]:
    """Mix 32 bits so that each comes to depend on all; products wrap around at 64 bits, of which 32 are kept."""
    x = ((x ^ (x >> 16)) * _MULTIPLIERS[0]) & _MASK
    x = ((x ^ (x >> 15)) * _MULTIPLIERS[1]) & _MASK
    return x ^ (x >> 15)


def _spread(x: int) -> int:
    """Turn a 64-bit number into 32 mixed bits."""
    x = (x * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return (x ^ (x >> 31)) & _MASK


def _greatest(amaxes: list[Tensor], device: torch.device) -> Float[Tensor, ""]:
    """Return the greatest of some amaxes, NaN if any is."""
    return torch.stack(amaxes).amax() if amaxes else torch.zeros((), device=device)


def with_room(format: Format) -> Format:
    """Return the format as predicted scales see it: 16 bits keep the upper half of their range free."""
    return replace(format, largest=format.largest / 2) if format.dtype == torch.float16 else format
