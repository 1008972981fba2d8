"""What every rank of a group does in the tests of FSDP2, and the same work told by one process.

python fsdp_ranks.py FOLDER      writes what this rank found, as FOLDER/rank<r>.pt
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fp8_ranks import leave, start_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from postgrad.core import distributed
from postgrad.fp8.collectives import Wire, simulate
from postgrad.fp8.fsdp import Piece, like_shard, local_shard, refresh_after, scatter_steps, shard
from postgrad.fp8.fsdp_optimizer import Fp8ShardAdamW
from postgrad.fp8.gradients import take
from postgrad.fp8.linear import Fp8Linear, LinearConfig, swap_linears
from postgrad.fp8.numerics import E4M3, F16, dequantize
from postgrad.fp8.optimizer import Fp8AdamW
from postgrad.fp8.scaled import ScaledTensor, codes_in
from postgrad.fp8.sharded import Agreement

Found = dict[str, Any]
STEPS = 3
LR = 3e-3
MAX_NORM = 0.5
"""Gradients have a norm of some 3, so that all are cut."""
CONFIG = LinearConfig(min_inputs=1, min_outputs=1, multiple=1)
SIZES = {"hidden_size": 64, "intermediate_size": 90, "num_hidden_layers": 2, "vocab_size": 96}
"""90 rows on four ranks are 23, 23, 23 and 21."""


def llama(*, swapped: bool = True) -> nn.Module:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SIZES, **heads))
    if swapped:
        swap_linears(model, CONFIG)
    return model


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """The loss on a micro-batch of its own for each seed."""
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(seed))
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


class Odd(nn.Module):
    """Layers of 5 rows, which leave a fourth rank none; GPT-2's layout; biases; one layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        blocks = (nn.ModuleList([nn.Linear(6, 5), Conv1D(6, 5), nn.Linear(6, 6)]) for _ in range(2))
        self.blocks = nn.ModuleList(Block(layers) for layers in blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().sum()


class Block(nn.Module):
    """x + conv(linear(x)); `spare` takes no part, so that it gets no gradient, when `whole` is off."""

    whole = True

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.linear, self.conv, self.spare = layers

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(F.silu(self.linear(x)))
        return self.spare(x) if self.whole else x


def odd_input(rank: int) -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(50 + rank))


class CountingGather:
    """FSDP2's all-gather, counting the bytes that this rank hands over for the others."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        world = dist.get_world_size(group)
        self.num_bytes += input_tensor.nbytes * (world - 1)
        return dist.all_gather(list(output_tensor.chunk(world)), input_tensor, group=group, async_op=async_op)


class CountingScatter(CountingGather):
    """Its reduce-scatter, counting too."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:  # type: ignore[override]
        world = dist.get_world_size(group)
        self.num_bytes += input_tensor.nbytes * (world - 1) // world
        dist.all_reduce(input_tensor, group=group)
        output_tensor.copy_(input_tensor.chunk(world)[dist.get_rank(group)] / world)


def wholes(model: nn.Module) -> dict[str, Tensor]:
    """All weights, gathered."""
    return {name: value.full_tensor() for name, value in model.state_dict().items()}  # type: ignore[union-attr]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: param.grad for name, param in model.named_parameters()}
    return {name: grad.full_tensor() for name, grad in grads.items() if grad is not None}  # type: ignore[attr-defined]


def unsharded_codes(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """What the 8-bit layers of this rank multiply with."""
    found = {}
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
    for name, layer in model.named_modules():
        if isinstance(layer, Fp8Linear):
            weight = layer.weight
            assert isinstance(weight, ScaledTensor)
            found[name] = weight.codes.view(torch.uint8).clone(), weight.scale.clone()
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return found


def train_plain(rank: int, world: int) -> Found:
    """Float32 weights of record, torch's AdamW, batches of each rank's own."""
    wire, gather = Wire(), CountingGather()
    model = llama()
    shard(model, wire=wire)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_custom_all_gather(gather)  # type: ignore[arg-type]
    optimizer = AdamW(model.parameters(), LR, foreach=False)
    refresh_after(optimizer, model)
    losses, seen = [], []
    for step in range(STEPS):
        gather.num_bytes, before = 0, wire.bytes_sent
        loss = loss_of(model, step * world + rank)
        loss.backward()
        seen.append({"gathered": gather.num_bytes, "sent": wire.bytes_sent - before, "gradients": gradients(model)})
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "weights": wholes(model), "codes": unsharded_codes(model), "steps": seen}


