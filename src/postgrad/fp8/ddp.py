"""FP8 gradients in DistributedDataParallel: a communication hook.

    ddp = DistributedDataParallel(model)
    state = HookState(model.parameters())
    ddp.register_comm_hook(state, fp8_hook)

Each bucket goes through `reduction.all_reduce`; the gradients that come back are FP8 values in the dtype of the model's
gradients, the same bits on every rank. A gradient that is not finite on one rank is NaN on all, so that guards of the
loop fire everywhere. On a GPU the hook works on a stream of its own, beside the backward pass.

Source:  FP8-LM (arXiv 2310.18313), section 2.1.
Differs: a setting of DistributedDataParallel as PyTorch has it: nothing is patched or replaced.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from postgrad.fp8.collectives import Wire, place
from postgrad.fp8.numerics import dequantize
from postgrad.fp8.reduction import Mode, all_reduce
from postgrad.fp8.scaling_factor import ScalingFactor, ScalingFactorConfig


class HookState:
    """What the hook needs from step to step.

    `wire` counts the bytes this rank has sent. `factor` is the mu of mode "native", by the order of the parameters:
    save its `state_dict()` with a checkpoint; it is None in mode "a2a", which keeps no state.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        *,
        mode: Mode = "a2a",
        group: dist.ProcessGroup | None = None,
        config: ScalingFactorConfig | None = None,
    ) -> None:
        """Prepare for these parameters, given in the same order on every rank; mu starts at 1 / sqrt(N)."""
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.mode, self.group, self.wire = mode, group, Wire()
        self.places = {parameter: i for i, parameter in enumerate(parameters)}
        self.factor: ScalingFactor | None = None
        self.stream: torch.cuda.Stream | None = None
        device = parameters[0].device if parameters else torch.device("cpu")
        if mode == "native":
            start = -math.log2(place(group)[1]) / 2
            self.factor = ScalingFactor(len(parameters), config=config, start=start, device=device)
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def fp8_hook(state: HookState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Average a bucket of gradients over the ranks in FP8, in place.

    Every rank's buckets come in the same order, as DistributedDataParallel sees to.
    """
    buffer = bucket.buffer()
    if state.stream is None:
        _average(state, bucket)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done
    state.stream.wait_stream(torch.cuda.current_stream(buffer.device))
    buffer.record_stream(state.stream)
    with torch.cuda.stream(state.stream):
        _average(state, bucket)
        done = torch.futures.Future(devices=[buffer.device])
        done.set_result(buffer)  # whoever waits for it waits for what this stream has been given so far
    return done


def _average(state: HookState, bucket: dist.GradBucket) -> None:  # type: ignore[name-defined]
    """Reduce the bucket's gradients and write the values over them."""
    gradients = bucket.gradients()
    places = None if state.factor is None else [state.places[parameter] for parameter in bucket.parameters()]
    means = all_reduce(
        gradients, mode=state.mode, factor=state.factor, places=places, group=state.group, wire=state.wire
    )
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(dequantize(mean))
