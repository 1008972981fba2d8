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
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from postgrad.fp8.numerics import E4M3, F16, Format, Quantized, Rounding, amax_of, dequantize, quantize, scale_for

Scales = Literal["predictive", "jit"]
BF16 = Format("BF16", torch.bfloat16, torch.finfo(torch.bfloat16).max)
"""Brain floats; they need no scale."""
F32 = Format("F32", torch.float32, torch.finfo(torch.float32).max)
"""Full precision; it needs no scale."""
GUARD = 2.0
"""Times the largest update of exact Adam: what the guard lets through, so that rounding of states is not cut."""
_SLACK = 1 + 2**-18  # what float32 may add to a bound when it is computed


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
    "bf16": StateFormats(BF16, BF16, BF16, BF16, guard=False),
    "bf16_master": StateFormats(master=BF16, guard=False),
    "e4m3_master": StateFormats(master=E4M3, guard=False),
    "e4m3_v": StateFormats(v=E4M3, guard=False),
}
"""Named choices; all after "fp32" lose accuracy or diverge: they are the paper's ablations, as it ran them."""


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


class Store(NamedTuple):
    """How to store: which scales, which rounding, and the generator of stochastic rounding."""

    scales: Scales = "predictive"
    rounding: Rounding = "nearest"
    generator: torch.Generator | None = None


def needs_scale(format: Format) -> bool:
    """Say whether the format's range is too small to do without a scale."""
    return format.largest <= F16.largest


def hold(
    x: Float[Tensor, "*shape"], format: Format, scale: Float[Tensor, ""] | None = None, store: Store | None = None
) -> Held:
    """Store a tensor with a scale, just in time by default, and note the amax of what was stored."""
    store = store or Store()
    if not needs_scale(format):
        scale = torch.ones((), device=x.device)
    exact = format.dtype == x.dtype
    rounding = "nearest" if exact else store.rounding
    return noted(quantize(x, format, scale, rounding=rounding, generator=store.generator))


def noted(q: Quantized) -> Held:
    """Note the amax of stored values."""
    return Held(q, amax_of(q.codes) / q.scale)


def start(x: Float[Tensor, "*shape"], formats: StateFormats) -> Moments:
    """Return the states before the first step: the weight, and moments of 0."""
    zero = torch.zeros(x.shape, device=x.device)
    return Moments(hold(x, formats.master), hold(zero, formats.m), hold(zero, formats.v))


def update_limit(hyper: Hyper) -> float:
    """Return U, the largest update of exact Adam in units of the learning rate; the formula is at the top."""
    ratio = hyper.beta1**2 / hyper.beta2
    powers = (1 - ratio**hyper.step) / (1 - ratio)
    correct1, correct2 = 1 - hyper.beta1**hyper.step, 1 - hyper.beta2**hyper.step
    return float((1 - hyper.beta1) / correct1 * (correct2 / (1 - hyper.beta2) * powers) ** 0.5)


def adam(
    w: Float[Tensor, "*shape"],
    m: Float[Tensor, "*shape"],
    v: Float[Tensor, "*shape"],
    g: Float[Tensor, "*shape"],
    hyper: Hyper,
    guard: bool,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return w', m', v' in float32; every product is rounded before it is added (no fused multiply-add)."""
    m = m * hyper.beta1 + g * (1 - hyper.beta1)
    v = v * hyper.beta2 + (g * (1 - hyper.beta2)) * g
    correct1, correct2 = 1 - hyper.beta1**hyper.step, 1 - hyper.beta2**hyper.step
    update = m / (v.sqrt() / correct2**0.5 + hyper.eps)
    if guard:
        limit = GUARD * update_limit(hyper) * correct1
        update = update.clamp(-limit, limit)
    return w * (1 - hyper.lr * hyper.weight_decay) - update * (hyper.lr / correct1), m, v


def predicted_scales(
    before: Moments, amax: Float[Tensor, ""], hyper: Hyper, formats: StateFormats
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the scales of w', m', v' from upper bounds, without a look at w', m' or v'.

    Formats of 16 bits keep the upper half of their range free. A bound of 0 keeps the scale before.

    Args: amax: of the gradient that the step takes, clipping included.
    """
    shrink = abs(1 - hyper.lr * hyper.weight_decay)
    bounds = (
        before.master.amax * shrink + GUARD * update_limit(hyper) * hyper.lr,
        before.m.amax * hyper.beta1 + amax * (1 - hyper.beta1),
        before.v.amax * hyper.beta2 + (amax * (1 - hyper.beta2)) * amax,
    )
    wanted = (formats.master, formats.m, formats.v)
    master, m, v = (
        scale_for(bound * _SLACK, _with_room(format), held.q.scale)
        for bound, format, held in zip(bounds, wanted, before, strict=True)
    )
    return master, m, v


def step_states(
    before: Moments,
    g: Float[Tensor, "*shape"],
    hyper: Hyper,
    formats: StateFormats,
    store: Store,
) -> Moments:
    """Take one step of one parameter and store it.

    Args: g: the gradient's values, clipped; finite.
    """
    w, m, v = (dequantize(held.q) for held in before)
    w, m, v = adam(w, m, v, g, hyper, formats.guard)
    scales: tuple[Tensor | None, ...] = (None, None, None)
    if store.scales == "predictive":
        scales = predicted_scales(before, amax_of(g), hyper, formats)
    return Moments(
        hold(w, formats.master, scales[0], store),
        hold(m, formats.m, scales[1], store),
        hold(v, formats.v, scales[2], store),
    )


def _with_room(format: Format) -> Format:
    return replace(format, largest=format.largest / 2) if format.dtype == torch.float16 else format
