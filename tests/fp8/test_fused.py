"""The step by every back end: the bits of the reference, and no more memory than the states themselves.

Triton's interpreter has to be chosen before Triton is imported, so the kernels run in a process of their own; what is
compiled runs in another. Such a process runs the checks below that it is given, and prints what it found.
"""

import json
import shutil
import sys
import weakref
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from elsewhere import elsewhere, report
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from postgrad.errors import ConfigError
from postgrad.fp8.adam import STATES, Gradient, Held, Hyper, Moments, StateFormats, Store, hold, start, step_states
from postgrad.fp8.fused import Item, fused_norm, fused_step
from postgrad.fp8.gradients import add, global_norm, take
from postgrad.fp8.numerics import E4M3, F16, Quantized, dequantize
from postgrad.fp8.optimizer import Fp8AdamW

STORES = [[scales, rounding] for scales in ("predictive", "jit") for rounding in ("nearest", "stochastic")]
SIZES, NUM = (1, 7, 4096, 5000), 10**7


def bits(x):
    return x.detach().contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def moved(q, device):
    return q._replace(codes=q.codes.to(device, copy=True), scale=q.scale.to(device, copy=True))


def copied(moments, device="cpu"):
    return Moments(*(Held(moved(held.q, device), held.amax.to(device, copy=True)) for held in moments))


def assert_same(ours, theirs, where):
    for a, b in zip(copied(ours), theirs, strict=True):
        assert bits(a.q.codes).equal(bits(b.q.codes)), f"{where}, {a.q.format.name} codes"
        assert a.q.scale == b.q.scale and a.amax == b.amax, f"{where}, {a.q.format.name} scale or amax"


def begun(formats, sizes=SIZES):
    """Weights over seven orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(num, generator=generator) * torch.logspace(-6, 1, num) for num in sizes]
    return [start(hold(w, formats.master), formats) for w in weights]


def drawn(format, sizes=SIZES):
    """Gradients over nine orders of magnitude, so subnormal ones and zeros too; one step is a spike, one all 0."""
    generator = torch.Generator().manual_seed(1)
    for times in (1.0, 1e4, 0.0, 1.0):
        yield [take(torch.randn(n, generator=generator) * torch.logspace(-9, 0, n) * times, format) for n in sizes]


def hyper(step):
    return Hyper(1e-3, 0.9, 0.95, 1e-8, 0.1, step)


def check_fused(name, scales, rounding, device="cpu", sizes=SIZES):
    """All tensors in one launch end in the bits of the CPU's one by one."""
    formats = STATES[name]
    theirs = begun(formats, sizes)
    ours = [copied(moments, device) for moments in theirs]
    for step, taken in enumerate(drawn(formats.gradient, sizes), start=1):
        there = [Gradient(moved(g.q, device), g.amax.to(device)) for g in taken]
        norms = fused_norm(g.q for g in there).cpu(), global_norm(g.q for g in taken)
        assert torch.isclose(*norms, rtol=1e-14) and (formats.gradient != E4M3 or norms[0] == norms[1])
        stores = [Store(scales, rounding, seed=step * 77 + i) for i in range(len(sizes))]
        fused_step(Item(ours[i], there[i], hyper(step), 0.37, formats.guard, store) for i, store in enumerate(stores))
        for i, store in enumerate(stores):
            theirs[i] = step_states(theirs[i], taken[i], hyper(step), guard=formats.guard, factor=0.37, store=store)
            assert_same(ours[i], theirs[i], f"step {step}, tensor {i}")


def check_other_scales():
    """A gradient averaged over ranks may have a scale that is no power of two; a quotient then, not a product."""
    formats, g = STATES["paper"], torch.randn(500, generator=torch.Generator().manual_seed(0))
    theirs = begun(formats, [500])[0]
    ours = copied(theirs)
    gradient = Gradient(Quantized((g * 100).to(E4M3.dtype), torch.tensor(300.0), E4M3), g.abs().max())
    fused_step([Item(ours, gradient, hyper(1), 1.0, True, Store())])
    assert_same(ours, step_states(theirs, gradient, hyper(1), store=Store()), "one step")


def check_vector(backend):
    """Specification vector: codes and scales of two steps, scales just in time."""
    param = nn.Parameter(torch.tensor([[0.5, -0.25], [0.125, 1.0]]))
    optimizer = Fp8AdamW([param], lr=0.01, scales="jit", backend=backend)
    expected = [
        ([122, 232, 82, 58], 32768, [34624, 1280, 28.796875, 0.5283203125], 2**26, [32080, -15712, 7528, 64800]),
        ([122, 231, 81, 58], 16384, [33760, 1248, 28.078125, 0.51513671875], 2**25, [31408, -15040, 6852, 64096]),
    ]
    for m, m_scale, v, v_scale, w in expected:
        param.grad = torch.tensor([[0.1, -0.02], [0.003, 0.0004]])
        optimizer.step()
        state = optimizer.state[param]
        assert bits(state["exp_avg"]).flatten().tolist() == m and state["exp_avg_scale"] == m_scale
        assert state["exp_avg_sq"].flatten().tolist() == v and state["exp_avg_sq_scale"] == v_scale
        assert param.codes.flatten().tolist() == w and param.scale == 65536


