"""8-bit linear layers: their products and gradients against a float64 emulation, delayed scales, dtypes, errors."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from postgrad.errors import ModelError
from postgrad.fp8.linear import (
    Fp8Conv1D,
    Fp8Linear,
    LinearConfig,
    _check_device,
    roll_after,
    roll_windows,
)

EVERY = LinearConfig(multiple=1, min_inputs=1, min_outputs=1)
DELAYED = LinearConfig(scaling="delayed", window=3)


def emulated(x: Tensor, mantissa: int, lowest: int, largest: float) -> Tensor:
    """Round a tensor, scaled as a whole, to the nearest number of a format listed by hand, ties to an even code."""
    exponents = range(lowest, math.floor(math.log2(largest)) + 1)
    steps = 2**mantissa
    numbers = [i / steps * 2.0**lowest for i in range(steps)]
    numbers += [(1 + i / steps) * 2.0**e for e in exponents for i in range(steps)]
    grid = torch.tensor([number for number in numbers if number <= largest], dtype=torch.float64)
    amax = x.detach().double().abs().max().item()
    scale = 2.0 ** math.floor(math.log2(largest / amax))
    wanted = x.detach().double().abs() * scale
    middles = (grid[1:] + grid[:-1]) / 2
    code = torch.searchsorted(middles, wanted)  # of two equally near, the lower
    tie = (code < len(middles)) & (middles[code.clamp(max=len(middles) - 1)] == wanted)
    code = code + (tie & (code % 2 == 1))
    return grid[code].copysign(x.detach().double()) / scale


def e4m3(x: Tensor) -> Tensor:
    return emulated(x, 3, -6, 448.0)


def e5m2(x: Tensor) -> Tensor:
    return emulated(x, 2, -14, 57344.0)


def close(found: Tensor, wanted: Tensor, relative: float) -> None:
    """Compare with what float32 sums, or one last rounding, may differ by, of the greatest."""
    assert (found.double() - wanted).abs().max() <= relative * wanted.abs().max()


def gradient(of: Tensor | None) -> Tensor:
    assert of is not None
    return of


def test_a_layer_is_near_the_ordinary_one() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 8)
    layer = Fp8Linear.from_linear(linear)
    x = torch.randn(4, 4)
    wanted, found = linear(x), layer(x)
    assert found.dtype == torch.float32 and (found - wanted).abs().max() < 0.1
    slope = torch.randn(4, 8)
    bias_wanted = torch.autograd.grad(wanted, [linear.bias], slope)[0]
    weight, bias = torch.autograd.grad(found, [layer.weight, layer.bias], slope)
    assert torch.equal(bias, bias_wanted)
    assert weight.shape == linear.weight.shape and weight.dtype == torch.float32
    with torch.autocast("cpu", torch.float16):
        assert layer(x).dtype == torch.float16


def test_micro_batches_add_up_to_the_batch() -> None:
    torch.manual_seed(0)
    layer = Fp8Linear.from_linear(nn.Linear(4, 8))
    x, slope = torch.randn(4, 4), torch.randn(4, 8)
    layer(x).backward(slope)
    whole = gradient(layer.weight.grad).clone()
    layer.weight.grad = None
    for row in range(4):
        layer(x[row : row + 1]).backward(slope[row : row + 1])
    assert (gradient(layer.weight.grad) - whole).abs().max() < 0.1


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_values_and_gradients_are_those_of_the_emulation(conv: bool, dtype: torch.dtype, relative: float) -> None:
    torch.manual_seed(1)
    plain = Conv1D(17, 33) if conv else nn.Linear(33, 17)
    layer = (Fp8Conv1D if conv else Fp8Linear).from_linear(plain.to(dtype))
    x = (torch.randn(3, 5, 33) * torch.randn(33).exp()).to(dtype).requires_grad_()
    slope = (torch.randn(3, 5, 17) * 1e-3).to(dtype)
    y = layer(x)
    y.backward(slope)
    weight = layer.weight.T if conv else layer.weight
    q_x, q_w = e4m3(x).flatten(0, 1), e4m3(weight.contiguous())
    q_dy = e5m2(slope).flatten(0, 1)
    assert y.dtype == gradient(x.grad).dtype == gradient(layer.weight.grad).dtype == dtype
    close(y - layer.bias, (q_x @ q_w.T).view(3, 5, 17), 3 * relative)  # the sum is rounded again, and so is this one
    close(gradient(x.grad), (q_dy @ q_w).view(3, 5, 33), relative)
    dw = q_dy.T @ q_x
    close(gradient(layer.weight.grad), dw.T if conv else dw, relative)


def test_autocast_decides_the_result_and_never_the_products() -> None:
    torch.manual_seed(2)
    layer = Fp8Linear.from_linear(nn.Linear(32, 16, bias=False))
    x = torch.randn(6, 32, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.backward(torch.ones_like(y))
    assert torch.equal(y, exact.bfloat16())
    found = gradient(x.grad).clone(), gradient(layer.weight.grad).clone()
    wanted = torch.autograd.grad(exact, [x, layer.weight], torch.ones_like(exact))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_only_the_gradients_asked_for_are_made() -> None:
    layer = Fp8Linear.from_linear(nn.Linear(16, 16))
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 0, 16), (2, 3, 4, 16)])
def test_any_batch_axes(shape: tuple[int, ...]) -> None:
    layer = Fp8Linear.from_linear(nn.Linear(16, 8))
    y = layer(torch.randn(shape))
    assert y.shape == (*shape[:-1], 8)
    y.sum().backward()
    assert torch.isfinite(gradient(layer.weight.grad)).all()


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("config", [LinearConfig(), DELAYED])
def test_what_is_not_finite_shows(wrong: float, config: LinearConfig) -> None:
    layer = Fp8Linear.from_linear(nn.Linear(16, 8), config)
    for _ in range(4):
        layer(torch.ones(2, 16)).sum().backward()
        roll_windows(layer)
    layer.zero_grad()
    x = torch.ones(2, 16, requires_grad=True)
    y = layer(x)
    slope = torch.ones(2, 8)
    slope[0, 0] = wrong
    y.backward(slope)
    assert gradient(x.grad).isnan().all() and gradient(layer.weight.grad).isnan().all()
    assert layer(x.detach().clone().fill_(wrong)).isnan().all()


def test_the_window_holds_the_greatest_of_the_last_sixteen() -> None:
    layer = Fp8Linear.from_linear(nn.Linear(16, 16), LinearConfig(scaling="delayed"))
    seen = []
    for value in list(range(17)) * 6:
        layer(torch.full((1, 16), float(value))).mul(value).sum().backward()
        roll_windows(layer)
        seen.append(float(value))
        window = gradient(layer.product.amaxes).view(torch.float32)[:, 1:].max(dim=1).values
        assert window.tolist() == [max(seen[-16:])] * 2
        assert layer.product.input_ready is layer.product.gradient_ready is (len(seen) >= 16)


def fed(layer: nn.Module, value: float) -> float:
    """Return what an input becomes on its way through a layer whose weight is the identity."""
    y: Tensor = layer(torch.full((1, 16), value))
    return y[0, 0].item()


def identity(config: LinearConfig) -> Fp8Linear:
    linear = nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(16))
    return Fp8Linear.from_linear(linear, config)


def test_a_full_window_gives_the_scale_and_infinity_empties_it() -> None:
    layer = identity(DELAYED)
    for _ in range(3):
        assert fed(layer, 1.0) == 1.0
        assert not layer.product.input_ready
        roll_windows(layer)
    assert fed(layer, 100.0) == 448 / 256  # the window says 1, so the scale is 256: cut
    roll_windows(layer)
    assert fed(layer, 100.0) == 96.0  # 100 * 4 lies between 384 and 416
    fed(layer, math.inf)
    roll_windows(layer)
    assert not layer.product.input_ready and layer.product.filled == [0, 3]
    for _ in range(3):
        assert fed(layer, 1e4) == 10240.0  # just in time: 1e4 / 32 lies between 288 and 320
        roll_windows(layer)
    assert layer.product.input_ready


def test_a_window_of_zeros_gives_no_scale() -> None:
    layer = identity(DELAYED)
    for _ in range(3):
        fed(layer, 0.0)
        roll_windows(layer)
    assert layer.product.input_ready and fed(layer, 2.0**-20) == 2.0**-20


def test_a_window_moves_once_an_optimizer_step() -> None:
    layer = identity(DELAYED)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = roll_after(optimizer, layer)
    for value in (4.0, 9.0, 2.0):
        layer(torch.full((1, 16), value)).sum().backward()
    optimizer.step()
    layer.eval()
    fed(layer, 100.0)  # an evaluation is not noted
    layer.train()
    optimizer.step()
    amaxes = gradient(layer.product.amaxes).view(torch.float32)
    assert amaxes[0].tolist() == [0.0, 0.0, 9.0, 0.0] and amaxes[1].tolist() == [0.0, 0.0, 1.0, 0.0]
    handle.remove()
    optimizer.step()
    assert layer.product.filled == [2, 2]


def test_casting_the_model_leaves_its_windows() -> None:
    layer = identity(DELAYED)
    fed(layer, 1.001)
    before = gradient(layer.product.amaxes).clone()
    assert torch.equal(gradient(layer.bfloat16().product.amaxes), before)


def test_what_has_no_product_is_refused() -> None:
    layer = Fp8Linear.from_linear(nn.Linear(16, 16))
    with pytest.raises(ModelError, match=r"float64.*restore_linears"):
        layer(torch.randn(2, 16, dtype=torch.float64))
    with pytest.raises(ModelError, match="expected 16 features"):
        layer(torch.randn(2, 32))
    with pytest.raises(ModelError, match="no 8-bit products on 'xpu'"):
        _check_device(torch.device("xpu"))


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ModelError, match=r"\(8, 0\)"):
        _check_device(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_the_emulation(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    linear = nn.Linear(256, 128).to(dtype)
    x = torch.randn(5, 7, 256, dtype=dtype)
    slope = torch.randn(5, 7, 128, dtype=dtype)
    results = []
    for device in ("cpu", "cuda"):
        layer = Fp8Linear.from_linear(linear.to(device))
        layer.zero_grad()
        inputs = x.to(device).requires_grad_()
        y = layer(inputs)
        y.backward(slope.to(device))
        results.append([t.detach().double().cpu() for t in (y, gradient(inputs.grad), gradient(layer.weight.grad))])
    for found, wanted in zip(results[1], results[0], strict=True):
        close(found, wanted, 2**-7 if dtype == torch.bfloat16 else 2e-3)  # fast accumulation keeps some 14 bits
