"""Leak losses: values worked out by hand, bounds, and gradients against finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from postgrad.errors import DataError
from postgrad.forgetting.leakfree import (
    class_span,
    gold_proxy_logits,
    gold_proxy_loss,
    kept_loss,
    outside,
    probe_leak,
    scatter_targets,
    soft_knn_leak,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_striking_a_class_out_shares_its_probability_among_the_others() -> None:
    """softmax(0, ln 3) = (1/4, 3/4), whatever the forgotten logit was."""
    probs = gold_proxy_logits(torch.tensor([[0.0, math.log(3), 50.0]]), [2]).softmax(1)
    torch.testing.assert_close(probs, torch.tensor([[0.25, 0.75, 0.0]]))


def test_something_must_be_left() -> None:
    with pytest.raises(DataError, match="all 3 forgotten"):
        gold_proxy_logits(torch.zeros(1, 3), [0, 1, 2])


def test_the_proxy_loss_by_hand() -> None:
    """t = (1/4, 3/4, 0), s = (1/3, 1/3, 1/3): 1/4 ln(3/4) + 3/4 ln(9/4); gradient s - t."""
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = gold_proxy_loss(logits, torch.tensor([[0.0, math.log(3), 9.0]]), [2])
    loss.backward()
    assert loss.item() == pytest.approx(0.25 * math.log(0.75) + 0.75 * math.log(2.25))
    torch.testing.assert_close(logits.grad, torch.tensor([[1 / 3 - 0.25, 1 / 3 - 0.75, 1 / 3]]))


def test_the_proxy_loss_ends_at_zero_and_its_gradient_stays_below_one() -> None:
    teacher = noise(6, 5)
    at_goal = gold_proxy_logits(teacher, [1, 4]).clamp(min=-1e3)
    assert float(gold_proxy_loss(at_goal, teacher, [1, 4])) == pytest.approx(0.0, abs=1e-9)
    wild = (noise(6, 5, seed=1) * 1e4).requires_grad_()
    gold_proxy_loss(wild, teacher, [1, 4]).backward()
    assert wild.grad is not None
    assert float(wild.grad.abs().max()) <= 1 / 6 + 1e-12


def test_the_teacher_gets_no_gradient() -> None:
    teacher, logits = noise(3, 4).requires_grad_(), noise(3, 4, seed=1).requires_grad_()
    gold_proxy_loss(logits, teacher, [0]).backward()
    assert teacher.grad is None
    torch.autograd.gradcheck(lambda z: gold_proxy_loss(z, teacher, [0]), [logits])


def test_the_kept_loss_is_the_proxy_loss_of_softened_logits() -> None:
    """With softness 1 it is that loss; with 2, four times that of the halved logits."""
    logits, teacher = noise(4, 5), noise(4, 5, seed=1)
    torch.testing.assert_close(kept_loss(logits, teacher, [3], 1.0), gold_proxy_loss(logits, teacher, [3]))
    softened = 4 * gold_proxy_loss(logits / 2, teacher / 2, [3])
    torch.testing.assert_close(kept_loss(logits, teacher, [3], 2.0), softened)
    at_goal = gold_proxy_logits(teacher, [3]).clamp(min=-1e3)
    assert float(kept_loss(at_goal, teacher, [3])) == pytest.approx(0.0, abs=1e-9)


def test_the_span_of_the_classes_by_hand() -> None:
    """Three means on a line along (3, 4, 0): one direction, of length 1, whatever varies within a class."""
    line = torch.tensor([[3.0, 4.0, 0.0]])
    means = torch.tensor([0.0, 1.0, 3.0])[:, None] * line
    features = torch.cat([means + off for off in (torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0, 0.0, -1.0]]))])
    (row,) = class_span(features, torch.tensor([4, 7, 9, 4, 7, 9]))
    torch.testing.assert_close(row.abs(), torch.tensor([0.6, 0.8, 0.0]))
    assert class_span(features, torch.zeros(6, dtype=torch.int64)).shape == (0, 3)  # one class differs from none
    assert class_span(features.bfloat16(), torch.tensor([4, 7, 9, 4, 7, 9])).dtype == torch.float32


def test_what_lies_outside_by_hand() -> None:
    """Along the span nothing counts; along the two other axes the variances are 1 and 4."""
    features = torch.tensor([[9.0, 1.0, 2.0], [-5.0, -1.0, -2.0], [0.0, 1.0, 2.0], [7.0, -1.0, -2.0]])
    assert outside(features, torch.tensor([[1.0, 0.0, 0.0]])).item() == pytest.approx(5.0)
    assert outside(features, torch.eye(3)).item() == pytest.approx(0.0, abs=1e-6)
    assert outside(features + 100, torch.eye(3)[:1]).item() == pytest.approx(5.0, abs=1e-4)  # a shift is no variance


def test_what_lies_outside_has_its_gradient() -> None:
    span = class_span(noise(6, 4), torch.arange(6) % 3)
    torch.autograd.gradcheck(lambda features: outside(features, span), [noise(5, 4, seed=1).requires_grad_()])


def test_samples_land_on_their_nearest_retained_sample() -> None:
    bank, features = torch.eye(3), torch.tensor([[10.0], [20.0], [30.0]])
    keys = torch.tensor([[0.9, 0.3, 0.1], [0.1, 0.2, 0.9], [0.9, 0.3, 0.1]])
    assert scatter_targets(keys, bank, features)[:, 0].tolist() == [10, 30, 10]
    # In turn: sample 1 takes its second nearest, sample 2 its first again.
    assert scatter_targets(keys, bank, features, k=2)[:, 0].tolist() == [10, 20, 10]


def test_equal_keys_go_to_the_first() -> None:
    bank = torch.ones(4, 2)
    features = torch.arange(4.0)[:, None]
    assert scatter_targets(torch.ones(4, 2), bank, features, k=4)[:, 0].tolist() == [0, 1, 2, 3]


def test_the_neighbour_leak_by_hand() -> None:
    """Sample 0 sees sample 1 (own class, cosine 1), a bank sample at cosine 1 and one at 0: e / (2 e + 1)."""
    one, two = [2.0, 0.0], [0.0, 3.0]
    features, bank = torch.tensor([one, one]), torch.tensor([one, two])
    leak = soft_knn_leak(features, torch.tensor([8, 8]), bank, torch.tensor([0, 0]), temperature=1.0)
    assert float(leak) == pytest.approx(math.e / (2 * math.e + 1))


def test_no_sample_is_its_own_neighbour() -> None:
    leak = soft_knn_leak(noise(3, 4), torch.tensor([1, 2, 3]), noise(2, 4, seed=1), torch.tensor([0, 0]))
    assert float(leak) == 0


def test_a_cold_neighbour_leak_counts_nearest_neighbours() -> None:
    features, bank = noise(20, 3), noise(30, 3, seed=1)
    labels, bank_labels = torch.arange(20) % 2, torch.arange(30) % 3
    everyone, names = F.normalize(torch.cat([features, bank]), dim=1), torch.cat([labels, bank_labels])
    similar = (everyone[:20] @ everyone.T).fill_diagonal_(-2)
    share = (names[similar.argmax(1)] == labels).double().mean()
    assert float(soft_knn_leak(features, labels, bank, bank_labels, 1e-5)) == pytest.approx(float(share))


def test_the_neighbour_leak_falls_under_its_own_gradient() -> None:
    labels, bank, bank_labels = torch.arange(6) % 2, noise(8, 3, seed=1), torch.arange(8) % 2
    features = noise(6, 3).requires_grad_()
    torch.autograd.gradcheck(lambda x: soft_knn_leak(x, labels, bank, bank_labels, 0.5), [features])
    before = soft_knn_leak(features, labels, bank, bank_labels, 0.5)
    before.backward()
    assert features.grad is not None
    assert soft_knn_leak(features - 0.1 * features.grad, labels, bank, bank_labels, 0.5) < before


def test_the_probe_leak_by_hand() -> None:
    """x = -1, 1, y = 0, 1: X^T X = 2, r = 2, W = 1/4, residuals -1/4, 1/4 of -1/2, 1/2: 1 - (1/8) / (1/2)."""
    leak = probe_leak(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 7]), [7], ridge=1.0)
    assert float(leak) == pytest.approx(0.75)


def test_the_probe_leak_equals_stacked_least_squares() -> None:
    features, labels = noise(40, 5), torch.arange(40) % 4
    centred = features - features.mean(0)
    marks = torch.stack([(labels == c).double() - 0.25 for c in (1, 3)], 1)
    loading = 0.3 * centred.square().sum() / 5
    rows = torch.cat([centred, loading.sqrt() * torch.eye(5)])
    weight = torch.linalg.lstsq(rows, torch.cat([marks, torch.zeros(5, 2)])).solution
    wanted = 1 - (marks - centred @ weight).square().sum() / marks.square().sum()
    assert float(probe_leak(features, labels, [1, 3], ridge=0.3)) == pytest.approx(float(wanted))
    assert float(probe_leak(1e3 * features + 5, labels, [1, 3], ridge=0.3)) == pytest.approx(float(wanted))


def test_the_probe_leak_is_one_where_a_feature_is_the_class_and_zero_where_none_is() -> None:
    labels = torch.arange(60) % 3
    told = F.one_hot(labels).double()
    assert float(probe_leak(told, labels, [2], ridge=1e-9)) == pytest.approx(1.0)
    assert float(probe_leak(torch.ones(60, 3), labels, [2])) == pytest.approx(0.0, abs=1e-6)
    assert float(probe_leak(noise(60, 3), labels, [5])) == 0


def test_the_probe_leak_has_its_gradient() -> None:
    labels = torch.arange(12) % 3
    torch.autograd.gradcheck(lambda x: probe_leak(x, labels, [1, 2], 0.2), [noise(12, 4).requires_grad_()])
