"""The dtype policy: `runtime.precision` is the forward pass's, `train.precision` that of all else that trains.

Without FP8, parameters, gradients and optimizer stay float32.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module

import torch
from torch import nn
from torch.nn import Parameter

from postgrad.core.config import TrainConfig
from postgrad.core.runtime import Job
from postgrad.core.updates import FullUpdates, Updates

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


def updates_of(model: nn.Module, params: Sequence[Parameter], config: TrainConfig, job: Job) -> Updates:
    """Prepare a model for training at the level asked for; with FP8, its layers and weights change in place.

    Raises:  ModelError: the device has no 8-bit products, or no layer is large enough for them.
    """
    if config.precision.level == "off":
        return FullUpdates(params, config.optim)
    updates: Updates = import_module(FP8).Fp8Updates(model, config.optim, config.precision, job)
    return updates
