"""A weight kept as codes and a scale, that layers, optimizers and checkpoints see as an ordinary tensor.

It says it is float32, and any operation gets its values; only its codes take memory. A transposed or viewed weight is
still codes, so that a layer keeps no float32 copy of it for its backward pass.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter
from torch.utils import _pytree

from postgrad.fp8.numerics import Format, Quantized, amax_of, dequantize, quantize, scale_for

_ATEN = torch.ops.aten
_VIEWS = (
    _ATEN.detach.default,
    _ATEN.alias.default,
    _ATEN.t.default,
    _ATEN.transpose.int,
    _ATEN.view.default,
    _ATEN.slice.Tensor,
    _ATEN.split.Tensor,
    _ATEN.as_strided.default,
)
_Operator = torch._ops.OpOverload


class ScaledTensor(Tensor):
    """Codes with a scale behind the face of a tensor; writing to it rounds to new codes with a new scale."""

    codes: Tensor
    scale: Tensor
    format: Format
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type["ScaledTensor"], q: Quantized, dtype: torch.dtype) -> "ScaledTensor":
        """Make the face: the codes' shape and strides, another dtype."""
        face: ScaledTensor = torch.Tensor._make_wrapper_subclass(
            cls, q.codes.shape, strides=q.codes.stride(), dtype=dtype, device=q.codes.device
        )
        return face

    def __init__(self, q: Quantized, dtype: torch.dtype) -> None:
        """Keep codes, scale and format."""
        self.codes, self.scale, self.format = q.codes, q.scale, q.format

    @property
    def quantized(self) -> Quantized:
        """The codes, scale and format themselves, not copies."""
        return Quantized(self.codes, self.scale, self.format)

    def store(self, q: Quantized) -> None:
        """Take over codes and scale, in place."""
        self.codes.copy_(q.codes)
        self.scale.copy_(q.scale)

    def __repr__(self) -> str:  # type: ignore[override]
        """Show shape and format; the scale may be on a device, or of a tensor without values."""
        return f"ScaledTensor({tuple(self.shape)}, {self.format.name})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Format, torch.dtype]]:
        """Name the tensors it is made of."""
        return ["codes", "scale"], (self.format, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], rest: tuple[Format, torch.dtype], size: Sequence[int], stride: Sequence[int]
    ) -> "ScaledTensor":
        """Put it together again."""
        return ScaledTensor(Quantized(inner["codes"], inner["scale"], rest[0]), rest[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: _Operator, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run views on the codes, in-place operations on the values with new codes after, all else on the values."""
        named = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, ScaledTensor):
            if func in _VIEWS:
                views = func(first.codes, *args[1:], **named)
                return _pytree.tree_map(lambda codes: first._like(codes, first.scale), views)
            if func is _ATEN.clone.default:
                return first._like(first.codes.clone(), first.scale.clone())
            if func is _ATEN._to_copy.default and named.get("dtype") in (None, first.dtype):
                device = named.get("device")
                return first._like(first.codes.to(device, copy=True), first.scale.to(device, copy=True))
            if func is _ATEN.copy_.default and isinstance(args[1], ScaledTensor) and args[1].format == first.format:
                first.store(args[1].quantized)
                return first
        if func._schema.is_mutable:
            return _write(func, args, named)
        return func(*_pytree.tree_map(_value, args), **_pytree.tree_map(_value, named))

    def _like(self, codes: Tensor, scale: Tensor) -> "ScaledTensor":
        return ScaledTensor(Quantized(codes, scale, self.format), self.dtype)


def scale_parameter_(param: Parameter, format: Format) -> None:
    """Turn a parameter into codes with a scale, in place: every module and list that holds it holds the codes then.

    Its gradient, if any, is dropped.
    """
    with torch.no_grad():
        scaled = Parameter(ScaledTensor(quantize(param, format), param.dtype), requires_grad=param.requires_grad)
    param.grad = None
    torch.utils.swap_tensors(param, scaled)  # type: ignore[no-untyped-call]


def scaled(x: Tensor) -> ScaledTensor:
    """Return a tensor that is known to be kept as codes, as such."""
    found: Any = x
    assert isinstance(found, ScaledTensor), "this tensor must be kept as codes"
    return found


def unscale_parameter_(param: Parameter, value: Tensor) -> None:
    """Turn a parameter kept as codes into an ordinary one with these values, in place.

    Its gradient, if any, is dropped.
    """
    plain = Parameter(value, requires_grad=param.requires_grad)
    param.grad = None
    torch.utils.swap_tensors(param, plain)  # type: ignore[no-untyped-call]


def codes_in(x: Float[Tensor, "*shape"], format: Format, scale: Float[Tensor, ""] | None = None) -> Quantized:
    """Return a tensor in a format: the codes it holds already, or new ones; not finite, its scale becomes NaN."""
    if isinstance(x, ScaledTensor) and x.format == format:
        return x.quantized
    if scale is None:
        amax = amax_of(x)
        scale = scale_for(amax, format) + 0 * amax
    return quantize(x, format, scale)


def _write(func: _Operator, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Run an operation that writes on the values, and store what it wrote; on lists of tensors too."""
    values: dict[int, Tensor] = {}

    def value(item: Any) -> Any:
        if isinstance(item, ScaledTensor):
            return values.setdefault(id(item), _value(item))
        return item

    result = func(*_pytree.tree_map(value, args), **_pytree.tree_map(value, named))
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | named
    written = [given.get(argument.name) for argument in func._schema.arguments if argument.is_write]
    for item in _pytree.tree_leaves(written):
        if isinstance(item, ScaledTensor):
            item.store(quantize(values[id(item)], item.format))
    return written[0] if isinstance(written[0], ScaledTensor) else result


def _value(item: Any) -> Any:
    """Return the values of a scaled tensor, and anything else as it is."""
    return dequantize(item.quantized).to(item.dtype) if isinstance(item, ScaledTensor) else item
