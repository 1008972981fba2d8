"""The optimizer, its learning rate over the run, and one step of it with a clipped mean gradient."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from postgrad.core.config import OptimConfig

Schedule = Literal["cosine", "linear", "constant"]

FUSED_DEVICES = ("cpu", "cuda")


def make_optimizer(params: Sequence[Parameter], config: OptimConfig) -> AdamW:
    """Make torch's AdamW, fused where it can be; only matrices decay, not biases, norms and scales.

    Args:    params: what trains; frozen parameters are passed by.
    """
    trainable = [param for param in params if param.requires_grad]
    matrices = [param for param in trainable if param.ndim >= 2]
    others = [param for param in trainable if param.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=all(param.device.type in FUSED_DEVICES for param in trainable),
    )


def schedule(step: int, total: int, *, kind: Schedule, warmup: float, final: float, stairs: int = 0) -> float:
    """Give the learning rate of a step as a share of the highest.

    It rises in equal parts over the first W = round(warmup * total) steps, (step + 1) / (W + 1), is 1 at step W,
    and falls to `final` at the last step:
        p = (step - W) / (total - 1 - W)
        cosine:  final + (1 - final) * (1 + cos(pi * p)) / 2
        linear:  1 - (1 - final) * p
        constant: 1
    With stairs s, p = s * floor(step / s) / total: the same for s steps, and `final` would come after the last.

    Args:    step: from 0.   total: steps in all.   warmup: share of the steps.   final: last share of the
             highest. Differs: others start at 0 and reach `final` one step after the last; here no step is
             without effect.
    """
    num_warmup = min(round(warmup * total), total - 1)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    progress = (step - num_warmup) / max(1, total - 1 - num_warmup)
    if stairs:
        progress = step // stairs * stairs / total
    match kind:
        case "constant":
            return 1.0
        case "linear":
            return 1 - (1 - final) * progress
        case "cosine":
            return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradients(params: Sequence[Parameter]) -> list[Tensor]:
    """List the gradients there are."""
    return [param.grad for param in params if param.grad is not None]


def global_norm(tensors: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Compute the norm of all tensors taken as one vector."""
    # As torch.nn.utils.get_total_norm, without the sorting by device that takes twice as long as the norm.
    if not tensors:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(list(tensors))]))
    return norm


def scale_gradients(tensors: Sequence[Tensor], *, weight: float, norm: float, clip: float) -> None:
    """Turn gradients of a sum into gradients of the mean, cut to a norm of at most `clip`, in place.

    g <- g / weight * min(1, clip / (norm / weight))

    Args:    weight: what the sum is divided by, > 0.   norm: of the gradients of the sum.   clip: 0 = no cut.
    """
    mean_norm = norm / weight
    factor = clip / mean_norm if 0 < clip < mean_norm else 1.0
    if tensors[0].device.type == "cpu":  # where a tensor is three times as fast as a number
        torch._foreach_mul_(list(tensors), torch.tensor(factor / weight))
    else:
        torch._foreach_mul_(list(tensors), factor / weight)
