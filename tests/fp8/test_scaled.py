"""Weights kept as codes: they behave as ordinary parameters and take the memory of codes."""

import copy

import pytest
import torch
from torch import nn

from postgrad.fp8.numerics import E4M3, F16, dequantize, quantize
from postgrad.fp8.scaled import ScaledTensor, scale_parameter_


@pytest.fixture
def pair():
    """A layer of which the weight holds codes, and one with the same values in float32."""
    torch.manual_seed(0)
    coded = nn.Linear(8, 4)
    scale_parameter_(coded.weight, F16)
    plain = nn.Linear(8, 4)
    plain.load_state_dict(coded.state_dict())
    return coded, plain


def test_a_parameter_turns_into_codes_in_place():
    layer = nn.Linear(8, 4)
    weight, before = layer.weight, layer.weight.detach().clone()
    scale_parameter_(weight, E4M3)
    assert layer.weight is weight and isinstance(weight, ScaledTensor) and isinstance(weight, nn.Parameter)
    assert weight.requires_grad and weight.is_leaf and weight.dtype == torch.float32 and weight.shape == (4, 8)
    assert weight.codes.dtype == torch.float8_e4m3fn
    assert (weight.detach() + 0).equal(dequantize(quantize(before, E4M3)))
    assert "E4M3" in repr(weight)


def test_values_and_gradients_are_those_of_the_dequantised_weight(pair):
    x = torch.randn(3, 8)
    grads = []
    for layer in pair:
        y = layer(x)
        y.square().sum().backward()
        grads.append((y.detach(), layer.weight.grad, layer.bias.grad))
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))
    assert type(grads[0][1]) is torch.Tensor


def test_a_transposed_weight_is_still_codes(pair):
    turned = pair[0].weight.t()
    assert isinstance(turned, ScaledTensor)
    assert turned.codes.data_ptr() == pair[0].weight.codes.data_ptr()
    assert (turned @ torch.ones(4)).equal(pair[1].weight.t() @ torch.ones(4))


def test_a_backward_pass_keeps_no_float32_weight():
    torch.manual_seed(0)
    coded, kept = nn.Linear(8, 4), []
    scale_parameter_(coded.weight, F16)
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        coded(x)
    weights = [t for t in kept if t.numel() == 32]
    assert weights and all(isinstance(t, ScaledTensor) for t in weights)


def test_writing_rounds_to_new_codes(pair):
    coded, plain = pair
    with torch.no_grad():
        coded.weight.mul_(1000.0)
    assert (coded.weight + 0).equal(dequantize(quantize(plain.weight.detach() * 1000, F16)))
    coded.load_state_dict(plain.state_dict())
    assert (coded.weight + 0).equal(plain.weight)
    nn.init.zeros_(coded.weight)
    assert not (coded.weight + 0).any()


def test_copies_and_moves_are_their_own(pair):
    coded = pair[0]
    other = copy.deepcopy(coded)
    moved = coded.weight.detach().to("cpu", copy=True)
    with torch.no_grad():
        other.weight.zero_()
    assert isinstance(other.weight, ScaledTensor) and isinstance(moved, ScaledTensor)
    assert (coded.weight + 0).any()
    assert type(coded.weight.detach().to(torch.bfloat16)) is torch.Tensor


def test_it_compiles(pair):
    x = torch.randn(3, 8)
    compiled = torch.compile(pair[0], backend="aot_eager")
    assert compiled(x).allclose(pair[1](x))
