"""What rounding to few bits loses, tensor by tensor, every so many steps: underflow, saturation, signal to noise.

Measured are a layer's input x and weight w (E4M3), the gradient dy of its output (E5M2), and of the weight the gradient
g as it is made, and master, m and v as the step is about to store them. Where a step has micro-batches, x, w, dy and g
are those of the first. Steps that are not measured cost nothing.

Source:  FP8-LM (arXiv 2310.18313), figure 7, shows underflow, overflow and SNR of gradients.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from postgrad.core.report import TENSORS
from postgrad.core.sections import Plot, Section, Series, Table
from postgrad.fp8.adam import adam as adam_step
from postgrad.fp8.adam import coefficients, hyper_of, needs_scale, predicted_scales, stored_amax
from postgrad.fp8.averages import value_of
from postgrad.fp8.linear import Fp8Conv1D, Fp8Linear
from postgrad.fp8.numerics import (
    E4M3,
    E5M2,
    Quantized,
    dequantize,
    quantize,
    share_saturated,
    share_underflown,
    snr_db,
)
from postgrad.fp8.optimizer import Fp8AdamW, formats_of
from postgrad.fp8.scaled import ScaledTensor

BITS = {"8 bits": ("x", "w", "dy", "g", "m"), "16 bits": ("master", "v")}
KINDS = tuple(kind for kinds in BITS.values() for kind in kinds)
FIGURES = ("underflow", "saturation", "snr_db")
TITLES = {
    "snr_db": "Signal to noise, dB",
    "underflow": "Underflow, share of a tensor",
    "saturation": "Saturation, share of a tensor",
}
NUM_WORST = 12

Figures = dict[str, dict[str, dict[str, float]]]
"""kind -> name of the layer -> figure -> number; infinity, where nothing was lost, is left out."""


class Watch:
    """Measures the layers of a model that multiply in 8 bits, or whose weights are codes."""

    def __init__(self, model: nn.Module, every: int) -> None:
        """Prepare for measurements every so many steps; 0 = none."""
        self._every, self._due = every, False
        self._found: dict[tuple[str, str], Tensor] = {}
        self._handles: list[RemovableHandle] = []
        linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
        self.layers = {name: module for name, module in linears if _is_watched(module)}

    def begin(self, step: int) -> None:
        """Prepare for a step, numbered from 0: measure in its passes if it is due."""
        self._due = self._every > 0 and (step + 1) % self._every == 0
        self._found.clear()
        if self._due:
            for name, layer in self.layers.items():
                self._hook(name, layer)

    def end(self, optimizer: Fp8AdamW, masters: Mapping[Tensor, Tensor], factor: float) -> Figures:
        """Measure what a step is about to store, and return all figures; call it before the step.

        Args: masters: the optimizer's parameter of each weight.   factor: times the gradients, as in the step.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if not self._due:
            return {}
        for name, layer in self.layers.items():
            param = masters.get(layer.weight)
            if param is not None:
                for kind, (value, q) in _next(optimizer, param, factor).items():
                    self._note(kind, name, value, q)
        keys = list(self._found)
        rows = torch.stack([self._found[key].float().cpu() for key in keys]).tolist() if keys else []
        self._found.clear()
        figures: Figures = {}
        for (kind, name), row in zip(keys, rows, strict=True):
            found = {figure: number for figure, number in zip(FIGURES, row, strict=True) if math.isfinite(number)}
            figures.setdefault(kind, {})[name] = found
        return {kind: figures[kind] for kind in KINDS if kind in figures}

    def _hook(self, name: str, layer: nn.Linear | Conv1D) -> None:
        """Look at a layer's tensors as they pass."""

        def accumulate(gradient: Tensor) -> None:
            if ("g", name) not in self._found:
                self._note("g", name, gradient, quantize(gradient, E4M3))

        if layer.weight.requires_grad:
            self._handles.append(layer.weight.register_hook(accumulate))
        if isinstance(layer, Fp8Linear | Fp8Conv1D):
            self._hook_product(name, layer)

    def _hook_product(self, name: str, layer: Fp8Linear | Fp8Conv1D) -> None:
        """Look at what a layer multiplies."""

        def forward(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if ("x", name) in self._found:
                return
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            self._note("x", name, x, quantize(x, E4M3, layer.product.scale_of(x, E4M3)))
            weight = layer.weight.detach()
            if not (isinstance(weight, ScaledTensor) and weight.format == E4M3):
                self._note("w", name, weight, quantize(weight, E4M3))
            if output.requires_grad:
                output.register_hook(backward)  # type: ignore[no-untyped-call]

        def backward(gradient: Tensor) -> None:
            if ("dy", name) not in self._found:
                dy = gradient.detach().reshape(-1, gradient.shape[-1])
                self._note("dy", name, dy, quantize(dy, E5M2, layer.product.scale_of(dy, E5M2)))

        self._handles.append(layer.register_forward_hook(forward))

    def _note(self, kind: str, name: str, x: Tensor, q: Quantized) -> None:
        """Measure one tensor; nothing is waited for."""
        with torch.no_grad():
            value = x.float()
            self._found[kind, name] = torch.stack([share_underflown(value, q), share_saturated(q), snr_db(value, q)])


def _is_watched(layer: nn.Linear | Conv1D) -> bool:
    return isinstance(layer, Fp8Linear | Fp8Conv1D) or isinstance(layer.weight, ScaledTensor)


def watch_sections(rows: Sequence[Mapping[str, object]]) -> tuple[Section, ...]:
    """Plot the median tensor of each kind and the range over tensors, and list the noisiest of the last measurement."""
    measured = [row for row in rows if TENSORS in row]
    if not measured:
        return ()
    plots = [_plot(figure, bits, measured) for figure in TITLES for bits in BITS]
    return (*(plot for plot in plots if plot.series), _worst(measured[-1]))


def _plot(figure: str, bits: str, rows: Sequence[Mapping[str, Any]]) -> Plot:
    series = []
    for kind in BITS[bits]:
        points: list[tuple[float, list[float]]] = []
        for row in rows:
            numbers = sorted(found[figure] for found in row[TENSORS].get(kind, {}).values() if figure in found)
            if numbers:
                points.append((float(row["step"]), numbers))
        if points:
            steps = tuple(step for step, _ in points)
            middle = tuple(numbers[len(numbers) // 2] for _, numbers in points)
            low, high = (tuple(numbers[end] for _, numbers in points) for end in (0, -1))
            series.append(Series(name=kind, x=steps, y=middle, low=low, high=high))
    return Plot(
        f"{TITLES[figure]}: {bits}",
        "step",
        "",
        tuple(series),
        note="The line is the median tensor, the band all tensors.",
    )


def _worst(row: Mapping[str, Any]) -> Table:
    found = [(kind, name, numbers) for kind, names in row[TENSORS].items() for name, numbers in names.items()]
    found.sort(key=lambda item: item[2].get("snr_db", math.inf))
    cells = tuple(
        (kind, name, numbers.get("snr_db", math.inf), 100 * numbers["underflow"], 100 * numbers["saturation"])
        for kind, name, numbers in found[:NUM_WORST]
    )
    columns = ("tensor", "layer", "SNR, dB", "underflow, %", "saturated, %")
    return Table(f"Noisiest tensors at step {row['step']}", columns, cells)


def _next(optimizer: Fp8AdamW, param: Tensor, factor: float) -> dict[str, tuple[Tensor, Quantized]]:
    """Return what a step is about to store of a parameter: exact values, and as they will be rounded to nearest."""
    gradient = optimizer.gradients.of(param)
    group = next(group for group in optimizer.param_groups if any(param is own for own in group["params"]))
    if gradient is None:
        return {}
    before, hyper = optimizer.moments_of(param, group), hyper_of(group, optimizer.step_of(param) + 1)
    g: Float[Tensor, "*shape"] = value_of(gradient, param) * factor
    guard = formats_of(param, group).guard
    w, m, v = (dequantize(held.q) for held in before)
    values = adam_step(w, m, v, g, coefficients(hyper, guard))
    scales: Sequence[Tensor | None] = (None, None, None)
    if group["scales"] == "predictive":
        scales = predicted_scales(before, stored_amax(gradient) * factor, hyper)
    return {
        kind: (value, quantize(value, held.q.format, scale))
        for kind, value, held, scale in zip(("master", "m", "v"), values, before, scales, strict=True)
        if needs_scale(held.q.format)
    }
