"""One step on states of few bits: the bit-exact vector, bounds, predictive scales, the guard."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postgrad.fp8.adam import (
    F32,
    GUARD,
    STATES,
    Gradient,
    Hyper,
    StateFormats,
    Store,
    adam,
    coefficients,
    hold,
    noise,
    noise_keys,
    noted,
    predicted_scales,
    start,
    step_states,
    update_limit,
)
from postgrad.fp8.numerics import E4M3, F16, Quantized, dequantize, quantize, round_with

PAPER = STATES["paper"]
JIT = Store("jit")


def hyper(step, *, lr=0.01, betas=(0.9, 0.95), decay=0.1):
    return Hyper(lr, *betas, 1e-8, decay, step)


def begin(w, formats):
    return start(hold(w, formats.master), formats)


def advance(states, g, now, formats, store):
    """Step with a gradient of full precision, which is taken as it is."""
    gradient = Gradient(Quantized(g, torch.ones(()), F32), g.abs().max())
    return step_states(states, gradient, now, guard=formats.guard, store=store)


def codes(held):
    q = held.q
    return q.scale.item(), (q.codes.view(torch.uint8) if q.format is E4M3 else q.codes).tolist()


@pytest.mark.parametrize("guard", [True, False])
def test_two_steps_equal_the_reference_bit_for_bit(guard):
    """Specification vector: w, g below, lr .01, betas .9 and .95, decay .1, scales just in time."""
    w, formats = torch.tensor([0.5, -0.25, 0.125, 1.0]), StateFormats(guard=guard)
    q = quantize(torch.tensor([0.1, -0.02, 0.003, 0.0004]), E4M3)
    assert q.scale == 4096 and q.codes.view(torch.uint8).tolist() == [125, 234, 84, 61]
    g = dequantize(q)
    assert g.tolist() == [0.1015625, -0.01953125, 0.0029296875, 0.000396728515625]
    states = begin(w, formats)
    assert codes(states.master) == (32768, [16384, -8192, 4096, 32768])
    states = advance(states, g, hyper(1), formats, JIT)
    assert codes(states.m) == (32768, [122, 232, 82, 58])
    assert codes(states.v) == (67108864, [34624, 1280, 28.796875, 0.5283203125])
    assert codes(states.master) == (65536, [32080, -15712, 7528, 64800])
    states = advance(states, g, hyper(2), formats, JIT)
    assert codes(states.m) == (16384, [122, 231, 81, 58])
    assert codes(states.v) == (33554432, [33760, 1248, 28.078125, 0.51513671875])
    assert codes(states.master) == (65536, [31408, -15040, 6852, 64096])
    assert dequantize(states.master.q).tolist() == [0.479248046875, -0.2294921875, 0.10455322265625, 0.97802734375]
    assert states.m.amax == dequantize(states.m.q).abs().max()


def test_in_float32_it_is_torchs_adamw():
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(5, 3))
    states = begin(param.detach().clone(), STATES["fp32"])
    reference = torch.optim.AdamW([param], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 30):
        param.grad = torch.randn(5, 3) * 10.0 ** (step % 5 - 2)
        reference.step()
        states = advance(states, param.grad, hyper(step), STATES["fp32"], JIT)
    assert dequantize(states.master.q).allclose(param, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.5), (0.95, 0.95)])
def test_no_gradients_make_an_update_above_the_limit(betas):
    """The worst gradients are g_i ~ (b1 / b2)^(t - i); they reach the limit, others stay below."""
    for steps in (1, 2, 10, 60):
        rows = torch.randn(50, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(steps))
        ratio = max(betas[0] / betas[1], 1e-3)
        rows[0] = ratio ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
        m, v, w = (torch.zeros(50, dtype=torch.float64) for _ in range(3))
        for i in range(steps):
            w, m, v = adam(torch.zeros(50), m, v, rows[:, i], coefficients(Hyper(1.0, *betas, 0.0, 0.0, i + 1), False))
        limit = update_limit(hyper(steps, betas=betas))
        assert w.abs().max() <= limit * (1 + 1e-9)
        assert w[0].abs().item() == pytest.approx(limit, rel=1e-4)


EVENTS = {"plain": 1.0, "spike": 1e4, "tiny": 1e-6, "zero": 0.0}


@given(
    events=st.lists(st.sampled_from([*EVENTS, "flip"]), min_size=1, max_size=25),
    seed=st.integers(0, 1000),
    lr=st.sampled_from([1e-4, 0.01, 0.5]),
    betas=st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.95, 0.95)]),
    zero_weights=st.booleans(),
)
def test_predicted_scales_never_overflow_and_never_get_lost(events, seed, lr, betas, zero_weights):
    generator = torch.Generator().manual_seed(seed)
    states = begin(torch.zeros(4, 8) if zero_weights else torch.randn(4, 8, generator=generator), PAPER)
    g = torch.randn(4, 8, generator=generator)
    for step, event in enumerate(events, start=1):
        drawn = torch.randn(4, 8, generator=generator)
        g = -g if event == "flip" else dequantize(quantize(drawn * EVENTS[event], E4M3))
        now = hyper(step, lr=lr, betas=betas)
        scales = predicted_scales(states, g.abs().max(), now)
        exact = adam(*(dequantize(held.q) for held in states), g, coefficients(now, PAPER.guard))
        for x, scale, format in zip(exact, scales, (F16, E4M3, F16), strict=True):
            assert x.isfinite().all()
            assert (x.abs() * scale).max() <= format.largest, "nothing is cut"
            assert scale.isfinite() and torch.frexp(scale).mantissa == 0.5
        states = advance(states, g, now, PAPER, Store())
        assert [held.q.scale for held in states] == list(scales)


def test_predicted_scales_come_back_after_a_spike():
    generator = torch.Generator().manual_seed(0)
    states = begin(torch.randn(64, 64, generator=generator), PAPER)
    ratios = []
    for step in range(1, 400):
        g = torch.randn(64, 64, generator=generator) * (1e4 if step == 20 else 1.0)
        exact = adam(*(dequantize(held.q) for held in states), g, coefficients(hyper(step, lr=1e-3), True))
        states = advance(states, g, hyper(step, lr=1e-3), PAPER, Store())
        jit = [hold(x, format).q.scale for x, format in zip(exact, (F16, E4M3, F16), strict=True)]
        ratios.append([(ours.q.scale / best).item() for ours, best in zip(states, jit, strict=True)])
    last = torch.tensor(ratios[-50:])
    assert last.max() <= 1 and last.min() >= 1 / 4


@pytest.mark.parametrize(("rounding", "low", "times"), [("nearest", -3, 1.5), ("stochastic", -6, 10.0)])
def test_the_guard_stops_updates_of_moments_that_no_longer_fit(rounding, low, times):
    """Beside gradients of 1, which make the scales, small ones come and end: m then is too large for its v."""
    moved = {True: 0.0, False: 0.0}
    g = torch.ones(2, 64)
    for guard in moved:
        formats = StateFormats(guard=guard)
        states = begin(torch.zeros(2, 64), formats)
        for step in range(1, 200):
            store = Store("jit", rounding, seed=step)
            g[1] = torch.logspace(low, low - 2, 64) if step < 50 else 0.0
            before = dequantize(states.master.q)
            states = advance(states, g, hyper(step, lr=1e-3, decay=0.0), formats, store)
            moved[guard] = max(moved[guard], (dequantize(states.master.q) - before).abs().max().item())
    assert moved[True] <= GUARD * 1e-3 * 1.165 * 1.1, "2 U, and the rounding of the weight"
    assert moved[False] > times * moved[True]


def test_stochastic_rounding_lets_a_frozen_moment_decay():
    formats, w = StateFormats(), torch.zeros(1, 1000)
    for rounding, left in (("nearest", 1.0), ("stochastic", 0.9)):
        frozen = torch.full_like(w, 2.0**-9)
        frozen[0, 0] = 448  # so that the scale stays
        m = noted(Quantized(frozen.to(E4M3.dtype), torch.ones(()), E4M3))
        states = begin(w, formats)._replace(m=m)
        after = advance(states, w, hyper(1), formats, Store(rounding=rounding, seed=3))
        assert after.m.q.scale == 1
        assert (dequantize(after.m.q)[0, 1:] * 2**9).mean().item() == pytest.approx(left, abs=0.03)


def test_noise_is_uniform_and_its_streams_have_nothing_in_common():
    keys = torch.tensor(noise_keys(7))
    streams = torch.stack([noise(key, 0, 2**18) for key in (*keys, *torch.tensor(noise_keys(8)))])
    assert streams.min() >= 0 and streams.max() < 2**32 and len(streams[0].unique()) > 2**18 * 0.9999
    share = streams.double() / 2**32 - 0.5
    assert share.mean(1).abs().max() < 4 * (1 / 12 / 2**18) ** 0.5
    correlation = torch.corrcoef(torch.cat([share, share[:1].roll(1), (streams[:1] & 0xFFFF).double()]))
    correlation[0, 7] = correlation[7, 0] = 0
    assert (correlation - torch.eye(8)).abs().max() < 5 / 2**9
    assert noise(keys[0], 1000, 50).equal(streams[0, 1000:1050]), "an element's bits do not depend on the slice"
    far = noise(keys[0], 2**32, 50)
    assert not far.equal(streams[0, :50]), "nor are they repeated after 2^32 elements"


def test_stochastic_rounding_is_unbiased():
    """The mean error of a million draws is within three standard errors of 0."""
    x = torch.full((10**6,), 1.0 + 0.3 / 8)
    error = round_with(x, E4M3, noise(torch.tensor(noise_keys(0))[1], 0, 10**6)).double() - x.double()
    assert error.mean().abs() < 3 * error.std() / 10**3


def test_a_step_of_slices_is_the_step_of_the_whole():
    """Any part of a tensor of many slices ends in the bits that it has on its own, given the same scales."""
    generator = torch.Generator().manual_seed(0)
    w, g = torch.randn(2**15 + 77, generator=generator), torch.randn(2**15 + 77, generator=generator)
    g[0] = 6.0
    w[0] = 6.0  # so that all parts have the scales of the whole
    whole = advance(begin(w, PAPER), g, hyper(1), PAPER, JIT)
    for part in (slice(0, 100), slice(2**14 - 50, 2**14 + 50), slice(2**15, None)):
        index = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(len(w))[part]])
        own = advance(begin(w[index], PAPER), g[index], hyper(1), PAPER, JIT)
        for ours, all_of_it in zip(own, whole, strict=True):
            assert ours.q.scale == all_of_it.q.scale
            assert dequantize(ours.q).equal(dequantize(all_of_it.q)[index])


def test_codes_that_are_not_contiguous_are_written_too():
    w, g = torch.randn(6, 5), torch.randn(6, 5)
    states = begin(w, PAPER)
    turned = states.master.q._replace(codes=states.master.q.codes.t().contiguous().t())
    ours = advance(states._replace(master=states.master._replace(q=turned)), g, hyper(1), PAPER, JIT)
    assert ours.master.q.codes is turned.codes
    assert turned.codes.equal(advance(begin(w, PAPER), g, hyper(1), PAPER, JIT).master.q.codes)


def test_full_precision_has_no_scale_and_no_noise():
    x = torch.randn(100)
    held = hold(x, F32)
    assert held.q.codes.equal(x) and held.q.scale == 1 and held.amax == x.abs().max()
    formats = STATES["fp32"]
    ends = [advance(begin(x, formats), x, hyper(1), formats, Store(rounding=r)) for r in ("nearest", "stochastic")]
    assert all(ours.q.codes.equal(theirs.q.codes) and ours.q.scale == 1 for ours, theirs in zip(*ends, strict=True))
