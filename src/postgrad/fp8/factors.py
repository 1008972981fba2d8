"""State of FP8 training that is neither weight nor moment, kept where checkpoints look: in the optimizer's state.

mu of summed gradients is an exponent a tensor, `mu`; a window of delayed scaling belongs to a layer, so to its weight:
`window`, the amaxes, and `window_filled`, how many steps of x and dy are in it. A state that is loaded leaves them with
the parameters, until they are taken up.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from postgrad.errors import ArtefactError
from postgrad.fp8.linear import Fp8Conv1D, Fp8Linear
from postgrad.fp8.scaling_factor import ScalingFactor

Windowed = Fp8Linear | Fp8Conv1D
MU, WINDOW, FILLED = "mu", "window", "window_filled"


def keep_factor(optimizer: Optimizer, params: Sequence[Tensor], factor: ScalingFactor) -> None:
    """Write the factors of parameters into every state that the optimizer gives."""

    def write(_: Optimizer, state: dict[str, Any]) -> None:
        indices = _indices(optimizer)
        for param, k in zip(params, factor.k.unbind(), strict=True):
            _entries(state, indices[param])[MU] = k

    optimizer.register_state_dict_post_hook(write)


def resume_factor(optimizer: Optimizer, params: Sequence[Tensor], factor: ScalingFactor) -> None:
    """Go on with the factors of a state that was loaded since the last call, if any."""
    found = [k for param in params if (k := optimizer.state[param].pop(MU, None)) is not None]
    if len(found) == len(params) and found:
        factor.load_state_dict({"k": torch.stack(found)})
    elif found:
        raise ArtefactError(f"the state has factors mu of {len(found)} weights where {len(params)} are reduced")


def keep_windows(optimizer: Optimizer, layers: Sequence[Windowed]) -> None:
    """Write the windows of delayed scaling into every state that the optimizer gives."""

    def write(_: Optimizer, state: dict[str, Any]) -> None:
        indices = _indices(optimizer)
        for layer in layers:
            if layer.weight in indices and layer.product.amaxes is not None:
                entries = _entries(state, indices[layer.weight])
                entries |= {WINDOW: layer.product.amaxes.clone(), FILLED: list(layer.product.filled)}

    optimizer.register_state_dict_post_hook(write)


def resume_windows(optimizer: Optimizer, layers: Sequence[Windowed]) -> None:
    """Go on with the windows of a state that was loaded since the last call, if any."""
    for layer in layers:
        entries = optimizer.state.get(layer.weight, {})
        window, filled = entries.pop(WINDOW, None), entries.pop(FILLED, None)
        if window is None or filled is None:
            continue
        amaxes = layer.product.amaxes
        if amaxes is None or amaxes.shape != window.shape:
            raise ArtefactError("the state has windows of delayed scaling of another length than this model's layers")
        amaxes.copy_(window)
        layer.product.resume(filled)


def windowed(model: nn.Module) -> list[Windowed]:
    """List the layers that keep windows."""
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear | Fp8Conv1D)]
    return [layer for layer in layers if layer.product.amaxes is not None]


def _entries(state: dict[str, Any], index: int) -> dict[str, Any]:
    """Return a parameter's entries in a state, to add to: not those of the optimizer itself."""
    state["state"][index] = entries = dict(state["state"].get(index, {}))
    return entries


def _indices(optimizer: Optimizer) -> dict[Tensor, int]:
    """Number the optimizer's parameters, as its state does."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {param: i for i, param in enumerate(params)}
