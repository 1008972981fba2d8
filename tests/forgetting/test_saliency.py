"""Dampening and saliency masks: hand values and properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from postgrad.errors import ConfigError
from postgrad.forgetting.saliency import dampened, restricted, saliency_masks


def test_dampening_hand_values():
    """alpha 10, lambda 1. F > 10 I holds for the last three only; they shrink by I / F.

    11 > 10: 1/11. 100 > 10 * 2: 2/100. 5 > 0: to 0.
    """
    value = torch.tensor([2.0, 2.0, 2.0, -2.0, 2.0, 3.0])
    importance = torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0, 0.0])
    forget = torch.tensor([1.0, 10.0, 0.0, 11.0, 100.0, 5.0])
    got = dampened(value, importance, forget, alpha=10.0, strength=1.0)
    torch.testing.assert_close(got, torch.tensor([2.0, 2.0, 2.0, -2 / 11, 0.04, 0.0]))


def test_no_weight_grows():
    """With lambda 100 the ratio exceeds 1 and is cut."""
    got = dampened(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([11.0]), alpha=10.0, strength=100.0)
    assert got.item() == 2.0


@given(seed=st.integers(0, 1000), alpha=st.floats(0.5, 50), strength=st.floats(0.01, 2))
def test_only_weights_of_the_request_change(seed, alpha, strength):
    generator = torch.Generator().manual_seed(seed)
    value, importance, forget = (torch.rand(50, generator=generator) for _ in range(3))
    importance, value = importance**3, value - 0.5
    got = dampened(value, importance, forget, alpha=alpha, strength=strength)
    outside = forget <= alpha * importance
    assert torch.equal(got[outside], value[outside])
    assert (got.abs() <= value.abs()).all() and (got * value >= 0).all()


def test_mask_hand_value():
    gradients = {"a": torch.tensor([[0.1, -5.0], [2.0, 0.0]]), "b": torch.tensor([-3.0, 0.2])}
    masks = saliency_masks(gradients, 0.5)
    assert masks["a"].tolist() == [[False, True], [True, False]]
    assert masks["b"].tolist() == [True, False]


@given(seed=st.integers(0, 1000), share=st.floats(0.01, 1), equal=st.booleans())
def test_the_share_of_the_mask_is_exact(seed, share, equal):
    generator = torch.Generator().manual_seed(seed)
    gradients = {name: torch.randn(shape, generator=generator) for name, shape in (("a", (5, 7)), ("b", (11,)))}
    if equal:
        gradients = {name: gradient.round() for name, gradient in gradients.items()}
    masks = saliency_masks(gradients, share)
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    sizes = torch.cat([gradient.abs().flatten() for gradient in gradients.values()])
    assert int(flat.sum()) == max(1, round(share * 46))
    if not flat.all():
        assert sizes[flat].min() >= sizes[~flat].max()


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match=r"salun\.share"):
        saliency_masks({"a": torch.ones(3)}, share)


def test_gradients_stay_within_the_mask():
    layer = nn.Linear(3, 2)
    masks = {"weight": torch.tensor([[True, False, True], [False, False, True]])}
    start = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0)
    with restricted(dict(layer.named_parameters()), masks):
        for step in range(3):
            optimizer.zero_grad()
            layer(torch.ones(4, 3) + step).square().sum().backward()
            optimizer.step()
    changed = layer.weight != start
    assert torch.equal(changed, masks["weight"])
    layer.zero_grad()
    layer(torch.ones(1, 3)).sum().backward()
    assert (layer.weight.grad == 1).all(), "the block has ended"
