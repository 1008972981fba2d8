"""FP8 in FSDP2: weights travel to the layers as bytes, gradients travel to their shards as bytes.

    swap_linears(model, LinearConfig())
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    loss.backward(); optimizer.step(); refresh_scales(model)

The weights of 8-bit layers are cast to E4M3 shard by shard, with one scale a tensor, gathered as codes and multiplied
as they are: every rank holds, to the bit, the codes that one process makes of the whole tensor. Their gradients are
cast with one scale a tensor, exchanged as codes and added in float32: one rounding however many ranks there are. Each
way costs (N - 1) / N bytes a parameter, where float32 costs four times that. All else (embeddings, norms, biases,
heads) travels as it is.

Source:  FP8-LM (arXiv 2310.18313), section 2.3.
Differs: the paper deals out whole tensors, because a tensor cut in pieces would need a scale that all pieces share. It
         is a float: after each step of the optimizer one MAX over all weights' magnitudes finds it (`refresh_scales`;
         what is out of date is found again, one by one, when it is sent). So shards are even, where whole tensors leave
         some ranks idle when there are few, and FSDP2 frees each layer after its turn, where the paper's weights stay.
         Gradients are added in float32, not in FP8 at every hop of a ring, and need no auto-scaling.

FSDP2 lays the gradients of a block's parameters in one buffer. Where they lie is known if every trainable parameter got
one; if not, the buffer of that block travels in full precision that once. One scale a tensor, not one a buffer: on
gradients of a small Llama both keep 35 dB over 4 ranks, but a buffer's loses twice as many small elements to zero.

Letters: N ranks, T tensors, L elements of one rank's share of a buffer.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from postgrad.errors import ConfigError, ModelError
from postgrad.fp8.collectives import Ask, Steps, Wire, over_ranks, place, run
from postgrad.fp8.linear import Fp8Conv1D, Fp8Linear
from postgrad.fp8.numerics import E4M3, Format, quantize
from postgrad.fp8.reduction import amaxes_of, inverse_of, mean_of_codes, shared_scales, sum_of_rows
from postgrad.fp8.sharded import Agreement, ShardedWeight, agree, shard_parameter_


class Piece(NamedTuple):
    """A parameter's part of each rank's share of a buffer: its elements, and what ranks agree on if it is coded."""

    numel: int
    agreement: Agreement | None = None

    @property
    def coded(self) -> bool:
        """Say whether it travels as codes."""
        return self.agreement is not None


def shard(
    model: nn.Module,
    *,
    blocks: Sequence[nn.Module] | None = None,
    mesh: DeviceMesh | None = None,
    master: Format | None = None,
    reshard_after_forward: bool = True,
    mp_policy: MixedPrecisionPolicy | None = None,
    wire: Wire | None = None,
) -> FSDPModule:
    """Apply FSDP2 to a model's blocks and to itself, its 8-bit weights and their gradients travelling as codes.

    Call it after `swap_linears` and before the optimizer is made, on every rank, with the same weights everywhere.

    Args:    blocks: what is gathered at once; by default the members of the outermost module lists that hold 8-bit
             layers.   mesh: of FSDP2, by default all ranks.   master: the format of the weights of record, F16 for
             2 bytes a parameter; by default as they are.   wire: counts the codes, and the gradients of all.
    Returns: the model itself.
    Raises:  ModelError: no 8-bit layers, or one shares its weight with a layer that is not.
    """
    for param in _coded_weights(model):
        shard_parameter_(param, master, wire)
    policy = mp_policy or MixedPrecisionPolicy()
    for block in _blocks(model) if blocks is None else blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # the root stays gathered until its backward pass, which is next
    for sharded in _fsdp_modules(model):
        sharded.set_custom_reduce_scatter(CodesReduceScatter(list(_managed(sharded)), wire))  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, Fp8Linear | Fp8Conv1D):
            module.register_state_dict_post_hook(_save_values)
    refresh_scales(model, wire=wire)
    assert isinstance(model, FSDPModule), "fully_shard made it one"
    return model


def refresh_scales(model: nn.Module, *, wire: Wire | None = None) -> None:
    """Find the scales that weights travel with, in one collective; call it after each step of the optimizer.

    Without it each weight asks for its own when it is first sent: as correct, but slower.
    """
    for module in _fsdp_modules(model):
        module.reshard()
    params = [param for param in model.parameters() if local_shard(param) is not None]
    if params:
        agree([shard for param in params if (shard := local_shard(param)) is not None], shard_group(params[0]), wire)


def refresh_after(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """Call `refresh_scales` after every step of an optimizer, until the handle is removed."""
    return optimizer.register_step_post_hook(lambda *_: refresh_scales(model))


def local_shard(param: Tensor) -> ShardedWeight | None:
    """Return this rank's shard of a parameter that travels as codes, or None for another."""
    if not isinstance(param, DTensor):
        return None
    with torch.no_grad():
        local = param.to_local()
    return local if isinstance(local, ShardedWeight) else None


