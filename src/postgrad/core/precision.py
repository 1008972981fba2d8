"""The dtype policy: parameters, gradients and optimizer stay fp32; `precision` is the forward pass's."""

from contextlib import AbstractContextManager, nullcontext

import torch

from postgrad.core.runtime import Job


def autocast(job: Job) -> AbstractContextManager[object]:
    """Run the forward pass in the job's dtype; with fp32, change nothing.

    The loop enters it around the loss and the evaluation; code that runs a model outside the loop enters it
    itself.
    """
    if job.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(job.device.type, dtype=job.dtype)
