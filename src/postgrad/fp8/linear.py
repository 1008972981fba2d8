"""Linear layers whose three matrix products run on 8-bit codes, and the swap that puts them into a model.

Formula: y = q(x) q(w)^T + b;  dx = q(dy) q(w);  dw = q(dy)^T q(x), x and w in E4M3, dy in E5M2, a scale a tensor.
Source:  FP8-LM (arXiv 2310.18313), section 2.1 and appendix A.
Differs: the weight stays as it is and is cast again for dx, where the released code keeps 1 byte a parameter between
         the passes. Infinity or NaN in a tensor makes its whole product NaN: no code tells them, so they cannot hide.
         Under autocast the input is cast once, not to 16 bits first.

On CUDA the products are torch's scaled ones, with fast accumulation forward only; on a CPU the codes' values are
multiplied in float32. Nothing falls back to 16 bits: a device or a dtype that cannot do this is an error.

Letters: M rows of all batch axes, K inputs, N outputs of a layer, W steps of the window.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from postgrad.errors import ModelError
from postgrad.fp8.numerics import E4M3, E5M2, Format, Quantized, amax_of, quantize, scale_for
from postgrad.fp8.products import ALIGNMENT, product, turned
from postgrad.fp8.scaled import codes_in

Scaling = Literal["jit", "delayed"]
_M = TypeVar("_M", bound=nn.Module)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 9)
_INFINITE = 0x7F800000
"""Bits of float32's infinity; those of NaN are greater, those of every finite magnitude less."""
_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Which layers multiply in 8 bits, and where their scales come from."""

    scaling: Scaling = "jit"
    """"jit" measures each tensor before its cast; "delayed" takes the greatest of the last steps for x and dy."""
    window: int = 16
    """Steps that delayed scaling looks back on; until they are full, and after a number not finite, scales are jit."""
    multiple: int = ALIGNMENT
    """Inputs and outputs must be multiples of this; 1 admits every size, padded where the device asks for it."""
    min_inputs: int = 256
    """Layers with fewer inputs stay as they are; casts cost more than products save below some 2000."""
    min_outputs: int = 256
    """Layers with fewer outputs stay as they are."""
    take: tuple[str, ...] = ("*",)
    """Patterns, with * and ?, of layers to swap; one fits a whole dotted name or one part of it."""
    skip: tuple[str, ...] = ("lm_head", "classifier", "score", "head", "embed_out", "qa_outputs", "router", "lora_*")
    """Patterns of layers to leave alone, as in `take`."""


class _Delay(NamedTuple):
    """A window of delayed scaling: bits of amaxes, this step's first, then the last W; and whether it is used yet."""

    amaxes: Int[Tensor, " steps"] | None = None
    ready: bool = False
    recording: bool = False


def _scale(x: Float[Tensor, "*shape"], format: Format, delay: _Delay) -> Float[Tensor, ""]:
    """Return the scale of a tensor, NaN where the tensor is not finite; note its amax in the window."""
    amax = amax_of(x)
    scale = scale_for(amax, format)
    if delay.amaxes is not None:
        if delay.ready:
            scale = scale_for(delay.amaxes[1:].max().view(torch.float32), format, before=scale)
        if delay.recording:
            delay.amaxes[0].copy_(torch.maximum(delay.amaxes[0], amax.view(torch.int32)))
    return scale + 0 * amax