def shard_group(param: Tensor) -> dist.ProcessGroup:
    """Return the ranks that hold the shards of a parameter."""
    assert isinstance(param, DTensor), "FSDP2 has sharded it"
    axes = [axis for axis, placement in enumerate(param.placements) if isinstance(placement, Shard)]
    return param.device_mesh.get_group(axes[0])


def like_shard(local: Tensor, param: Tensor) -> DTensor:
    """Return what this rank holds of something that is sharded as a parameter is."""
    assert isinstance(param, DTensor), "FSDP2 has sharded it"
    mesh, placements = param.device_mesh, param.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())


def _save_values(module: nn.Module, state: dict[str, Any], prefix: str, rest: object) -> None:
    """Let a state dict hold plain values, as other programs expect; values that are plain already are not copied."""
    weight = module.weight
    assert isinstance(weight, Parameter), "a linear layer has one"
    with torch.no_grad():
        local = local_shard(weight)
        if local is not None:
            state[f"{prefix}weight"] = like_shard(local.plain(), weight)


class CodesReduceScatter:
    """The reduce-scatter of FSDP2 that sends 8-bit weights' gradients as codes; for `set_custom_reduce_scatter`."""

    def __init__(self, params: Sequence[Parameter], wire: Wire | None = None) -> None:
        """Prepare for the sharded parameters of one module, in FSDP2's order."""
        self.params, self.wire = params, wire

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the memory of a buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup | None,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Write this rank's share of the sum or mean of all ranks' buffers.

        Raises: ConfigError: an op other than these.
        """
        if op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
            raise ConfigError(f"gradients in FP8 are averaged or added; found {op}: set_force_sum_reduction_for_comms")
        _, world = place(group)
        rows = input_tensor.view(world, -1)
        pieces = self.pieces(rows.shape[1], world)
        mean = run(scatter_steps(rows, pieces), group, self.wire)
        output_tensor.copy_(mean if op == dist.ReduceOp.AVG else mean * world)
        if op == dist.ReduceOp.AVG and all(_is_last(param, output_tensor.dtype) for param in self.params):
            self._agree(output_tensor, pieces, group)

    def pieces(self, share: int, world: int) -> list[Piece]:
        """Return where the parameters lie in a share; all of it one plain piece if some of them are missing."""
        pieces = []
        for param in self.params:
            if param.requires_grad:
                rows = -(-param.shape[0] // world)  # the last ranks' may be padding
                local = local_shard(param)
                pieces.append(Piece(rows * param.shape[1:].numel(), None if local is None else local.agreement))
        return pieces if sum(piece.numel for piece in pieces) == share else [Piece(share)]

    def _agree(self, share: Float[Tensor, " L"], pieces: Sequence[Piece], group: dist.ProcessGroup | None) -> None:
        """Find the greatest magnitudes of gradients that an optimizer is going to keep as codes."""
        parts = zip(torch.split(share, [piece.numel for piece in pieces]), pieces, strict=True)
        wanted = [(x, piece.agreement) for x, piece in parts if piece.agreement and piece.agreement.wants_gradient_amax]
        if wanted:
            amaxes = over_ranks("max", amaxes_of([x for x, _ in wanted]), group, self.wire)
            for (_, agreement), amax in zip(wanted, amaxes.unbind(), strict=True):
                agreement.gradient_amax = amax


def scatter_steps(rows: Float[Tensor, "N L"], pieces: Sequence[Piece]) -> Steps[Float[Tensor, " L"]]:
    """Average this rank's row over the ranks: codes with one rounding, plain pieces as they are."""
    world = len(rows)
    parts = torch.split(rows, [piece.numel for piece in pieces], dim=1)
    coded = [part for part, piece in zip(parts, pieces, strict=True) if piece.coded]
    plain = [part for part, piece in zip(parts, pieces, strict=True) if not piece.coded]
    done: dict[bool, Iterator[Tensor]] = {True: iter(()), False: iter(())}
    if coded:
        amaxes = yield Ask("max", amaxes_of(coded))
        scales = shared_scales(amaxes)
        codes = [quantize(part, E4M3, s).codes.view(torch.uint8) for part, s in zip(coded, scales, strict=True)]
        flat = torch.cat(codes, dim=1).view(-1)
        received = yield Ask("exchange", flat, [flat.numel() // world] * world)
        means = torch.split(mean_of_codes(received, world), [part.shape[1] for part in coded])
        inverses = (inverse_of(s, amax) for s, amax in zip(scales, amaxes.unbind(), strict=True))
        done[True] = iter([mean * inverse for mean, inverse in zip(means, inverses, strict=True)])
    if plain:
        flat = torch.cat(plain, dim=1).view(-1)
        received = yield Ask("exchange", flat, [flat.numel() // world] * world)
        total = sum_of_rows(received, world) * (1.0 / world)
        done[False] = iter(torch.split(total, [part.shape[1] for part in plain]))
    return torch.cat([next(done[piece.coded]) for piece in pieces])


def _is_last(param: Tensor, dtype: torch.dtype) -> bool:
    """Say whether a gradient is final once reduced: neither added over replicas nor rounded to another dtype after."""
    return isinstance(param, DTensor) and param.device_mesh.ndim == 1 and param.dtype in (torch.float32, dtype)


def _coded_weights(model: nn.Module) -> list[Parameter]:
    """Return the weights of the 8-bit layers, each once."""
    weights: dict[Parameter, str] = {}
    others: set[Parameter] = set()
    for name, module in model.named_modules():
        coded = isinstance(module, Fp8Linear | Fp8Conv1D)
        for key, param in module.named_parameters(recurse=False):
            if coded and key == "weight":
                weights[param] = name
            else:
                others.add(param)
    shared = [name for param, name in weights.items() if param in others]
    if shared:
        raise ModelError(f"{', '.join(shared)}: the weight serves a layer that is not 8-bit too; skip it in the swap")
    if not weights:
        raise ModelError("the model has no 8-bit layers whose weights could travel as codes: call swap_linears first")
    return list(weights)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost module lists that hold 8-bit layers."""
    blocks: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            blocks += [block for block in child if any(isinstance(m, Fp8Linear | Fp8Conv1D) for m in block.modules())]
        else:
            blocks += _blocks(child)
    return blocks


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _managed(root: nn.Module) -> Iterator[Parameter]:
    """Yield the parameters that FSDP2 gathers with a module, in its order: children first, each once."""
    seen: set[nn.Module] = set()
    found: set[Parameter] = set()

    def visit(module: nn.Module) -> Iterator[Parameter]:
        seen.add(module)
        for child in module.children():
            if child not in seen and not isinstance(child, FSDPModule):
                yield from visit(child)
        for param in module.parameters(recurse=False):
            if param not in found:
                found.add(param)
                yield param

    return visit(root)