def run(backend, scales, rounding, steps=range(6), resume=None):
    """Train a small network with two groups, clipping, a step that is skipped and weights written from outside."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    groups = [{"params": list(model[0].parameters()), "lr": 0.03}, {"params": list(model[2].parameters())}]
    optimizer = Fp8AdamW(groups, lr=0.01, scales=scales, rounding=rounding, backend=backend)
    if resume is not None:
        model.load_state_dict(resume[0])
        optimizer.load_state_dict(resume[1])
    optimizer.store_gradients()
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        loss = F.mse_loss(model(torch.randn(32, 8, generator=generator)), torch.randn(32, 4, generator=generator))
        (loss * (float("inf") if step == 2 else 4.0)).backward()
        optimizer.step(divide=4.0, max_norm=0.5)
        if step == 3:
            with torch.no_grad():
                model[2].weight.mul_(30.0)
    return model.state_dict(), optimizer.state_dict()


def assert_runs_equal(ours, theirs):
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert (a + 0).equal(b + 0) if isinstance(a, torch.Tensor) and a.element_size() > 1 else str(a) == str(b)


def check_training(backend):
    """A whole run, its skips and scales included, ends in the reference's bits; another back end may resume it."""
    for scales, rounding in (("predictive", "nearest"), ("jit", "stochastic")):
        whole = run("torch", scales, rounding)
        assert whole[1]["param_groups"][0]["skipped"] == 1
        assert_runs_equal(run(backend, scales, rounding), whole)
        assert_runs_equal(run(backend, scales, rounding, range(3, 6), run("torch", scales, rounding, range(3))), whole)


def check_guard():
    """Moments that no longer fit: the kernels cut the same updates as the reference."""
    g = torch.ones(2, 64)
    ends = []
    for guard in (True, False):
        theirs = start(hold(torch.zeros(2, 64), F16), StateFormats())
        ours = copied(theirs)
        for step in range(1, 120):
            g[1] = torch.logspace(-3, -5, 64) if step < 30 else 0.0
            gradient = take(g)
            fused_step([Item(ours, gradient, hyper(step), 1.0, guard, Store("jit"))])
            theirs = step_states(theirs, gradient, hyper(step), guard=guard, store=Store("jit"))
            assert_same(ours, theirs, f"step {step}")
        ends.append(dequantize(theirs.master.q))
    assert not ends[0].equal(ends[1]), "some update was cut"


def check_compiled(name):
    """Compiled code gives the bits of the reference; other shapes, steps and rates do not compile it again."""
    from torch._dynamo.utils import counters

    formats = STATES[name]
    counters.clear()
    for scales, rounding in STORES:
        theirs = begun(formats)
        ours = [copied(moments) for moments in theirs]
        for step, taken in enumerate(drawn(formats.gradient), start=1):
            now = hyper(step)._replace(lr=1e-3 / step)
            for i, gradient in enumerate(taken):
                store = Store(scales, rounding, seed=step * 77 + i)
                theirs[i] = step_states(theirs[i], gradient, now, guard=formats.guard, store=store)
                compiled = store._replace(compile=True)
                ours[i] = step_states(ours[i], gradient, now, guard=formats.guard, store=compiled)
                assert_same(ours[i], theirs[i], f"{scales}, {rounding}, step {step}, tensor {i}")
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 6, f"{graphs} graphs: two passes and two roundings, each for one and for many elements"


INTERPRETED = [
    *(("check_fused", name, *store) for name in ("paper", "O1") for store in STORES),
    *(("check_fused", name, *store) for name in ("fp32", "bf16", "e4m3_v", "e4m3_master") for store in STORES[::3]),
    ("check_other_scales",),
    ("check_vector", "triton"),
    ("check_training", "triton"),
    ("check_guard",),
]
COMPILED = [("check_compiled", "paper"), ("check_vector", "compile"), ("check_training", "compile")]


@pytest.fixture(scope="module")
def interpreted():
    if find_spec("triton") is None:
        pytest.skip("needs triton")
    return elsewhere(__file__, INTERPRETED, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled():
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("needs a C++ compiler")
    return elsewhere(__file__, COMPILED)


@pytest.mark.parametrize("check", INTERPRETED, ids=" ".join)
def test_kernels_give_the_references_bits(interpreted, check):
    assert interpreted[str([*check])] == ""


@pytest.mark.parametrize("check", COMPILED, ids=" ".join)
def test_compiled_steps_give_the_references_bits(compiled, check):
    assert compiled[str([*check])] == ""


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors made within it, as they come and go."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in given | self.live.keys():
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata)
        return result

    def gone(self, key):
        self.now -= self.live.pop(key)


