"""The paper's levels of FP8 training behind one call.

    model, optimizer = prepare(model, OptimConfig(lr=3e-4), level="O2")
    loss.backward(); optimizer.step(); optimizer.zero_grad()      # gradients are cut at config.clip
    restore(model, optimizer)                      # an ordinary float32 model again, to save or to go on with

| level | products | gradients | weights of record | m + v  | bytes a parameter         |
| ----- | -------- | --------- | ----------------- | ------ | ------------------------- |
| O1    | FP8      | FP8       | FP16, scaled      | 32, 32 | 11                        |
| O2    | FP8      | FP8       | FP16, scaled      | 8, 16  | 6                         |
| O3    | FP8      | FP8       | FP16 at the owner | 8, 16  | 2 + 5 / N, on N ranks     |

They hold for the weights of linear layers that the filter admits. Embeddings, output layers, norms, biases and frozen
weights keep what they have: float32 and Adam's float32 states where they train. Nothing but the model given changes.

Source:  FP8-LM (arXiv 2310.18313), section 2.
Differs: under O3 the codes that ranks compute with are made of the owner's weight of record, so a step ends in the very
         numbers O2 has; ranks give up nothing for the memory but one gather of a byte a parameter.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from postgrad.core.config import OptimConfig, PrecisionConfig
from postgrad.core.precision import check_precision
from postgrad.errors import ConfigError, ModelError
from postgrad.fp8.linear import LinearConfig, admitted_linears, restore_linears, roll_after, swap_linears
from postgrad.fp8.numerics import E4M3, dequantize
from postgrad.fp8.optimizer import Fp8AdamW
from postgrad.fp8.scaled import ScaledTensor, scaled, unscale_parameter_
from postgrad.fp8.zero import ShardedFp8AdamW

Level = Literal["O1", "O2", "O3"]


def prepare(
    model: nn.Module,
    config: OptimConfig | None = None,
    level: Level = "O2",
    precision: PrecisionConfig | None = None,
    seed: int = 0,
) -> tuple[nn.Module, Fp8AdamW | ShardedFp8AdamW]:
    """Turn a model's linear layers and their weights to FP8, in place, and make the optimizer of all that trains.

    From then on a backward pass leaves codes: `param.grad` of these weights stays None. Many ranks average their
    gradients before a step: O1 and O2 by `averages.average_gradients` or the hook in `ddp`, O3 in the step itself.

    Args:    precision: everything but the level.   seed: of stochastic rounding.
    Raises:  ConfigError: no such level, or settings that cannot be.
             ModelError: no layer is admitted, a device has no 8-bit products, or nothing trains.
    """
    config, precision = config or OptimConfig(), precision or PrecisionConfig()
    if level not in ("O1", "O2", "O3"):
        raise ConfigError(f"level must be O1, O2 or O3; found {level!r}")
    check_precision(replace(precision, level=level))
    groups = _groups(model, _layers(model, precision), config, "O1" if level == "O1" else precision.state)
    groups = [{**group, "seed": seed % 2**31} for group in groups]
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "scales": precision.scales,
        "rounding": precision.rounding,
        "max_norm": config.clip,
    }
    optimizer: Fp8AdamW | ShardedFp8AdamW
    if level == "O3":
        optimizer = ShardedFp8AdamW(groups, **settings)
    else:
        optimizer = Fp8AdamW(groups, **settings)
        optimizer.gradients.attach(coded_parameters(model), E4M3)
    if precision.scaling == "delayed":
        roll_after(optimizer, model)
    return model, optimizer


def restore(model: nn.Module, optimizer: Fp8AdamW | ShardedFp8AdamW) -> None:
    """Make the model ordinary again, in place: float32 weights of record, plain layers; the optimizer is done for.

    With O3, every rank has to call it.
    """
    optimizer.zero_grad()
    optimizer.gradients.detach()
    masters = optimizer.gather_masters() if isinstance(optimizer, ShardedFp8AdamW) else {}
    for param in coded_parameters(model):
        unscale_parameter_(param, dequantize(masters.pop(param, scaled(param).quantized)))
    optimizer.state.clear()
    restore_linears(model)


def coded_parameters(model: nn.Module) -> list[Parameter]:
    """List the parameters that are kept as codes and train, each once."""
    return [param for param in model.parameters() if isinstance(param, ScaledTensor) and param.requires_grad]


def _layers(model: nn.Module, precision: PrecisionConfig) -> list[nn.Module]:
    """List the layers whose weights become codes, made to multiply in 8 bits unless products stay full."""
    config = _linear_config(precision)
    if precision.products == "full":
        return list(admitted_linears(model, config).values())
    return [model.get_submodule(name) for name in swap_linears(model, config)]


def _linear_config(precision: PrecisionConfig) -> LinearConfig:
    return LinearConfig(scaling=precision.scaling, min_inputs=precision.min_size, min_outputs=precision.min_size)


def _groups(model: nn.Module, layers: list[nn.Module], config: OptimConfig, state: str) -> list[dict[str, Any]]:
    """Sort what trains into weights to code, other matrices, and vectors, which do not decay."""
    weights = [module.weight for module in layers if isinstance(module, nn.Linear | Conv1D)]
    coded = list(dict.fromkeys(weight for weight in weights if weight.requires_grad))
    known = set(coded)
    others = [param for param in model.parameters() if param.requires_grad and param not in known]
    if not coded and not others:
        raise ModelError(f"{type(model).__name__} has no parameter that trains: all are frozen.")
    wrong = [param.dtype for param in (*coded, *others) if param.dtype != torch.float32]
    if wrong:
        raise ModelError(f"weights that train must be float32 before they become codes; found {wrong[0]}")
    matrices = [param for param in others if param.ndim >= 2]
    vectors = [param for param in others if param.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": coded, "weight_decay": config.weight_decay, "state": state},
        {"params": matrices, "weight_decay": config.weight_decay, "state": "fp32"},
        {"params": vectors, "weight_decay": 0.0, "state": "fp32"},
    ]
    return [group for group in groups if group["params"]]