def train_control(rank: int, world: int) -> Found:
    """FSDP2 as it is, of the same model: what its collectives carry in a step."""
    gather, scatter = CountingGather(), CountingScatter()
    model = llama(swapped=False)
    for part in [*model.model.layers, model]:  # type: ignore[union-attr]
        fully_shard(part).set_custom_all_gather(gather)  # type: ignore[arg-type]
        part.set_custom_reduce_scatter(scatter)  # type: ignore[operator]
    loss_of(model, rank).backward()
    return {"gathered": gather.num_bytes, "scattered": scatter.num_bytes}


def accumulate(rank: int, world: int) -> Found:
    """Two micro-batches and one reduction; with activations computed twice; with two reductions, kept as codes.

    And one in bfloat16.
    """
    found: Found = {}
    for name in ("accumulated", "recomputed"):
        model = llama()
        sharded = shard(model)
        if name == "recomputed":
            for layer in model.model.layers:  # type: ignore[union-attr]
                layer.forward = again(layer.forward)
        for micro in range(2):
            sharded.set_requires_gradient_sync(micro == 1)
            loss_of(model, 2 * rank + micro).backward()
        found[name] = gradients(model)
    model = llama()
    shard(model, master=F16)
    optimizer = coded_optimizer(model)
    for micro in range(2):
        loss_of(model, 2 * rank + micro).backward()
    stored = {name: optimizer.gradient_of(param) for name, param in model.named_parameters()}
    found["stored"] = {
        name: (like_shard(dequantize(gradient.q), model.get_parameter(name)).full_tensor(), gradient.amax)
        for name, gradient in stored.items()
        if gradient is not None
    }
    model = llama()
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    loss_of(model, rank).backward()
    return found | {"bf16": gradients(model)}


