"""The dtype policy: `runtime.precision` is the forward pass's, `train.precision` that of all else that trains.

Without FP8, parameters, gradients and optimizer stay float32.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module

import torch
from torch import nn
from torch.nn import Parameter

from postgrad.core.config import PrecisionConfig, TrainConfig
from postgrad.core.runtime import Job
from postgrad.core.updates import FullUpdates, Updates
from postgrad.errors import ConfigError

FP8 = "postgrad.fp8.updates"
"""Where FP8 is made; by name, for it builds on this layer."""


def autocast(job: Job) -> AbstractContextManager[object]:
    """Run the forward pass in the job's dtype; with fp32, change nothing.

    The loop enters it around the loss and the evaluation; code that runs a model outside the loop enters it
    itself.
    """
    if job.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(job.device.type, dtype=job.dtype)


def check_precision(precision: PrecisionConfig) -> None:
    """Refuse settings that a level would pass over.

    Raises:  ConfigError: they contradict each other.
    """
    level = precision.level
    for wrong, reason in (
        (precision.min_size < 16, f"min_size must be >= 16, the least of 8-bit products; found {precision.min_size}"),
        (precision.watch_every < 0, f"watch_every must be >= 0; found {precision.watch_every}"),
        (level == "O3" and precision.reduction == "native", "level O3 adds at the owner, in float32: reduction a2a"),
        (level == "O3" and precision.products == "full", "level O3 leaves ranks codes for products: products fp8"),
        (level == "O1" and precision.state != "paper", "level O1 has states of full precision: state paper"),
        (precision.products == "full" and precision.scaling == "delayed", "full products have no scales: scaling jit"),
    ):
        if wrong:
            raise ConfigError(f"train.precision: {reason}.")


def updates_of(model: nn.Module, params: Sequence[Parameter], config: TrainConfig, job: Job) -> Updates:
    """Prepare a model for training at the level asked for; with FP8, its layers and weights change in place.

    Raises:  ConfigError: settings contradict each other.
             ModelError: the device has no 8-bit products, or no layer is large enough for them.
    """
    check_precision(config.precision)
    if config.precision.level == "off":
        return FullUpdates(params, config.optim)
    updates: Updates = import_module(FP8).Fp8Updates(model, config.optim, config.precision, job)
    return updates