def prepared(sizes, **settings):
    params = [nn.Parameter(torch.full(size, 0.1)) for size in sizes]
    optimizer = Fp8AdamW(params, **settings)
    for param in params:
        optimizer.gradients.put(param, take(torch.full(param.shape, 0.01)))
    return params, optimizer


ROUNDINGS = ["nearest", pytest.param("stochastic", marks=pytest.mark.slow)]


@pytest.mark.parametrize("scales", ["predictive", "jit"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_step_holds_at_most_6_2_bytes_a_parameter(scales, rounding):
    """Weights and gradients, 3 bytes, are there before; the first step makes the moments, 3 more."""
    _, optimizer = prepared([(2500, 4000)] if scales == "jit" else [(1000, 2500)] * 4, scales=scales, rounding=rounding)
    for before in (3, 6):
        with Peak() as counted:
            optimizer.step(max_norm=1.0)
        assert before + counted.peak / NUM <= 6.2
    assert before + counted.now / NUM < 6.001


def test_a_step_in_float32_of_the_whole_holds_more():
    """The control: what the reference computes, without slices."""
    (param,), optimizer = prepared([(2500, 4000)])
    optimizer.step()
    state, g = optimizer.state[param], optimizer.gradients.of(param)
    with Peak() as counted:
        w, m, v = param.codes.float() / param.scale, state["exp_avg"].float(), state["exp_avg_sq"].float()
        values = dequantize(g.q)
        m = m * 0.9 + values * 0.1
        v = v * 0.95 + values * values * 0.05
        param.codes.copy_((w - 1e-3 * m / (v.sqrt() + 1e-8)) * param.scale)
    assert 6 + counted.peak / NUM > 6.2


def test_a_gradient_becomes_codes_without_float32_beside_it():
    x = torch.full((NUM,), 0.01, dtype=torch.bfloat16)
    with Peak() as counted:
        before = take(x)
    assert counted.peak / NUM <= 1.2
    with Peak() as counted:
        add(before, x)
    assert counted.peak / NUM <= 1.2


def test_a_norm_that_is_known_is_taken():
    g = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    ends = []
    for norm in (None, torch.tensor(40.0, dtype=torch.float64), torch.tensor(80.0)):
        param = nn.Parameter(torch.ones(2, 2))
        optimizer = Fp8AdamW([param], lr=0.1)
        param.grad = g * 8
        optimizer.step(divide=8.0, max_norm=1.0, norm=norm)
        ends.append((optimizer.grad_norm, dequantize(Quantized(*optimizer_m(optimizer, param)))))
    assert [norm for norm, _ in ends] == [5, 5, 10]
    assert ends[0][1].equal(ends[1][1]) and ends[2][1].allclose(ends[0][1] / 2, rtol=0.07)
    optimizer.step(norm=torch.tensor(float("nan")))
    assert optimizer.skipped == 1 and optimizer.state[param]["step"] == 1


def optimizer_m(optimizer, param):
    return optimizer.moments_of(param, optimizer.param_groups[0]).m.q


def test_back_ends_that_cannot_run_are_refused():
    param = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ConfigError, match="backend must be one of auto, torch"):
        Fp8AdamW([param], backend="cuda")
    with pytest.raises(ConfigError, match="no setting fused"):
        Fp8AdamW([param], fused=True)
    if find_spec("triton") is None:
        with pytest.raises(ConfigError, match="not installed"):
            Fp8AdamW([param], backend="triton")
        pytest.skip("needs triton for the rest")
    optimizer = Fp8AdamW([param], backend="triton")
    param.grad = torch.ones(2, 2)
    with pytest.raises(ConfigError, match="needs a CUDA device; the parameters are on cpu"):
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["paper", "O1", "fp32"])
@pytest.mark.parametrize(("scales", "rounding"), STORES)
def test_the_gpu_gives_the_references_bits(name, scales, rounding):
    pytest.importorskip("triton")
    check_fused(name, scales, rounding, "cuda", (10**6, 4097, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("scales", ["predictive", "jit"])
def test_a_step_on_the_gpu_holds_at_most_6_2_bytes_a_parameter(scales):
    pytest.importorskip("triton")
    params = [nn.Parameter(torch.full((10000, 10000), 0.1, device="cuda"))]
    optimizer = Fp8AdamW(params, scales=scales, backend="triton")
    optimizer.gradients.put(params[0], take(torch.full_like(params[0].codes, 0.01)))
    optimizer.step(max_norm=1.0)
    torch.cuda.reset_peak_memory_stats()
    optimizer.step(max_norm=1.0)
    assert torch.cuda.max_memory_allocated() / params[0].numel() <= 6.2


if __name__ == "__main__":
    report(json.loads(sys.argv[1]), globals())
