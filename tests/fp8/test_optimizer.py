"""The optimizer: steps, skips, clipping, resuming, its errors, and a small regression in every format."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from postgrad.errors import ArtefactError, ConfigError
from postgrad.fp8.adam import F32, Gradient, Hyper, StateFormats, Store, hold, start, step_states
from postgrad.fp8.numerics import E4M3, F16, Quantized, dequantize, quantize
from postgrad.fp8.optimizer import Fp8AdamW
from postgrad.fp8.scaled import ScaledTensor


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 8, generator=generator)
    return x, torch.sin(x[:, :4] * 2) + x[:, 4:]


def train(model, optimizer, seeds, max_norm=0.0):
    for seed in seeds:
        optimizer.zero_grad()
        x, y = batch(seed)
        F.mse_loss(model(x), y).backward()
        optimizer.step(max_norm=max_norm)


def values(model):
    return torch.cat([param.detach().float().add(0).flatten() for param in model.parameters()])


def test_a_step_is_the_reference_step():
    param = nn.Parameter(torch.tensor([[0.5, -0.25], [0.125, 1.0]]))
    optimizer = Fp8AdamW([param], lr=0.01, scales="jit")
    for codes in ([32080, -15712, 7528, 64800], [31408, -15040, 6852, 64096]):
        param.grad = torch.tensor([[0.1, -0.02], [0.003, 0.0004]])
        optimizer.step()
        assert param.codes.flatten().tolist() == codes and param.scale == 65536
    state = optimizer.state[param]
    assert state["step"] == 2 and state["exp_avg"].view(torch.uint8).flatten().tolist() == [122, 231, 81, 58]


@pytest.mark.parametrize("stored", [True, False])
def test_matrices_are_codes_and_vectors_stay_whole(stored):
    model = network()
    optimizer = Fp8AdamW(model.parameters())
    if stored:
        optimizer.store_gradients()
    train(model, optimizer, range(2))
    assert all(isinstance(param, ScaledTensor) == (param.ndim == 2) for param in model.parameters())
    weight, bias = optimizer.state[model[0].weight], optimizer.state[model[0].bias]
    assert weight["exp_avg"].dtype == torch.float8_e4m3fn and weight["exp_avg_sq"].dtype == torch.float16
    assert bias["exp_avg"].dtype == bias["exp_avg_sq"].dtype == torch.float32
    assert (model[0].weight.grad is None) == stored
    optimizer.zero_grad()
    assert optimizer.gradients.of(model[0].weight) is None


def test_stored_gradients_make_the_same_step_as_gradients_quantised_late():
    models = [network(), network()]
    for model, stored in zip(models, (True, False), strict=True):
        optimizer = Fp8AdamW(model.parameters())
        if stored:
            optimizer.store_gradients()
        train(model, optimizer, range(4), max_norm=0.5)
    assert values(models[0]).equal(values(models[1]))


@pytest.mark.parametrize(
    "state", [StateFormats(m=m, v=v) for m in (E4M3, F16) for v in (E4M3, F16)] + ["fp32", "O1"], ids=str
)
def test_four_steps_stay_near_torchs(state):
    """The reference's own test: lr and decay 1e-3; within 3e-4, where half a step of FP16 at 0.5 is 1.2e-4."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 4)
    optimizers = [
        Fp8AdamW(ours.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-3, state=state),
        torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-3),
    ]
    for _ in range(4):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
    assert (values(ours) - values(theirs)).abs().max() < (1e-6 if state == "fp32" else 3e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stored", [True, False])
def test_a_gradient_that_is_not_finite_skips_the_step(bad, stored):
    model = network()
    optimizer = Fp8AdamW(model.parameters())
    if stored:
        optimizer.store_gradients()
    train(model, optimizer, range(3))
    before, state = values(model), dict(optimizer.state[model[0].weight])
    optimizer.zero_grad()
    x, y = batch(9)
    (F.mse_loss(model(x), y) + model[2].weight.sum() * bad).backward()
    optimizer.step()
    assert values(model).equal(before) and optimizer.skipped == 1
    assert optimizer.state[model[0].weight] == state, "the very same tensors, scales included"
    train(model, optimizer, range(3, 6))
    assert optimizer.skipped == 1 and values(model).isfinite().all() and not values(model).equal(before)


@given(
    events=st.lists(st.sampled_from([1.0, 1e4, 0.0, -1.0, math.nan]), min_size=1, max_size=20), seed=st.integers(0, 99)
)
def test_no_sequence_of_gradients_saturates_or_loses_a_scale(events, seed):
    generator = torch.Generator().manual_seed(seed)
    param = nn.Parameter(torch.randn(4, 8, generator=generator))
    optimizer = Fp8AdamW([param], lr=0.01)
    g = torch.randn(4, 8, generator=generator)
    for event in events:
        state = dict(optimizer.state[param])
        param.grad = g * event
        optimizer.step()
        if math.isnan(event):
            assert optimizer.state[param] == state, "skipped: the same tensors"
        else:
            m, v = optimizer.state[param]["exp_avg"].float(), optimizer.state[param]["exp_avg_sq"].float()
            assert m.abs().max() <= 448 and v.max() < 65504 / 2 * 1.001 and param.codes.float().abs().max() < 65504
            assert all(optimizer.state[param][key].isfinite() for key in ("exp_avg_scale", "exp_avg_sq_scale"))
            assert (param.detach() + 0).isfinite().all()
    assert optimizer.skipped == sum(math.isnan(event) for event in events)


def test_parameters_without_gradient_are_left_alone():
    used, unused = (nn.Parameter(torch.randn(3, 3)) for _ in range(2))
    optimizer = Fp8AdamW([used, unused], lr=0.1)
    before = unused.detach() + 0
    used.grad = torch.ones(3, 3)
    optimizer.step()
    assert (unused.detach() + 0).equal(before) and unused not in optimizer.state and used in optimizer.state
    optimizer.zero_grad()
    assert optimizer.step() is None and optimizer.state[used]["step"] == 1


def test_clipping_and_division_are_folded_into_the_step():
    g = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = Fp8AdamW([param], lr=0.1)
    param.grad = g * 8
    optimizer.step(divide=8.0, max_norm=1.0)
    assert optimizer.grad_norm == 5
    now = Hyper(0.1, 0.9, 0.95, 1e-8, 0.1, 1)
    formats = StateFormats()
    gradient = Gradient(Quantized(g * 8, torch.ones(()), F32), torch.tensor(32.0))
    begun = start(hold(torch.ones(2, 2), formats.master), formats)
    expected = step_states(begun, gradient, now, factor=0.2 / 8, store=Store())
    assert param.codes.equal(expected.master.q.codes)
    assert optimizer.state[param]["exp_avg_sq"].equal(expected.v.q.codes)
    param.grad = g / 100
    optimizer.step(max_norm=1.0)
    assert optimizer.grad_norm.item() == pytest.approx(0.05, rel=0.03)


@pytest.mark.parametrize("scales", ["predictive", "jit"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, scales, rounding):
    def make():
        model = network()
        return model, Fp8AdamW(model.parameters(), lr=0.01, scales=scales, rounding=rounding)

    straight, optimizer = make()
    train(straight, optimizer, range(10))
    first, optimizer = make()
    train(first, optimizer, range(5))
    plain = {name: tensor.float().add(0) for name, tensor in first.state_dict().items()}
    torch.save({"model": plain, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    second, optimizer = make()
    train(second, optimizer, [77])
    second.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    assert optimizer.state[second[0].weight]["exp_avg"].dtype == torch.float8_e4m3fn
    train(second, optimizer, range(5, 10))
    assert values(second).equal(values(straight))


def test_states_of_other_formats_are_refused():
    paper, full = (Fp8AdamW(network().parameters(), state=state) for state in ("paper", "fp32"))
    with pytest.raises(ArtefactError, match="group 0 of the optimizer has formats"):
        full.load_state_dict(paper.state_dict())
    other = torch.optim.AdamW(network().parameters())
    with pytest.raises(ArtefactError, match="another optimizer wrote them"):
        paper.load_state_dict(other.state_dict())
    model = network()
    train(model, paper := Fp8AdamW(model.parameters()), range(1))
    saved = paper.state_dict()
    saved["state"][0] = saved["state"][0] | {"exp_avg": torch.zeros(16, 8)}
    with pytest.raises(ArtefactError, match="exp_avg of parameter 0 must be"):
        paper.load_state_dict(saved)


def test_a_group_may_have_its_own_formats():
    table, weight = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3, 3))
    Fp8AdamW([{"params": [table], "state": "fp32"}, {"params": [weight]}])
    assert not isinstance(table, ScaledTensor) and isinstance(weight, ScaledTensor)
    with pytest.raises(ConfigError, match="full precision needs a plain one"):
        Fp8AdamW([weight], state="fp32")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state": "fp4"}, "state must be one of paper"),
        ({"betas": (0.99, 0.9)}, "0 <= beta1 < 1 and"),
        ({"lr": -1.0}, "lr must be >= 0"),
        ({"scales": "delayed"}, "scales must be one of"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Fp8AdamW([{"params": [nn.Parameter(torch.ones(2, 2))]} | settings])


def test_it_takes_a_closure_and_a_schedule():
    model = network()
    optimizer = Fp8AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(batch(0)[0]), batch(0)[1])
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) > 0
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_stochastic_rounding_differs_by_seed_and_repeats_by_it():
    ends = []
    for seed in (1, 1, 2):
        model = network()
        torch.manual_seed(seed)
        train(model, Fp8AdamW(model.parameters(), rounding="stochastic"), range(3))
        ends.append(values(model))
    assert ends[0].equal(ends[1]) and not ends[0].equal(ends[2])


def test_the_papers_states_learn_as_float32_does_and_the_controls_do_not():
    """Relative gap of the last losses to float32, over 150 steps of a regression of 800 weights."""
    ends = {}
    for state in ("fp32", "paper", "e4m3_master", "e4m3_v"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
        optimizer = Fp8AdamW(model.parameters(), lr=2e-2, state=state, weight_decay=0.0)
        late = []
        for step in range(150):
            x, y = batch(step)
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            late.append(loss.item())
        ends[state] = sum(late[-30:]) / 30
    gap = {state: end / ends["fp32"] - 1 for state, end in ends.items()}
    print(ends)
    assert abs(gap["paper"]) < 0.02
    assert gap["e4m3_master"] > 0.1 and gap["e4m3_v"] > 0.02


def test_weights_written_from_outside_are_seen():
    param = nn.Parameter(torch.full((2, 2), 1e-3))
    optimizer = Fp8AdamW([param], lr=1e-3)
    for _ in range(2):
        param.grad = torch.ones(2, 2)
        optimizer.step()
        with torch.no_grad():
            param.fill_(100.0)
    param.grad = torch.ones(2, 2)
    optimizer.step()
    assert (param.detach() + 0).allclose(torch.full((2, 2), 100.0), rtol=1e-3)
    assert quantize(param.detach(), F16).scale / param.scale <= 4
    assert dequantize(param.quantized).equal(param.detach() + 0)
