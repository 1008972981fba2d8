"""token_logprobs and token_nll against torch's own, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from postgrad.core.ops import Head, sum_by_sequence, token_logprobs, token_nll


def _case(bias: bool, scale: float, cap: float, num: int = 41, width: int = 8, vocabulary: int = 57):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(num, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    offset = torch.randn(vocabulary, generator=generator).requires_grad_() if bias else None
    target = torch.randint(vocabulary, (num,), generator=generator)
    return hidden, Head(weight, offset, scale, cap), target


def _small_tiles(monkeypatch):
    """Cut 41 tokens into three tiles, 57 columns into four."""
    monkeypatch.setattr("postgrad.core.ops.TILE_ROWS", {"cpu": 16})
    monkeypatch.setattr("postgrad.core.ops.TILE_COLUMNS", {"cpu": 18})


def _reference(hidden, head, target):
    logits = F.linear(hidden.double(), head.weight.double(), None if head.bias is None else head.bias.double())
    logits = logits * head.scale
    if head.cap:
        logits = head.cap * torch.tanh(logits / head.cap)
    return -F.cross_entropy(logits, target, reduction="none")


CASES = [(False, 1.0, 0.0), (True, 1.0, 0.0), (False, 0.25, 0.0), (True, 0.5, 3.0)]


@pytest.mark.parametrize(("bias", "scale", "cap"), CASES)
@pytest.mark.parametrize("whole", [0, 10**9])
def test_token_logprobs_equal_float64_reference(bias, scale, cap, whole, monkeypatch):
    _small_tiles(monkeypatch)
    hidden, head, target = _case(bias, scale, cap)
    upstream = torch.linspace(-1, 2, target.shape[0])
    inputs = [t for t in (hidden, head.weight, head.bias) if t is not None]
    ours = token_logprobs(hidden, head, target, whole=whole)
    theirs = _reference(hidden, head, target)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    for got, want in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(theirs, inputs, upstream.double()),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("bias", "scale", "cap"), CASES)
def test_token_nll_equals_the_sum_of_logprobs(bias, scale, cap, monkeypatch):
    _small_tiles(monkeypatch)
    hidden, head, target = _case(bias, scale, cap)
    inputs = [t for t in (hidden, head.weight, head.bias) if t is not None]
    ours, theirs = token_nll(hidden, head, target), -_reference(hidden, head, target).sum()
    torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-5)
    for got, want in zip(
        torch.autograd.grad(ours * 0.5, inputs), torch.autograd.grad(theirs * 0.5, inputs), strict=True
    ):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_frozen_head_gets_no_gradient(monkeypatch):
    _small_tiles(monkeypatch)
    hidden, head, target = _case(False, 1.0, 0.0)
    frozen = Head(head.weight.detach())
    token_nll(hidden, frozen, target).backward()
    first = hidden.grad.clone()
    hidden.grad = None
    (-token_logprobs(hidden, frozen, target, whole=0).sum()).backward()
    torch.testing.assert_close(first, hidden.grad)


def test_bfloat16_autocast_stays_close():
    hidden, head, target = _case(False, 1.0, 0.0)
    exact = token_logprobs(hidden, head, target, whole=0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = token_logprobs(hidden, head, target, whole=0)
        total = token_nll(hidden, head, target)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0.05)
    torch.testing.assert_close(total, -exact.sum(), atol=2.0, rtol=0.05)


def test_no_targets_at_all():
    hidden, head, _ = _case(False, 1.0, 0.0)
    none = torch.zeros(0, dtype=torch.long)
    assert token_logprobs(hidden[:0], head, none, whole=-1).shape == (0,)
    assert token_nll(hidden[:0], head, none).item() == 0.0


def test_sum_by_sequence_by_hand():
    """Sequences 0, 2, 0 of values 1, 2, 4: sums 5, 0, 2."""
    sums = sum_by_sequence(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 0]), 3)
    assert sums.tolist() == [5.0, 0.0, 2.0]