def again(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A forward pass that keeps nothing and runs again in the backward pass."""
    return lambda *args, **named: checkpoint(lambda *a: forward(*a, **named), *args, use_reentrant=False)


def odd_shapes(rank: int, world: int) -> Found:
    """Empty shards, GPT-2's layers and biases; then a layer without gradient."""
    found: Found = {}
    for whole in (True, False):
        model = Odd()
        for block in model.blocks:
            block.whole = whole
        swap_linears(model, CONFIG)
        wire = Wire()
        shard(model, blocks=list(model.blocks), wire=wire)
        before = wire.bytes_sent
        loss = model(odd_input(rank))
        between = wire.bytes_sent
        loss.backward()
        found["whole" if whole else "spared"] = {"loss": loss.item(), "gradients": gradients(model)}
        found["whole" if whole else "spared"]["forward bytes"] = between - before
    return found


def coded_optimizer(model: nn.Module) -> Fp8ShardAdamW:
    optimizer = Fp8ShardAdamW(model.parameters(), LR)
    optimizer.store_gradients()
    return optimizer


def coded_step(model: nn.Module, optimizer: Fp8ShardAdamW, seed: int) -> None:
    loss_of(model, seed).backward()
    optimizer.step(max_norm=MAX_NORM)


def train_coded(rank: int, world: int, folder: Path) -> Found:
    """Six bytes a parameter over the ranks; a broken gradient; a checkpoint and the step after it."""
    model = llama()
    shard(model, master=F16)
    optimizer = coded_optimizer(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        coded_step(model, optimizer, step * world + rank)
    found: Found = {"weights": wholes(model), "codes": unsharded_codes(model), "norm": optimizer.grad_norm.item()}
    found["bytes"], found["numel"] = held_bytes(model, optimizer), coded_numel(model)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=folder / "checkpoint")

    other = llama()
    with torch.no_grad():
        for param in other.parameters():
            param.add_(1)
    shard(other, master=F16)
    resumed = coded_optimizer(other)
    state = dict(zip(("model", "optimizer"), get_state_dict(other, resumed), strict=True))
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_state_dict(other, resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for one, its in ((model, optimizer), (other, resumed)):
        its.zero_grad()
        coded_step(one, its, 1000 + rank)
    found["straight"], found["resumed"] = wholes(model), wholes(other)

    optimizer.zero_grad()
    (loss_of(model, rank) * (float("nan") if rank == world - 1 else 1)).backward()
    optimizer.step()
    found["skipped"], found["after broken"] = optimizer.skipped, wholes(model)
    return found


def coded_numel(model: nn.Module) -> int:
    return sum(shard.numel() for param in model.parameters() if (shard := local_shard(param)) is not None)


def held_bytes(model: nn.Module, optimizer: Fp8ShardAdamW) -> Found:
    """Bytes of this rank's codes, by what they are of."""
    held = dict.fromkeys(("weight", "gradient", "exp_avg", "exp_avg_sq"), 0)
    for param in model.parameters():
        if (own := local_shard(param)) is not None:
            gradient = optimizer.gradient_of(param)
            assert gradient is not None and param.grad is None
            held["weight"] += own.codes.nbytes
            held["gradient"] += gradient.q.codes.nbytes
            for key in ("exp_avg", "exp_avg_sq"):
                held[key] += optimizer.state[param][key].to_local().nbytes
    return held


def check_ranks(folder: Path) -> None:
    """Do everything over gloo."""
    distributed.init_ranks(torch.device("cpu"))
    rank, world = distributed.rank(), distributed.world()
    found: Found = {"plain": train_plain(rank, world), "control": train_control(rank, world)}
    found |= accumulate(rank, world)
    found["odd"] = odd_shapes(rank, world)
    found["coded"] = train_coded(rank, world, folder)
    torch.save(found, folder / f"rank{rank}.pt")
    distributed.barrier()


@cache
def found_by(world: int) -> tuple[list[Found], Path]:
    """What each of so many ranks found, and the folder of their checkpoint; they are started once."""
    folder = Path(tempfile.mkdtemp(prefix="fsdp"))
    return start_ranks(folder, world, __file__), folder


def mean_of(values: Sequence[Tensor], *, coded: bool) -> Tensor:
    """What the ranks' shards of a gradient's mean are, end to end."""
    world, rows = len(values), -(-values[0].shape[0] // len(values))
    missing = rows * world - values[0].shape[0]
    padded = [torch.cat([value, value.new_zeros(missing, *value.shape[1:])]).reshape(world, -1) for value in values]
    pieces = [Piece(padded[0].shape[1], Agreement(torch.device("cpu")) if coded else None)]
    shares = simulate([scatter_steps(own, pieces) for own in padded])
    return torch.cat(shares).view(-1, *values[0].shape[1:])[: values[0].shape[0]]


def means(model: nn.Module, losses: Sequence[Callable[[], Tensor]], coded: set[str]) -> dict[str, Tensor]:
    """The means of gradients over the ranks, each rank's loss told here one after another."""
    each: list[dict[str, Tensor]] = []
    for loss in losses:
        model.zero_grad()
        loss().backward()
        each.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return {name: mean_of([grads[name] for grads in each], coded=name in coded) for name in each[0]}


def coded_names(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, layer in model.named_modules() if "product" in layer._modules}


def expected_plain(world: int) -> Found:
    """`train_plain` in one process."""
    model = llama()
    optimizer = AdamW(model.parameters(), LR, foreach=False)
    losses, grads = [], []
    for step in range(STEPS):
        own = [lambda seed=step * world + rank: loss_of(model, seed) for rank in range(world)]
        losses.append([loss().item() for loss in own])
        grads.append(means(model, own, coded_names(model)))
        for name, param in model.named_parameters():
            param.grad = grads[-1][name]
        optimizer.step()
    names = {name: layer for name, layer in model.named_modules() if isinstance(layer, Fp8Linear)}
    codes = {name: codes_in(layer.weight, E4M3) for name, layer in names.items()}
    found = {name: (q.codes.view(torch.uint8), q.scale) for name, q in codes.items()}
    weights = {name: param.detach() for name, param in model.named_parameters()}
    return {"losses": losses, "gradients": grads, "weights": weights, "codes": found}


def expected_coded(world: int) -> Found:
    """`train_coded`, up to its checkpoint, by `Fp8AdamW` in one process."""
    model = llama()
    names = coded_names(model)
    by_name = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [{"params": [by_name[name] for name in by_name if name in names]}]
    groups.append({"params": [by_name[name] for name in by_name if name not in names], "state": "fp32"})
    optimizer = Fp8AdamW(groups, LR)
    for step in range(STEPS):
        own = [lambda seed=step * world + rank: loss_of(model, seed) for rank in range(world)]
        grads = means(model, own, names)
        model.zero_grad()
        for name, param in model.named_parameters():
            if name in names:
                optimizer.gradients.put(param, take(grads[name]))
            else:
                param.grad = grads[name]
        optimizer.step(max_norm=MAX_NORM)
    return {"weights": {name: value(param) for name, param in model.named_parameters()}, "norm": optimizer.grad_norm}


def value(param: Tensor) -> Tensor:
    return dequantize(param.quantized) if isinstance(param, ScaledTensor) else param.detach()


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_ranks(Path(sys.argv[1]))
    leave()
