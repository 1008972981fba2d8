"""The collectives of FP8 over gloo, with two and with four processes, against one process that plays them all."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fp8_ranks import NUM_LARGE, Found, expected, plain, rank_tensors, start_ranks, toy
from torch import Tensor

from postgrad.fp8.ddp import HookState, fp8_hook
from postgrad.fp8.numerics import E4M3, dequantize
from postgrad.fp8.reduction import Mode, all_reduce, simulate_all_reduce
from postgrad.fp8.scaling_factor import ScalingFactor


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = [pair for both in zip(first, second, strict=True) for pair in zip(*both, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def means_are_those_of_the_simulation_on_every_rank(group: list[Found], one: Found) -> None:
    assert all(same(found["a2a"], one["a2a"]) and found["none"] == [] for found in group)


def native_sums_and_factors_too(group: list[Found], one: Found) -> None:
    for found in group:
        assert all(same(ours, alone) for ours, alone in zip(found["native"], one["native"], strict=True))
        assert torch.equal(found["k"], one["k"])


def sharded_weights_are_whole_on_every_rank(group: list[Found], one: Found) -> None:
    assert all(same(found["sharded"], one["sharded"]) for found in group)


def what_one_rank_broke_is_nan_on_all(group: list[Found], one: Found) -> None:
    for found, name in product(group, ("broken", "broken_native")):
        first, second, third = found[name]
        assert first.isnan().all() and third.isnan().all()
        assert second.isfinite().all()
        assert found["broken_k"].tolist()[0] == found["broken_k"].tolist()[2] == 0


def bytes_on_the_wire(group: list[Found], one: Found) -> None:
    """2 (N - 1) / N bytes an element, and 8 a tensor: half of bfloat16's, a quarter of float32's."""
    world = len(group)
    there = NUM_LARGE * (world - 1) // world
    for found in group:
        both, native, to_owner = found["bytes"]
        assert (both, native) == (2 * there + 8, 2 * there + 4)
        assert to_owner == NUM_LARGE * (world - 1) + 4 * world
        assert both / (2 * 2 * there) == pytest.approx(0.5, rel=0.01)
        assert both / (2 * 4 * there) == pytest.approx(0.25, rel=0.01)


def the_hook_averages_gradients_alike_on_all_ranks(group: list[Found], one: Found) -> None:
    for found in group:
        for ours, alone in zip(found["ddp"]["a2a"]["gradients"], one["ddp"], strict=True):
            assert torch.equal(ours, alone)
        native = found["ddp"]["native"]
        for ours, first, alone in zip(
            native["gradients"], group[0]["ddp"]["native"]["gradients"], one["ddp"], strict=True
        ):
            assert torch.equal(ours, first)
            torch.testing.assert_close(ours, alone, rtol=0.2, atol=0.05 * alone.abs().max().item())
        assert torch.equal(native["k"], group[0]["ddp"]["native"]["k"])
        assert found["ddp"]["a2a"]["bytes"] > native["bytes"] > 0


CHECKS = (
    means_are_those_of_the_simulation_on_every_rank,
    native_sums_and_factors_too,
    sharded_weights_are_whole_on_every_rank,
    what_one_rank_broke_is_nan_on_all,
    bytes_on_the_wire,
)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks(world: int, tmp_path: Path) -> None:
    """One test, so that the processes are started once."""
    group, one = start_ranks(tmp_path, world), expected(world)
    for check in CHECKS:
        check(group, one)
    if world == 2:
        the_hook_averages_gradients_alike_on_all_ranks(group, one)


@pytest.fixture
def nccl() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["a2a", "native"])
@pytest.mark.usefixtures("nccl")
def test_the_hook_on_a_stream_of_its_own(mode: Mode) -> None:
    model, inputs = toy()
    model.cuda()
    model(inputs(0).cuda()).square().sum().backward()
    alone = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    factor = ScalingFactor(len(alone), device="cuda") if mode == "native" else None
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    ddp.register_comm_hook(HookState(model.parameters(), mode=mode), fp8_hook)
    for _ in range(3):
        ddp.zero_grad()
        ddp(inputs(0).cuda()).square().sum().backward()
        means = [dequantize(q) for q in all_reduce(alone, mode=mode, factor=factor)]
        assert all(torch.equal(p.grad, mean) for p, mean in zip(model.parameters(), means, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("nccl")
def test_nccl_takes_float8() -> None:
    codes = torch.tensor([1.0, -448.0, 0.5], device="cuda").to(E4M3.dtype)
    dist.all_reduce(codes)
    assert codes.float().tolist() == [1.0, -448.0, 0.5]


@pytest.mark.gpu
def test_a_gpu_gives_the_bits_of_a_cpu() -> None:
    inputs = [rank_tensors(rank) for rank in range(3)]
    on_gpu = [[tensor.cuda() for tensor in tensors] for tensors in inputs]
    for mode in ("a2a", "native"):
        factors = [ScalingFactor(len(inputs[0]), start=-0.3, device=device) for device in ("cpu", "cuda")]
        cpu, gpu = (
            simulate_all_reduce(ranks, mode=mode, factor=factor)
            for ranks, factor in zip((inputs, on_gpu), factors, strict=True)
        )
        assert all(same([plain(a)], [plain(b)]) for a, b in zip(cpu, gpu, strict=True))
        assert torch.equal(factors[0].k, factors[1].k.cpu())
