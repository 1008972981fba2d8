"""The step of many tensors in a few launches: 11 bytes of traffic a parameter, and no temporaries of a tensor's size.

Tables of addresses and numbers go to the device, the kernels of `postgrad.fp8.kernels` do the rest there: scales from
bounds (or from a first pass, just in time), the step, and what is kept of each tensor. The bits are the reference's.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from postgrad.errors import ConfigError
from postgrad.fp8.adam import (
    BF16,
    F32,
    Gradient,
    Hyper,
    Moments,
    Store,
    bounds_of,
    coefficients,
    noise_keys,
    step_states,
)
from postgrad.fp8.numerics import E4M3, E5M2, F16, Format, Quantized

Backend = Literal["auto", "torch", "compile", "triton"]
_KINDS = {E4M3: 0, E5M2: 1, F16: 2, BF16: 3, F32: 4}
_CHUNK, _NUM_WARPS, _ALIGNMENT = 4096, 8, 16


class Item(NamedTuple):
    """A parameter's states and gradient, and the settings of its step; a seed of its own."""

    moments: Moments
    gradient: Gradient
    hyper: Hyper
    factor: float
    guard: bool
    store: Store


def check_backend(backend: str) -> None:
    """Refuse a back end that is unknown or not installed."""
    if backend not in get_args(Backend):
        raise ConfigError(f"backend must be one of {', '.join(get_args(Backend))}; found {backend!r}")
    if backend == "triton" and find_spec("triton") is None:
        raise ConfigError("backend 'triton' needs the package triton, which is not installed; install it or use 'auto'")


def choose(backend: Backend, device: torch.device) -> Backend:
    """Return the back end for a device: "auto" is "triton" on CUDA where it is installed, else "torch".

    Raises: ConfigError: "triton" where it cannot run.
    """
    if backend == "auto":
        return "triton" if device.type == "cuda" and find_spec("triton") is not None else "torch"
    if backend == "triton" and device.type != "cuda" and not _kernels().INTERPRETED:
        raise ConfigError(
            f"backend 'triton' needs a CUDA device; the parameters are on {device}; use 'auto', "
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's slow interpreter"
        )
    return backend


def fusible(moments: Moments, gradient: Gradient) -> bool:
    """Say whether a kernel can take the step: codes contiguous, aligned and of one device."""
    codes = [held.q.codes for held in moments] + [gradient.q.codes]
    return all(
        x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0 and x.device == codes[0].device for x in codes
    ) and all(q.format in _KINDS for q in (*(held.q for held in moments), gradient.q))


def fused_norm(gradients: Iterable[Quantized]) -> Float[Tensor, ""]:
    """Return what `global_norm` returns: float64 sums of squares, one launch for each format of gradients."""
    of_format: dict[tuple[Format, torch.device], list[Quantized]] = {}
    for q in gradients:
        of_format.setdefault((q.format, q.codes.device), []).append(q)
    squares = []
    for (format, device), qs in of_format.items():
        table = _to([[q.codes.data_ptr(), q.scale.data_ptr(), q.codes.numel()] for q in qs], torch.int64, device)
        places = chunks(tuple(q.codes.numel() for q in qs), device)
        out = torch.zeros(len(places), dtype=torch.float64, device=device)
        _launch(_kernels().norm_kernel, len(places), (table, out, places), {"G": _KINDS[format]}, chunked=True)
        squares.append(out.sum())
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


def step_items(items: Sequence[Item], backend: Backend) -> list[Moments]:
    """Take the steps of many parameters: those that kernels can take at once, the others one by one."""
    fused = [backend == "triton" and fusible(item.moments, item.gradient) for item in items]
    fused_step(item for item, is_fused in zip(items, fused, strict=True) if is_fused)
    return [
        item.moments
        if is_fused
        else step_states(
            item.moments, item.gradient, item.hyper, guard=item.guard, factor=item.factor, store=item.store
        )
        for item, is_fused in zip(items, fused, strict=True)
    ]


