import pytest
import torch
from fp8_ranks import SHAPES, rank_tensors, sharded_update, toy_weights
from hypothesis import given
from hypothesis import strategies as st

from postgrad.fp8.collectives import simulate
from postgrad.fp8.numerics import E4M3, F16, Quantized, dequantize, quantize, scale_for
from postgrad.fp8.partition import (
    Like,
    gather_from_owners,
    greedy_partition,
    owner_steps,
    reduce_to_owners,
    spread_steps,
)
from postgrad.fp8.reduction import amaxes_of


def test_tensors_are_dealt_out_greatest_first() -> None:
    parts = greedy_partition([9, 7, 6, 5, 4, 4, 3, 2], 3)
    assert parts.owned == [[0, 5], [1, 4, 6], [2, 3, 7]] and parts.loads == [13, 14, 13]


@pytest.mark.parametrize(
    ("numels", "world", "loads"),
    [([5, 5, 4, 4, 3, 3], 2, [12, 12]), ([3, 3, 2, 2, 2], 2, [7, 5]), ([1], 4, [1, 0, 0, 0]), ([], 2, [0, 0])],
)
def test_loads(numels: list[int], world: int, loads: list[int]) -> None:
    assert greedy_partition(numels, world).loads == loads


@pytest.mark.parametrize(
    ("layers", "world", "ratio"),
    [(32, 32, 1.0), (32, 64, 1.17), (32, 128, 1.33), (12, 16, 1.11), (12, 32, 1.33), (12, 128, 3.56)],
)
def test_loads_of_gpt(layers: int, world: int, ratio: float) -> None:
    loads = greedy_partition([3, 1, 4, 4] * layers, world).loads  # in squares of the width
    assert max(loads) / (sum(loads) / world) == pytest.approx(ratio, abs=0.005)


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 5))
def test_every_tensor_has_one_owner_and_loads_are_near_even(numels: list[int], world: int) -> None:
    parts = greedy_partition(numels, world)
    assert sorted(i for indices in parts.owned for i in indices) == list(range(len(numels)))
    assert parts.loads == [sum(numels[i] for i in indices) for indices in parts.owned]
    assert max(parts.loads) - min(parts.loads) <= max(numels, default=0)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_a_sharded_step_is_the_step_of_one_process(world: int) -> None:
    inputs = [rank_tensors(rank) for rank in range(world)]
    parts = greedy_partition([tensor.numel() for tensor in inputs[0]], world)
    means = simulate([owner_steps(tensors, parts, rank, world) for rank, tensors in enumerate(inputs)])
    updated = [sharded_update(toy_weights(), own) for own in means]
    likes = [Like(shape, F16) for shape in SHAPES]
    ranks = simulate([spread_steps(own, likes, parts, rank) for rank, own in enumerate(updated)])
    alone = sharded_update(toy_weights(), dict(enumerate(means_of(inputs))))
    for rank in ranks:
        for i, q in enumerate(rank):
            assert torch.equal(q.codes, alone[i].codes) and torch.equal(q.scale, alone[i].scale)
            assert q.codes.shape == SHAPES[i] and q.format == F16


def means_of(inputs: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The float32 mean of the ranks' codes, tensor by tensor."""
    means = []
    for tensors in zip(*inputs, strict=True):
        scale = scale_for(amaxes_of(tensors).max(), E4M3)
        summed = torch.stack([quantize(tensor, E4M3, scale).codes.float() for tensor in tensors]).sum(0)
        means.append(summed * (1 / len(inputs)) / scale)
    return means


def test_a_rank_may_own_nothing() -> None:
    parts = greedy_partition([1], 4)
    means = simulate([owner_steps([torch.tensor([float(rank)])], parts, rank, 4) for rank in range(4)])
    assert [{i: mean.tolist() for i, mean in own.items()} for own in means] == [{0: [1.5]}, {}, {}, {}]


def test_what_is_not_finite_on_one_rank_is_nan_at_its_owner() -> None:
    inputs = [[torch.ones(3), torch.ones(2)], [torch.tensor([1.0, torch.inf, 1.0]), torch.ones(2)]]
    parts = greedy_partition([3, 2], 2)
    first, second = simulate([owner_steps(tensors, parts, rank, 2) for rank, tensors in enumerate(inputs)])
    assert first[0].isnan().all() and second[1].tolist() == [1.0, 1.0]


def test_formats_may_be_mixed() -> None:
    held = [quantize(torch.randn(5), E4M3), quantize(torch.randn(3, 3), F16), quantize(torch.randn(()), E4M3)]
    likes = [Like(tuple(q.codes.shape), q.format) for q in held]
    gathered = gather_from_owners(dict(enumerate(held)), likes, greedy_partition([5, 9, 1], 1))
    for before, after in zip(held, gathered, strict=True):
        assert isinstance(after, Quantized) and after.format == before.format
        assert torch.equal(dequantize(before), dequantize(after))


def test_without_tensors_there_is_nothing_to_do() -> None:
    parts = greedy_partition([], 1)
    assert reduce_to_owners([], parts) == {} and gather_from_owners({}, [], parts) == []
