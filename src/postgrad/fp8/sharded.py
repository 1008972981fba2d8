"""A shard of a weight that travels as 8-bit codes: what FSDP2 keeps on each rank between the layers' turns.

It holds the weight of record, plain or in 16-bit codes, and gives FSDP2 its E4M3 codes to send: a byte an element. All
shards of a tensor are cast with one scale, so that what arrives is, to the bit, what one process would make of the
whole tensor; it arrives as codes, and a layer multiplies them as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter
from torch.utils import _pytree

from postgrad.errors import ModelError
from postgrad.fp8.adam import BF16, F32, needs_scale
from postgrad.fp8.collectives import Ask, Wire, over_ranks
from postgrad.fp8.numerics import E4M3, Format, Quantized, dequantize, quantize, scale_for
from postgrad.fp8.reduction import amaxes_of
from postgrad.fp8.scaled import ScaledTensor

_ATEN = torch.ops.aten
_PLAIN = {format.dtype: format for format in (F32, BF16)}
_Operator = torch._ops.OpOverload


class Agreement:
    """What the ranks know of a whole tensor, shared by all views of a shard.

    `amax` is its greatest magnitude and `scale` that of its E4M3 codes, while `fresh`; a write to the shard ends that.
    `gradient_amax` is that of the gradient that FSDP2 is about to hand out, once an optimizer `wants_gradient_amax`.
    """

    def __init__(self, device: torch.device, wire: Wire | None = None) -> None:
        """Start without knowledge."""
        self.amax, self.scale = torch.zeros((), device=device), torch.ones((), device=device)
        self.fresh = self.wants_gradient_amax = False
        self.gradient_amax: Tensor | None = None
        self.wire = wire

    def learn(self, amax: Float[Tensor, ""]) -> None:
        """Take over the amax of the weight of record; the scale is NaN where it is not finite, and so are products."""
        self.amax.copy_(amax)
        self.scale.copy_(torch.where(amax.isfinite(), scale_for(amax, E4M3), torch.nan))
        self.fresh = True


class ShardedWeight(ScaledTensor):
    """A weight of record that knows how to travel; torch's operations see its values."""

    agreement: Agreement

    @staticmethod
    def __new__(cls: type["ShardedWeight"], q: Quantized, dtype: torch.dtype, agreement: Agreement) -> "ShardedWeight":
        """Make the face."""
        face: ShardedWeight = ScaledTensor.__new__(cls, q, dtype)  # type: ignore[assignment]
        return face

    def __init__(self, q: Quantized, dtype: torch.dtype, agreement: Agreement) -> None:
        """Keep codes, scale, format and agreement."""
        super().__init__(q, dtype)
        self.agreement = agreement

    def store(self, q: Quantized) -> None:
        """Take over codes and scale, in place; the scale they travel with is out of date then."""
        super().store(q)
        self.agreement.fresh = False

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: _Operator, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do as codes with a scale do; plain values are read and written where they are."""
        named = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, ShardedWeight) and func is _ATEN.new_zeros.default and not named.get("dtype"):
            return first._like(func(first.codes, *args[1:]), first.scale)
        if func._schema.is_mutable:
            shards = [item for item in _pytree.tree_leaves((args, named)) if isinstance(item, ShardedWeight)]
            # FSDP2 copies shards to padded memory, on the last ranks only: they must not ask for a scale alone.
            same = func is _ATEN.copy_.default and len({item.agreement for item in shards}) < len(shards)
            for item in shards:
                item.agreement.fresh &= same
            plain = _pytree.tree_map(_plain, (args, named))
            result = func(*plain[0], **plain[1])
            return first if isinstance(first, ShardedWeight) else result
        return super().__torch_dispatch__(func, types, args, named)

    def plain(self) -> Tensor:
        """Return the values as a plain tensor: the very memory of plain ones."""
        if needs_scale(self.format):
            return dequantize(self.quantized).to(self.dtype)
        return self.codes

    def _like(self, codes: Tensor, scale: Tensor) -> "ShardedWeight":
        return ShardedWeight(Quantized(codes, scale, self.format), self.dtype, self.agreement)

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: object,
    ) -> tuple[tuple[UInt8[Tensor, "*shape"]], Tensor]:
        """Return the codes to send, as many rows on every rank, and the scale that all know."""
        agreement, group = self.agreement, mesh.get_group()
        if not agreement.fresh:
            agree([self], group)
        codes = quantize(self, E4M3, agreement.scale).codes.view(torch.uint8)
        missing = -(-outer_size[0] // mesh.size()) - codes.shape[0]
        if missing:
            codes = F.pad(codes, (0, 0) * (codes.ndim - 1) + (0, missing))
        if agreement.wire is not None:
            sizes = [codes.numel()] * mesh.size()
            agreement.wire.count(Ask("gather", codes, sizes), mesh.get_local_rank(), mesh.size())
        return (codes,), agreement.scale

    def fsdp_post_all_gather(
        self,
        outputs: tuple[UInt8[Tensor, "*shape"], ...],
        scale: Tensor,
        dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Put a face on the codes that came; later gathers write to the same memory, so that nothing is left to do."""
        if out is None:
            return ScaledTensor(Quantized(outputs[0].view(E4M3.dtype), scale, E4M3), dtype), ()
        assert isinstance(out, ScaledTensor), "it was made here"
        out.scale = scale
        return None


def agree(shards: Sequence[ShardedWeight], group: dist.ProcessGroup | None, wire: Wire | None = None) -> None:
    """Find what is to be known of tensors from all their shards, in one collective: a MAX of four bytes a tensor."""
    if not shards:
        return
    with torch.no_grad():
        amaxes = over_ranks("max", amaxes_of(shards), group, wire)
        for shard, amax in zip(shards, amaxes.unbind(), strict=True):
            shard.agreement.learn(amax)


def shard_parameter_(param: Parameter, master: Format | None = None, wire: Wire | None = None) -> None:
    """Let a parameter travel as codes once FSDP2 shards it, in place.

    Args: master: the format of the weight of record; by default as it is.   wire: counts the codes sent.
    """
    agreement = Agreement(param.device, wire)
    with torch.no_grad():
        if isinstance(param, ScaledTensor):
            held = param.quantized
        elif master is not None and needs_scale(master):
            held = quantize(param, master)
        elif param.dtype in _PLAIN:
            held = Quantized(param.detach(), torch.ones((), device=param.device), _PLAIN[param.dtype])
        else:
            raise ModelError(f"a sharded weight of record is float32 or bfloat16, or codes; found {param.dtype}")
        new = Parameter(ShardedWeight(held, param.dtype, agreement), requires_grad=param.requires_grad)
    torch.utils.swap_tensors(param, new)  # type: ignore[no-untyped-call]


def _plain(item: Any) -> Any:
    """Return plain values themselves, so that what is written to them stays; codes with a scale as they are."""
    if isinstance(item, ShardedWeight) and not needs_scale(item.format):
        return item.codes
    if isinstance(item, ShardedWeight):
        return ScaledTensor(item.quantized, item.dtype)
    return item