class _Linear(torch.autograd.Function):
    """x w^T, and its two gradients, each a product of codes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "M K"],
        weight: Float[Tensor, "N K"],
        scale: Float[Tensor, ""],
        dtype: torch.dtype,
        delay: tuple[Tensor | None, bool, bool],
    ) -> Float[Tensor, "M N"]:
        """Return x w^T in a dtype; codes of x stay for dw, and the weight itself for dx.

        Args: scale: of x.   delay: of dy, a `_Delay`.
        """
        q_x, q_w = quantize(x, E4M3, scale), codes_in(weight, E4M3)
        ctx.save_for_backward(q_x.codes, q_x.scale, weight, q_w.scale)
        # Not saved as the others are: a later micro-batch writes to the window before this one's gradient comes.
        ctx.window, ctx.ready, ctx.recording = delay
        ctx.dtypes = x.dtype, weight.dtype
        return product(q_x, q_w, dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "M N"]) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Return dx and dw in the dtypes of x and w, where they are asked for."""
        codes, x_scale, weight, w_scale = ctx.saved_tensors
        delay = _Delay(ctx.window, ctx.ready, ctx.recording)
        q_dy = quantize(gradient, E5M2, _scale(gradient, E5M2, delay))
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = product(q_dy, turned(codes_in(weight, E4M3, w_scale)), ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dw = product(turned(q_dy), turned(Quantized(codes, x_scale, E4M3)), ctx.dtypes[1])
        return dx, dw, None, None, None


class Fp8Product(nn.Module):
    """The product of a layer and the windows of its scales; they are in no state dict, so a resumed run starts anew."""

    amaxes: Tensor | None
    """Bits of float32, so that no cast of the model rounds them: row 0 of x, row 1 of dy; see `_Delay`."""

    def __init__(self, config: LinearConfig, device: torch.device) -> None:
        super().__init__()
        amaxes = None
        if config.scaling == "delayed":
            amaxes = torch.zeros(2, 1 + config.window, dtype=torch.int32, device=device)
        self.register_buffer("amaxes", amaxes, persistent=False)
        self.filled = [0, 0]
        self.input_ready = self.gradient_ready = False

    def forward(self, x: Float[Tensor, "*batch K"], weight: Float[Tensor, "N _K"]) -> Float[Tensor, "*batch N"]:
        """Return x w^T in the dtype of autocast, or else of x.

        Raises: ModelError: a device or a dtype that has no 8-bit product, or an x of another size.
        """
        _check_operands(x, weight)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        inputs = gradients = None
        if self.amaxes is not None:
            inputs, gradients = self.amaxes[0], self.amaxes[1]
        flat = x.reshape(-1, x.shape[-1])
        with torch.no_grad():
            scale = _scale(flat, E4M3, _Delay(inputs, self.input_ready, self.training))
        delay = (gradients, self.gradient_ready, self.training)
        y: Tensor = _Linear.apply(flat, weight, scale, dtype, delay)  # type: ignore[no-untyped-call]
        return y.reshape(*x.shape[:-1], weight.shape[0])

    def scale_of(self, x: Float[Tensor, "M _"], format: Format) -> Float[Tensor, ""]:
        """Return the scale that an input, in E4M3, or a gradient of the output, in E5M2, has at this step."""
        window = None if self.amaxes is None else self.amaxes[0 if format == E4M3 else 1]
        ready = self.input_ready if format == E4M3 else self.gradient_ready
        return _scale(x, format, _Delay(window, ready))

    def resume(self, filled: Sequence[int]) -> None:
        """Go on with windows of x and dy that have so many steps in them."""
        assert self.amaxes is not None
        self.filled = list(filled)
        self.input_ready, self.gradient_ready = (n == self.amaxes.shape[1] - 1 for n in self.filled)

    def note_step(self, finite: tuple[bool, bool]) -> None:
        """Count a step into the windows of x and dy, or empty them after a number not finite."""
        assert self.amaxes is not None
        steps = self.amaxes.shape[1] - 1
        self.filled = [min(n + 1, steps) if good else 0 for n, good in zip(self.filled, finite, strict=True)]
        self.input_ready, self.gradient_ready = (n == steps for n in self.filled)


class Fp8Linear(nn.Linear):
    """A linear layer that multiplies in 8 bits; its parameters, names and hooks are those it was made of."""

    product: Fp8Product

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: LinearConfig | None = None) -> "Fp8Linear":
        """Return a layer with this one's very parameters, hooks and attributes."""
        return _with_product(cls, linear, config)

    def forward(self, input: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        """Return x w^T + b, the bias added outside the product and in its dtype."""
        return _biased(self.product(input, self.weight), self.bias)


class Fp8Conv1D(Conv1D):  # type: ignore[misc]
    """GPT-2's linear layer, whose weight is [K, N], multiplying in 8 bits."""

    product: Fp8Product

    @classmethod
    def from_linear(cls, linear: Conv1D, config: LinearConfig | None = None) -> "Fp8Conv1D":
        """Return a layer with this one's very parameters, hooks and attributes."""
        return _with_product(cls, linear, config)

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        """Return x w + b, the bias added outside the product and in its dtype."""
        return _biased(self.product(x, self.weight.T), self.bias)


def swap_linears(model: nn.Module, config: LinearConfig) -> list[str]:
    """Replace a model's linear layers by 8-bit ones, in place, and name them; parameters stay the same objects.

    Only `nn.Linear` and `Conv1D` themselves are replaced, no subclasses. Swap before sharding, compiling and dispatch.

    Raises: ModelError: no layer is admitted, a layer's device has no 8-bit products, or one cannot be replaced.
    """
    linears = admitted_linears(model, config)
    new: dict[nn.Module, nn.Module] = {}  # a module in two places stays one
    for old in linears.values():
        if old not in new:
            new[old] = _with_product(Fp8Linear if isinstance(old, nn.Linear) else Fp8Conv1D, old, config)
    for name, old in linears.items():
        model.set_submodule(name, new[old])
    return list(linears)


def admitted_linears(model: nn.Module, config: LinearConfig) -> dict[str, nn.Module]:
    """List the linear layers that a config admits, by name.

    Raises: ModelError: there is none.
    """
    linears = {name: module for name, module in _linears(model) if type(module) in (nn.Linear, Conv1D)}
    refused = {name: reason for name, module in linears.items() if (reason := _refusal(name, module, config))}
    if len(refused) == len(linears):
        raise ModelError(_nothing_to_swap(model, linears, refused))
    return {name: module for name, module in linears.items() if name not in refused}


def restore_linears(model: nn.Module) -> list[str]:
    """Put the ordinary layers back, in place, with the parameters as they are now, and name them."""
    new: dict[nn.Module, nn.Module] = {}
    names = []
    for name, module in list(_linears(model)):
        if isinstance(module, Fp8Linear | Fp8Conv1D) and name:
            if module not in new:
                new[module] = _retyped(nn.Linear if isinstance(module, nn.Linear) else Conv1D, module)
                del new[module]._modules["product"]
            model.set_submodule(name, new[module])
            names.append(name)
    return names


def roll_windows(model: nn.Module) -> None:
    """End a step of delayed scaling: its amaxes enter the windows. Call it once after each step of the optimizer.

    It waits once for the device. A model without delayed scaling is left as it is. Windows are buffers: give
    DistributedDataParallel broadcast_buffers=False, or all ranks use the first one's.
    """
    products = [module for module in model.modules() if isinstance(module, Fp8Product) and module.amaxes is not None]
    buffers = [one.amaxes for one in products if one.amaxes is not None]
    if not buffers:
        return
    device = buffers[0].device
    steps = torch.stack([amaxes[:, 0].to(device) for amaxes in buffers]).tolist()
    for one, amaxes, (x, dy) in zip(products, buffers, steps, strict=True):
        amaxes.copy_(amaxes.roll(1, dims=1))
        amaxes[:, 0].zero_()
        one.note_step((x < _INFINITE, dy < _INFINITE))


def roll_after(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """Call `roll_windows` after every step of an optimizer, until the handle is removed."""
    return optimizer.register_step_post_hook(lambda *_: roll_windows(model))


def _check_operands(x: Tensor, weight: Tensor) -> None:
    """Refuse what has no 8-bit product."""
    if x.shape[-1] != weight.shape[1]:
        raise ModelError(f"expected {weight.shape[1]} features on the last axis; found an input {list(x.shape)}")
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        raise ModelError(
            f"8-bit products take float32, bfloat16 and float16; found an input of {x.dtype} and a weight of "
            f"{weight.dtype}; convert them, or call restore_linears(model)"
        )
    if not torch.compiler.is_compiling():
        _check_device(x.device)


def _check_device(device: torch.device) -> None:
    """Refuse devices other than a CPU, which emulates, and NVIDIA's from Ada and Hopper on."""
    cure = "keep products in full precision (precision.products full), or run on a CPU, which emulates them"
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and torch.version.hip):
        raise ModelError(f"no 8-bit products on {device.type!r}; {cure}")
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < _OLDEST:
        raise ModelError(f"8-bit products need compute capability {_OLDEST} or newer; {device} has {found}; {cure}")


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias in the product's dtype."""
    return y if bias is None else y + bias.to(y.dtype)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name a model's linear layers, one in two places twice."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """Return a layer's inputs and outputs."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    assert isinstance(linear, Conv1D)
    return int(linear.nx), int(linear.nf)


def _refusal(name: str, linear: nn.Module, config: LinearConfig) -> str:
    """Say why a layer stays as it is; nothing for one that is to be swapped."""
    inputs, outputs = _sizes(linear)
    if not name:
        return "the model is this one layer: use Fp8Linear.from_linear"
    if not _fits(name, config.take):
        return "its name is not in take"
    if _fits(name, config.skip):
        return "its name is in skip"
    if inputs % config.multiple or outputs % config.multiple:
        return f"not multiples of {config.multiple}: lower multiple"
    if inputs < config.min_inputs or outputs < config.min_outputs:
        return (
            f"below {config.min_inputs} x {config.min_outputs}: lower min_inputs and min_outputs (precision.min_size)"
        )
    return ""


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    """Say whether a pattern fits a whole name or one part of it."""
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in (name, *name.split(".")))


