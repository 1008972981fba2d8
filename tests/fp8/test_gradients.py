"""8-bit gradients: stored as they are made, added over micro-batches, their norm."""

import math

import pytest
import torch
from torch import nn

from postgrad.errors import ConfigError
from postgrad.fp8.adam import F32
from postgrad.fp8.gradients import Gradients, add, global_norm, take
from postgrad.fp8.numerics import E4M3, E5M2, dequantize, quantize


def bits(codes):
    return codes.view(torch.uint8)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(6, 5)


def test_a_backward_pass_leaves_codes_and_no_gradient(layer):
    x = torch.randn(7, 6)
    layer(x).square().sum().backward()
    expected = quantize(layer.weight.grad, E4M3)
    layer.zero_grad()
    held = Gradients()
    held.attach([layer.weight])
    layer(x).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
    assert bits(held.of(layer.weight).q.codes).equal(bits(expected.codes))
    assert held.of(layer.weight).q.scale == expected.scale
    assert held.of(layer.bias) is None


def test_the_gradient_is_gone_before_the_next_layers_is_made():
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    params, seen = list(layers.parameters()), []
    held = Gradients()
    held.attach(params)
    for param in params:
        param.register_post_accumulate_grad_hook(lambda _: seen.append(sum(p.grad is not None for p in params)))
    layers(torch.randn(4, 8)).sum().backward()
    assert seen == [0, 0, 0]


def test_micro_batches_are_added_and_rounded_again(layer):
    x, y = torch.randn(7, 6), torch.randn(3, 6)
    grads = [torch.autograd.grad(layer(batch).square().sum(), layer.weight)[0] for batch in (x, y)]
    expected = quantize(dequantize(quantize(grads[0], E4M3)) + grads[1], E4M3)
    held = Gradients()
    held.attach([layer.weight])
    for batch in (x, y):
        layer(batch).square().sum().backward()
    assert bits(held.of(layer.weight).q.codes).equal(bits(expected.codes))
    assert held.of(layer.weight).q.scale == expected.scale


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda format: format.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_adding_is_dequantise_add_quantise_bit_for_bit(format, dtype):
    generator = torch.Generator().manual_seed(0)
    for repeat in range(3):
        x, y = (torch.randn(512, 512, generator=generator).mul(10.0**repeat).to(dtype) for _ in range(2))
        total = add(take(x, format), y)
        expected = quantize(dequantize(quantize(x, format)) + y.float(), format)
        assert bits(total.q.codes).equal(bits(expected.codes)) and total.q.scale == expected.scale


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_one_bad_micro_batch_is_not_forgotten(bad, first):
    good, ill = torch.ones(2, 2), torch.tensor([[1.0, bad], [0, 0]])
    total = add(take(ill), good) if first else add(take(good), ill)
    assert not total.amax.isfinite()
    assert not add(total, good).amax.isfinite()


def test_the_norm_is_of_all_codes_as_one_vector():
    tensors = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]]), torch.zeros(3)]
    assert global_norm(take(x).q for x in tensors) == 5
    assert global_norm([]) == 0
    huge = take(torch.full((4,), 2.0**100))
    assert global_norm([huge.q, huge.q]).item() == pytest.approx(2.0**100 * 8**0.5)


def test_full_precision_gradients_need_no_scale():
    x = torch.tensor([1 / 3, 7.0])
    assert take(x, F32).q.codes.equal(x) and take(x, F32).q.scale == 1


def test_holding_ends(layer):
    held = Gradients()
    held.attach([layer.weight])
    with pytest.raises(ConfigError, match="attach once"):
        held.attach([layer.weight])
    layer(torch.ones(1, 6)).sum().backward()
    held.put(layer.weight, take(torch.zeros(5, 6)))
    assert held.of(layer.weight).amax == 0
    held.detach()
    assert held.of(layer.weight) is None
    layer(torch.ones(1, 6)).sum().backward()
    assert layer.weight.grad is not None
