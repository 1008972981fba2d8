"""Averages of codes: alone nothing changes, missing and broken gradients stay what they are, norms are exact."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from postgrad.fp8.adam import Gradient
from postgrad.fp8.averages import average_gradients, average_to_owners, part_of, plain_square, square_or_nan, value_of
from postgrad.fp8.gradients import Gradients, take
from postgrad.fp8.numerics import dequantize
from postgrad.fp8.partition import greedy_partition


def norm_of(gradients: list[Gradient], plain: Sequence[Tensor] = ()) -> Tensor:
    """What optimizers make of the squares."""
    return sum([*map(square_or_nan, gradients), *map(plain_square, plain)], torch.zeros((), dtype=torch.float64)).sqrt()


def params() -> list[Parameter]:
    return [Parameter(torch.zeros(shape)) for shape in ((3, 4), (2, 2), (5, 1))]


def test_alone_a_gradient_is_its_own_mean() -> None:
    gradients, coded = Gradients(), params()
    one = take(torch.arange(12.0).view(3, 4))
    gradients.put(coded[0], one)
    average_gradients(gradients, coded)
    assert gradients.of(coded[0]) is one and gradients.of(coded[1]) is None
    owned = average_to_owners(gradients, coded, greedy_partition([12, 4, 5], 1))
    assert list(owned) == [0] and owned[0] is one and gradients.of(coded[0]) is None


def test_the_norm_is_that_of_the_values() -> None:
    noise = torch.Generator().manual_seed(0)
    held = [take(torch.randn(30, 7, generator=noise) * 10.0**i) for i in (-9, 0, 8)]
    plain = [torch.randn(11, generator=noise) * 1e7]
    values = torch.cat([*(dequantize(g.q).flatten() for g in held), *plain]).double()
    assert float(norm_of(held, plain)) == pytest.approx(float(values.norm()), rel=1e-7)
    assert float(norm_of([])) == 0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_cannot_hide(bad: float) -> None:
    gradient = take(torch.tensor([[1.0, bad]]))
    assert norm_of([gradient]).isnan()
    assert value_of(gradient, torch.zeros(1, 2)).isnan().all()
    assert not norm_of([], [torch.tensor([1.0, bad])]).isfinite()


def test_a_missing_gradient_counts_as_zero() -> None:
    assert torch.equal(value_of(None, torch.ones(2, 3)), torch.zeros(2, 3))


def test_a_part_of_a_partition_counts_anew() -> None:
    tensors = [torch.zeros(n) for n in (9, 7, 6, 5)]
    whole = greedy_partition([9, 7, 6, 5], 2)
    assert whole.owned == [[0, 3], [1, 2]]
    part = part_of(whole, [1, 3], tensors)
    assert part.owned == [[1], [0]] and part.loads == [5, 7]
