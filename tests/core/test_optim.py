import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from postgrad.core.config import OptimConfig
from postgrad.core.optim import Schedule, global_norm, gradients, make_optimizer, scale_gradients, schedule, set_lr


def rates(kind: Schedule, total: int, warmup: float = 0.0, final: float = 0.0) -> list[float]:
    return [schedule(step, total, kind=kind, warmup=warmup, final=final) for step in range(total)]


def test_schedule_by_hand() -> None:
    """Ten steps, two of warm-up: 1/3, 2/3, 1, then seven equal parts down."""
    down = [1 - 0.8 * i / 7 for i in range(8)]
    assert rates("linear", 10, 0.2, 0.2) == pytest.approx([1 / 3, 2 / 3, *down])
    waves = [0.2 + 0.8 * (1 + math.cos(math.pi * i / 7)) / 2 for i in range(8)]
    assert rates("cosine", 10, 0.2, 0.2) == pytest.approx([1 / 3, 2 / 3, *waves])
    assert rates("constant", 10, 0.2, 0.2) == pytest.approx([1 / 3, 2 / 3, *[1.0] * 8])


def test_schedule_of_few_steps() -> None:
    assert rates("cosine", 1, warmup=0.9) == [1.0]
    assert rates("linear", 2, warmup=1.0, final=0.1) == pytest.approx([0.5, 1.0])
    assert rates("cosine", 2, final=0.1) == pytest.approx([1.0, 0.1])


@given(
    total=st.integers(2, 300),
    warmup=st.floats(0, 0.9),
    final=st.floats(0, 1),
    kind=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_schedule_rises_then_falls(total: int, warmup: float, final: float, kind: Schedule) -> None:
    found = rates(kind, total, warmup, final)
    peak = found.index(max(found))
    assert found[peak] == 1.0 and min(found) >= 0 and found[0] > 0
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert all(a >= b - 1e-12 for a, b in zip(found[peak:], found[peak + 1 :], strict=False))
    if kind != "constant" and peak < total - 1:
        assert found[-1] == pytest.approx(final)


def test_only_matrices_that_train_decay() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    optimizer = make_optimizer(list(model.parameters()), OptimConfig(weight_decay=0.3))
    decay = {id(param): group["weight_decay"] for group in optimizer.param_groups for param in group["params"]}
    names = {name: decay.get(id(param)) for name, param in model.named_parameters()}
    assert names == {
        "0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": None, "2.bias": None,
    }  # fmt: skip


def test_one_step_of_adamw_by_hand() -> None:
    """First step: m = (1 - b1) g, v = (1 - b2) g^2, both corrected to g and g^2, so w <- w (1 - lr d) - lr sign(g)."""
    param = nn.Parameter(torch.tensor([[2.0, -1.0]]))
    optimizer = make_optimizer([param], OptimConfig(lr=0.1, weight_decay=0.5))
    param.grad = torch.tensor([[3.0, -0.2]])
    set_lr(optimizer, 0.2)
    optimizer.step()
    assert param.tolist() == [pytest.approx([2 * 0.9 - 0.2, -1 * 0.9 + 0.2])]


def test_fused_equals_float64_by_hand() -> None:
    """Five steps against the formula of AdamW in float64."""
    config = OptimConfig(lr=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9)
    noise = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(7, 5, generator=noise))
    w, m, v = param.detach().double(), 0.0, 0.0
    optimizer = make_optimizer([param], config)
    for t in range(1, 6):
        g = torch.randn(7, 5, generator=noise)
        param.grad = g.clone()
        optimizer.step()
        m = 0.8 * m + 0.2 * g.double()
        v = 0.9 * v + 0.1 * g.double() ** 2
        w = w * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + config.eps)
    torch.testing.assert_close(param.double(), w, rtol=1e-5, atol=1e-6)


def test_gradients_are_cut_as_torch_cuts_them() -> None:
    def model(scale: float) -> nn.Module:
        linear = nn.Linear(3, 2)
        for i, param in enumerate(linear.parameters()):
            param.grad = torch.arange(param.numel(), dtype=torch.float32).view_as(param) * scale + i
        return linear

    for clip in (0.1, 100.0):
        ours, theirs = model(4.0), model(4.0)
        found = gradients(list(ours.parameters()))
        norm = global_norm(found)
        assert norm.item() == pytest.approx(nn.utils.get_total_norm(found).item())
        scale_gradients(found, weight=4.0, norm=norm.item(), clip=clip)
        for param in theirs.parameters():
            assert param.grad is not None
            param.grad /= 4
        nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        for a, b in zip(found, gradients(list(theirs.parameters())), strict=True):
            torch.testing.assert_close(a, b)


def test_no_cut_only_divides() -> None:
    gradient = torch.tensor([6.0, 8.0])
    scale_gradients([gradient], weight=2.0, norm=10.0, clip=0.0)
    assert gradient.tolist() == [3.0, 4.0]


def test_the_norm_of_nothing_is_zero() -> None:
    assert global_norm([]).item() == 0.0


def test_stairs_follow_a_schedule_by_epoch() -> None:
    """Three epochs of two steps: min + (lr - min) (1 + cos(pi e / 3)) / 2 for e = 0, 1, 2."""
    found = [schedule(step, 6, kind="cosine", warmup=0.0, final=0.1, stairs=2) for step in range(6)]
    want = [0.1 + 0.9 * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in (0, 0, 1, 1, 2, 2)]
    assert found == pytest.approx(want)
