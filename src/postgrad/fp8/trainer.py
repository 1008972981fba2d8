"""FP8 in transformers' Trainer.

    arguments = TrainingArguments(max_grad_norm=0.0, ...)        # the optimizer cuts gradients itself
    settings = {"config": OptimConfig(lr=3e-4), "precision": PrecisionConfig(level="O2")}
    trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(trainer_optimizer, settings))
    trainer.train()
    trainer.save_model()                                          # an ordinary float32 checkpoint

The learning rate's schedule is the Trainer's. One process, or many with the hook of `postgrad.fp8.ddp`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from postgrad.core.config import OptimConfig, PrecisionConfig
from postgrad.errors import ConfigError
from postgrad.fp8.levels import prepare
from postgrad.fp8.numerics import dequantize
from postgrad.fp8.optimizer import Fp8AdamW
from postgrad.fp8.scaled import ScaledTensor


def trainer_optimizer() -> Callable[..., Fp8AdamW]:
    """Return what makes the optimizer of a model: the factory that Trainer's `optimizer_cls_and_kwargs` takes."""
    return prepared_optimizer


def prepared_optimizer(
    model: nn.Module, config: OptimConfig | None = None, precision: PrecisionConfig | None = None
) -> Fp8AdamW:
    """Prepare a model for FP8, in place, and return its optimizer.

    From then on the model's `state_dict` gives values in float32, so that checkpoints are ordinary and load into codes
    again.

    Args:    precision: level O1 or O2, O2 by default, and all else.
    Raises:  ConfigError: level O3, whose steps all ranks have to take together.
    """
    precision = precision or PrecisionConfig(level="O2")
    if precision.level not in ("O1", "O2"):
        raise ConfigError(
            f"in a Trainer the level is O1 or O2; found {precision.level}. O3 is for postgrad's own loop."
        )
    _, optimizer = prepare(model, config, precision.level, precision)
    assert isinstance(optimizer, Fp8AdamW), "O1 and O2 have one optimizer"
    model.register_state_dict_post_hook(_plain)  # type: ignore[no-untyped-call]
    return optimizer


@torch.no_grad()
def _plain(model: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Put values in place of codes."""
    for name, item in state.items():
        if isinstance(item, ScaledTensor):
            state[name] = dequantize(item.quantized)
