"""What every rank of a group does in the FP8 tests, and the same ranks' work told by one process.

python fp8_ranks.py FOLDER      writes what this rank found, as FOLDER/rank<r>.pt
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgrad.core import distributed
from postgrad.fp8.collectives import Wire, simulate
from postgrad.fp8.ddp import HookState, fp8_hook
from postgrad.fp8.numerics import F16, Quantized, dequantize, quantize
from postgrad.fp8.partition import (
    Like,
    Partition,
    gather_from_owners,
    greedy_partition,
    owner_steps,
    reduce_to_owners,
    spread_steps,
)
from postgrad.fp8.reduction import Mode, all_reduce, simulate_all_reduce
from postgrad.fp8.scaling_factor import ScalingFactor

Found = dict[str, Any]
SHAPES = [(7,), (40, 33), (), (0,), (1000,), (3, 1)]
NUM_LARGE = 40_000


def rank_tensors(rank: int, *, step: int = 0) -> list[Tensor]:
    """Gradients of one rank: mixed shapes, dtypes, magnitudes and layouts, and one that is all zero."""
    noise = torch.Generator().manual_seed(100 * step + rank)
    tensors = [torch.randn(shape, generator=noise) * 10.0 ** (3 * i - 7) for i, shape in enumerate(SHAPES)]
    tensors[1] = tensors[1].t().contiguous().t()
    tensors[4] = tensors[4].bfloat16()
    tensors[5].zero_()
    return tensors


def broken_tensors(rank: int) -> list[Tensor]:
    """On the second rank, a NaN in one tensor and an infinity in another."""
    tensors = [torch.ones(5), torch.ones(6), torch.ones(7)]
    if rank == 1:
        tensors[0][3], tensors[2][0] = torch.nan, -torch.inf
    return tensors


def toy() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A model and its inputs on a rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 3))
    return model, lambda rank: torch.randn(20, 10, generator=torch.Generator().manual_seed(5)) + rank


def sharded_update(weights: Sequence[Tensor], means: dict[int, Tensor]) -> dict[int, Quantized]:
    """A step on the owner's tensors, whose new weights are stored in 16 bits."""
    return {i: quantize(weights[i] - 0.1 * mean / (mean.abs() + 1e-3), F16) for i, mean in means.items()}


def plain(q: Quantized) -> tuple[Tensor, Tensor]:
    """Codes as bytes, which can be compared, and the scale."""
    return q.codes.reshape(-1).view(torch.uint8).cpu().clone(), q.scale.cpu().clone()


def toy_weights() -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(9)) for shape in SHAPES]


def deal(world: int) -> Partition:
    return greedy_partition([weight.numel() for weight in toy_weights()], world)


def check_ranks(folder: Path) -> None:
    """Do everything over gloo."""
    distributed.init_ranks(torch.device("cpu"))
    rank, world = distributed.rank(), distributed.world()
    found: Found = {"a2a": [plain(q) for q in all_reduce(rank_tensors(rank))], "none": all_reduce([])}
    factor = ScalingFactor(len(SHAPES), start=0.5)
    reduced = [all_reduce(rank_tensors(rank, step=step), mode="native", factor=factor) for step in range(3)]
    found["native"] = [[plain(q) for q in step] for step in reduced]
    found["k"] = factor.k
    found["broken"] = [dequantize(q) for q in all_reduce(broken_tensors(rank))]
    factor = ScalingFactor(3)
    broken = all_reduce(broken_tensors(rank), mode="native", factor=factor)
    found["broken_native"], found["broken_k"] = [dequantize(q) for q in broken], factor.k
    wires = Wire(), Wire(), Wire()
    all_reduce([torch.randn(NUM_LARGE)], wire=wires[0])
    all_reduce([torch.randn(NUM_LARGE)], mode="native", factor=factor, wire=wires[1])
    parts = greedy_partition([NUM_LARGE] * world, world)
    reduce_to_owners([torch.randn(NUM_LARGE)] * world, parts, wire=wires[2])
    found["bytes"] = [wire.bytes_sent for wire in wires]
    means = reduce_to_owners(rank_tensors(rank), deal(world))
    updated = sharded_update(toy_weights(), means)
    likes = [Like(shape, F16) for shape in SHAPES]
    found["sharded"] = [plain(q) for q in gather_from_owners(updated, likes, deal(world))]
    if world == 2:  # its import takes seconds
        found["ddp"] = {mode: ddp_gradients(mode, rank) for mode in ("a2a", "native")}
    torch.save(found, folder / f"rank{rank}.pt")
    distributed.barrier()


def ddp_gradients(mode: Mode, rank: int) -> Found:
    """Three backward passes through the hook, so that the buckets are rebuilt after the first."""
    from torch.nn.parallel import DistributedDataParallel

    model, inputs = toy()
    ddp = DistributedDataParallel(model)
    state = HookState(model.parameters(), mode=mode)
    ddp.register_comm_hook(state, fp8_hook)
    for _ in range(3):
        ddp.zero_grad()
        ddp(inputs(rank)).square().sum().backward()
    k = None if state.factor is None else state.factor.k
    return {"gradients": [p.grad for p in model.parameters()], "bytes": state.wire.bytes_sent, "k": k}


def expected(world: int) -> Found:
    """What each rank should find, without a group."""
    inputs = [[rank_tensors(rank, step=step) for rank in range(world)] for step in range(3)]
    factor = ScalingFactor(len(SHAPES), start=0.5)
    found: Found = {"a2a": [plain(q) for q in simulate_all_reduce(inputs[0])]}
    native = [simulate_all_reduce(step, mode="native", factor=factor) for step in inputs]
    found["native"], found["k"] = [[plain(q) for q in step] for step in native], factor.k
    means = simulate([owner_steps(tensors, deal(world), rank, world) for rank, tensors in enumerate(inputs[0])])
    updated = [sharded_update(toy_weights(), own) for own in means]
    likes = [Like(shape, F16) for shape in SHAPES]
    spread = simulate([spread_steps(own, likes, deal(world), rank) for rank, own in enumerate(updated)])
    found["sharded"] = [plain(q) for q in spread[0]]
    gradients = []
    for rank in range(world):
        model, inputs_of = toy()
        model(inputs_of(rank)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    found["ddp"] = [dequantize(q) for q in simulate_all_reduce(gradients)]
    return found


def start_ranks(folder: Path, world: int, script: str = __file__, *arguments: str) -> list[Found]:
    """Start the processes of a script as torchrun does, and return what each of them found."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "localhost", **{key: str(value) for key, value in ranks.items()}}
        command = [sys.executable, script, str(folder), *arguments]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=110)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


def leave() -> None:
    """End this process at once, its work written: torch's own end of a group aborts now and then under load."""
    distributed.barrier()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_ranks(Path(sys.argv[1]))
    leave()