def _nothing_to_swap(model: nn.Module, linears: dict[str, nn.Module], refused: dict[str, str]) -> str:
    """Say what layers there are, and what would admit each."""
    if any(isinstance(module, Fp8Product) for module in model.modules()):
        return "no layer is left to swap: the model's linear layers are swapped already; call restore_linears first"
    if not linears:
        return f"{type(model).__name__} has no nn.Linear and no Conv1D; nothing in it can multiply in 8 bits"
    told = [f"{name} {' x '.join(map(str, _sizes(linears[name])))}: {why}" for name, why in refused.items()]
    more = f"; and {len(told) - _LISTED} more" if len(told) > _LISTED else ""
    return f"no linear layer of {type(model).__name__} is admitted to 8 bits: {'; '.join(told[:_LISTED])}{more}"


def _with_product(kind: type[_M], linear: nn.Module, config: LinearConfig | None) -> _M:
    """Return a layer of an 8-bit kind in place of an ordinary one.

    Raises: ModelError: what is bound to the old module would be lost or would bypass the new one.
    """
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if "forward" in vars(linear) or vars(linear).get("_compiled_call_impl") is not None:
        raise ModelError("a linear layer has a forward of its own; swap before compiling it and before dispatch hooks")
    if isinstance(weight, DTensor):
        raise ModelError("a linear layer is sharded already, and its shards belong to the old module; swap first")
    if not weight.is_meta:
        _check_device(weight.device)
    new = _retyped(kind, linear)
    new.add_module("product", Fp8Product(config or LinearConfig(), weight.device).train(linear.training))
    return new


def _retyped(kind: type[_M], module: nn.Module) -> _M:
    """Return a module of another kind with all that this one has; hooks stay shared, so that they can be removed."""
    new = kind.__new__(kind)
    own = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    vars(new).update({key: copy(value) if key in own else value for key, value in vars(module).items()})
    return new
