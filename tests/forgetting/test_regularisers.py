"""Penalties on moving weights and the importances in them: hand values, reference numbers, gradients."""

import json
import math

import numpy as np
import pytest
import tiny_vision
import torch
from torch import nn
from torch.autograd import gradcheck

from postgrad.core.vision import ImageSet
from postgrad.core.vision_models import Classifier
from postgrad.forgetting.regularisers import (
    drift,
    ewc_importance,
    gradient_mean,
    l2_importance,
    mas_importance,
    penalty,
)


def fill(shape, k, scale):
    """The reference files' closed-form tensor."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(0.7 * i + 0.013 * i * i + 1.3 * k + 0.1)).reshape(shape).float()


@pytest.fixture(scope="module")
def linear():
    """Two classes, two pixels scaled to 0 or 1, no bias: logits = W x."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2, bias=False)

        def forward(self, pixels):
            return self.head(pixels.flatten(1))

    network = Network()
    with torch.no_grad():
        network.head.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    return Classifier(network, "head", ("a", "b"), size=(1, 2), mean=(0.0,), std=(1.0,))


# x = (1, 0), label 0; x = (1, 1), label 0; x = (1, 0), label 1: logits are equal, p = 1/2.
DATA = ImageSet(
    torch.tensor([[[[255, 0]]], [[[255, 255]]], [[[255, 0]]]], dtype=torch.uint8), torch.tensor([0, 0, 1]), ("a", "b")
)
WEIGHT = "network.head.weight"


def test_penalty_hand_value():
    """2 (3 - 1)^2 + 0.5 (0 - 2)^2 + 1 (5 - 4)^2 = 8 + 2 + 1."""
    weights = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[5.0]]), "other": torch.ones(3)}
    anchor = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[4.0]])}
    importance = {"a": torch.tensor([2.0, 0.5]), "b": torch.tensor([[1.0]])}
    assert penalty(weights, anchor, importance).item() == 11.0
    assert penalty(anchor, anchor, importance).item() == 0.0
    assert penalty(weights, anchor, l2_importance(anchor)).item() == 9.0


def test_penalty_equals_a_peers(shared):
    want = json.loads((shared / "oracles/continual_ewc.json").read_text())["penalty"]
    arrays = {name: torch.from_numpy(value) for name, value in np.load(shared / "oracles/continual_ewc.npz").items()}
    weights = {"w": arrays["weight"], "b": arrays["bias"]}
    mean, fisher = ({part: arrays[f"{name}_{part}"] for part in "wb"} for name in ("mean", "fisher"))
    assert penalty(weights, mean, fisher).item() / 2 == pytest.approx(want, rel=1e-6)


def test_drift():
    """The official distance, 0.1 times the sum over a layer's weight and bias; at no distance no gradient."""
    weights = {"weight": fill((2, 3), 3, 1.0), "bias": fill((2,), 4, 1.0)}
    average = {"weight": fill((2, 3), 5, 1.0), "bias": fill((2,), 6, 1.0)}
    assert 0.1 * drift(weights, average).item() == pytest.approx(0.5555080, rel=1e-6)
    start = average["weight"].clone().requires_grad_()
    drift({"weight": start}, {"weight": average["weight"]}).backward()
    assert not start.grad.any()


def test_gradients():
    a, b = fill((2, 3), 0, 1.0).double().requires_grad_(), fill((2, 3), 1, 1.0).double()
    importance = {"x": fill((2, 3), 2, 1.0).double().abs()}
    assert gradcheck(lambda value: penalty({"x": value}, {"x": b}, importance), a)
    assert gradcheck(lambda value: drift({"x": value}, {"x": b}), a)


def test_importance_by_image(linear):
    """d CE / dW is (p - onehot) x^T with p = 1/2: every entry is 1/2 in size where the pixel is 1.

    Pixel 1 is on in 3 of 3 images, pixel 2 in 1 of 3: E[g^2] = 1/4 and 1/12.
    MAS: the mean of f^2 over two classes has the gradient f_k x; f = 1 in the second image only: 1/3 for both pixels.
    """
    fisher = ewc_importance(linear, DATA, 1)[WEIGHT]
    torch.testing.assert_close(fisher, torch.tensor([[1 / 4, 1 / 12]] * 2))
    torch.testing.assert_close(mas_importance(linear, DATA, 1)[WEIGHT], torch.full((2, 2), 1 / 3))


def test_importance_by_batch(linear):
    """Batches {1, 2} and {3}. Mean gradients of row 0: (-1/2, -1/4) and (1/2, 0).

    n g^2 averaged over two batches: pixel 1 (2/4 + 1/4) / 2, pixel 2 (2/16 + 0) / 2.
    """
    fisher = ewc_importance(linear, DATA, 2)[WEIGHT]
    torch.testing.assert_close(fisher, torch.tensor([[3 / 8, 1 / 16]] * 2))


def test_gradients_are_left_as_they_were(linear):
    linear.train()
    linear.head().weight.grad = None
    mean = gradient_mean(linear, DATA, 3, nn.functional.cross_entropy, lambda gradient, _: gradient)
    assert linear.training and linear.head().weight.grad is None
    assert list(mean) == [WEIGHT]


def test_frozen_weights_have_no_importance():
    classifier = tiny_vision.fresh()
    classifier.head().requires_grad_(False)
    found = ewc_importance(classifier, tiny_vision.images(2, 0), 4)
    assert "network.head.weight" not in found and "network.embed.weight" in found
