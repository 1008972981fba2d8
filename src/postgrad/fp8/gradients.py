"""Gradients kept in 8 bits: each becomes codes the moment it is made, and its 16 or 32 bits are freed.

So the peak is a byte a parameter and the largest layer's gradient. Micro-batches are added in float32 and rounded
again: each adds one rounding, about 30 dB below the sum.

Source:  FP8-LM (arXiv 2310.18313), section 2.1.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from postgrad.errors import ConfigError
from postgrad.fp8.adam import Gradient, flat, needs_scale, slices
from postgrad.fp8.numerics import E4M3, Format, Quantized, amax_of, dequantize, quantize, scale_for


def take(x: Float[Tensor, "*shape"], format: Format = E4M3) -> Gradient:
    """Store a gradient with a scale just in time; float32 that stays float32 is not copied."""
    if not needs_scale(format):
        amax = amax_of(x)
        return Gradient(Quantized(x.detach().to(format.dtype), torch.ones_like(amax), format), amax)
    values = flat(x.detach())
    return _store(lambda part: values[part], x, amax_of(x), format)


def add(before: Gradient, x: Float[Tensor, "*shape"]) -> Gradient:
    """Add the gradient of another micro-batch: values in float32, then new codes with a new scale."""
    codes, values = flat(before.q.codes), flat(x.detach())

    def total(part: slice) -> Tensor:
        return dequantize(before.q._replace(codes=codes[part])) + values[part]

    amax = torch.stack([before.amax * 0, *(amax_of(total(part)) for part in slices(x.numel()))]).amax()
    return _store(total, x, amax, before.q.format)


def _store(values: Callable[[slice], Tensor], like: Tensor, amax: Float[Tensor, ""], format: Format) -> Gradient:
    """Turn values into codes, slice by slice."""
    scale = scale_for(amax, format) if needs_scale(format) else torch.ones_like(amax)
    codes = torch.empty(like.shape, dtype=format.dtype, device=like.device)
    for part in slices(like.numel()):
        flat(codes)[part] = quantize(values(part), format, scale).codes
    return Gradient(Quantized(codes, scale, format), amax)


def global_norm(gradients: Iterable[Quantized]) -> Float[Tensor, ""]:
    """Return the norm of all gradients taken as one vector, from their codes, in float64.

    It cannot overflow; the squares of 8-bit codes add up without rounding.
    """
    squares = [square_of(q) for q in gradients]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


def square_of(q: Quantized) -> Float[Tensor, ""]:
    """Return the sum of a gradient's squares, in float64."""
    codes = flat(q.codes)
    parts = [codes[part].double().square().sum() for part in slices(codes.numel())]
    total = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=codes.device)
    return total / q.scale.double().square()


class Gradients:
    """The 8-bit gradients of some parameters, by parameter; `param.grad` stays None."""

    def __init__(self) -> None:
        """Start without any."""
        self._held: dict[Tensor, Gradient] = {}
        self._hooks: dict[Tensor, RemovableHandle] = {}

    def attach(self, params: Iterable[Tensor], format: Format = E4M3) -> None:
        """Store the gradients of parameters from now on, as soon as a backward pass has made each."""
        for param in params:
            if param in self._hooks:
                raise ConfigError(f"gradients of a parameter {tuple(param.shape)} are stored already; attach once")
            hook = partial(self._after_accumulation, format)
            self._hooks[param] = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def detach(self) -> None:
        """Leave later gradients alone; drop those held."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self.clear()

    def of(self, param: Tensor) -> Gradient | None:
        """Return a parameter's gradient, or None where no backward pass reached it."""
        return self._held.get(param)

    def pop(self, param: Tensor) -> Gradient | None:
        """Return a parameter's gradient and let go of it."""
        return self._held.pop(param, None)

    def put(self, param: Tensor, gradient: Gradient) -> None:
        """Replace a parameter's gradient, by one summed over ranks for example."""
        self._held[param] = gradient

    def clear(self) -> None:
        """Drop the gradients."""
        self._held.clear()

    @torch.no_grad()
    def _after_accumulation(self, format: Format, param: Tensor) -> None:
        assert param.grad is not None, "the hook runs once a gradient is there"
        before = self._held.get(param)
        self._held[param] = take(param.grad, format) if before is None else add(before, param.grad)
        param.grad = None