def fused_step(items: Iterable[Item]) -> None:
    """Take the steps of many parameters; codes, scales and amaxes are all written in place."""
    groups: dict[tuple[object, ...], list[Item]] = {}
    for item in items:
        formats = (*(held.q.format for held in item.moments), item.gradient.q.format)
        key = (item.gradient.q.codes.device, *formats, item.store.scales, item.store.rounding)
        groups.setdefault(key, []).append(item)
    for group in groups.values():
        _step_group(group)


def _step_group(items: Sequence[Item]) -> None:
    """Take the steps of parameters of the same formats, on one device."""
    first, kernels = items[0], _kernels()
    device, store = first.gradient.q.codes.device, first.store
    formats = [held.q.format for held in first.moments] + [first.gradient.q.format]
    digits = [*(_KINDS[format] for format in formats), store.rounding == "stochastic"]
    kinds = {"KINDS": sum(digit * 16**i for i, digit in enumerate(digits))}
    table = _to([_addresses(item) for item in items], torch.int64, device)
    numbers = _to([_numbers(item) for item in items], torch.float32, device)
    keys = _to([[*chain(*noise_keys(item.store.seed))] for item in items], torch.int64, device)
    after = torch.empty(len(items), 3, device=device)
    tops = torch.zeros(len(items), 3, dtype=torch.int32, device=device)
    places = chunks(tuple(item.gradient.q.codes.numel() for item in items), device)
    predict = store.scales == "predictive"
    if not predict:
        _launch(kernels.look_kernel, len(places), (table, numbers, tops, places), kinds, chunked=True)
    _launch(kernels.scales_kernel, len(items), (table, numbers, after, tops), kinds | {"PREDICT": predict})
    _launch(kernels.step_kernel, len(places), (table, numbers, keys, after, tops, places), kinds, chunked=True)
    _launch(kernels.keep_kernel, len(items), (table, after, tops), kinds)
    for item in items:
        for held in item.moments:
            torch.autograd.graph.increment_version(held.q.codes)


@lru_cache(maxsize=64)
def chunks(sizes: tuple[int, ...], device: torch.device) -> Int[Tensor, "C 2"]:
    """Cut tensors into chunks: for each chunk, which tensor it is of and its first element there."""
    counts = torch.tensor([-(-size // _CHUNK) for size in sizes])
    tensors = torch.arange(len(sizes)).repeat_interleave(counts)
    firsts = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
    return torch.stack([tensors, firsts * _CHUNK], 1).to(device)


def _addresses(item: Item) -> list[int]:
    """Return a tensor's row of the table; the tensors themselves stay alive in the item."""
    qs = [*(held.q for held in item.moments), item.gradient.q]
    amaxes = [*(held.amax for held in item.moments), item.gradient.amax]
    tensors = [*(q.codes for q in qs), *(q.scale for q in qs), *amaxes]
    return [*(x.data_ptr() for x in tensors), item.gradient.q.codes.numel()]


def _numbers(item: Item) -> list[float]:
    return [*coefficients(item.hyper, item.guard), item.factor, *bounds_of(item.hyper)]  # type: ignore[list-item]


def _to(rows: list[list[Any]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bring a table to the device without a wait for it."""
    table = torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def _launch(
    kernel: Any, num: int, tensors: Sequence[Tensor], settings: dict[str, Any], *, chunked: bool = False
) -> None:
    """Launch `num` programs on the tensors' device; products and sums stay apart there."""
    if not num:
        return
    if chunked:
        settings = settings | {"CHUNK": _CHUNK, "num_warps": _NUM_WARPS}
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
        kernel[(num,)](*tensors, **settings, enable_fp_fusion=False)


def _kernels() -> Any:
    """Import the kernels, which import Triton, only where they are used."""
    from postgrad.fp8 import kernels

    return kernels
