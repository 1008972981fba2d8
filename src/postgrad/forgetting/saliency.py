"""Which weights a request is about: selective synaptic dampening, and the mask of saliency unlearning.

Formula: dampening    theta_i <- theta_i min(1, lambda I_i / F_i) where F_i > alpha I_i
         saliency     m_i = 1 for the share of weights with the largest |sum over batches of d CE(x_f) / d theta_i|
         with I the mean square of gradients on retained images and F that on those to forget.
Source:  SSD (Foster et al., arXiv 2308.07707) and its released code; SalUn (Fan et al., arXiv 2310.12508) and its.
Differs: SSD takes I over all images, those to forget included: `whole`. If these are a share s of all, F / I is at most
         1 / s, and alpha >= 1 / s changes nothing; that is so where a fifth is forgotten and alpha is 5. For small s
         both choices agree. One commit of SalUn's code keeps the weights with the smallest gradients, and steps while
         it adds them up; the paper and other commits take the largest at fixed weights, and so does this. SalUn trains
         with SGD.

Letters: P parameters.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Parameter

from postgrad.errors import ConfigError


def dampened(
    value: Float[Tensor, "*P"],
    importance: Float[Tensor, "*P"],
    forget_importance: Float[Tensor, "*P"],
    *,
    alpha: float,
    strength: float,
) -> Float[Tensor, "*P"]:
    """Shrink the weights that matter far more to what is forgotten than to the rest.

    Args: importance: on other images.   alpha: how much more it takes to be chosen.
          strength: lambda; smaller shrinks more. No weight grows.
    """
    chosen = forget_importance > alpha * importance
    share = (strength * importance / forget_importance.masked_fill(~chosen, 1.0)).clamp(max=1.0)
    return torch.where(chosen, value * share, value)


def saliency_masks(gradients: Mapping[str, Tensor], share: float) -> dict[str, Bool[Tensor, "*P"]]:
    """Mark the given share of all weights: those with the largest gradients by size, earlier ones first among equals.

    Raises: ConfigError: the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"salun.share: expected a share of the weights above 0, at most 1, found {share}.")
    flat = torch.cat([gradient.abs().flatten() for gradient in gradients.values()])
    num = max(1, round(share * len(flat)))
    least = flat.kthvalue(len(flat) - num + 1).values  # the num-th largest
    marked = flat > least
    equal = (flat == least).nonzero().flatten()
    marked[equal[: num - int(marked.sum())]] = True
    parts = torch.split(marked, [gradient.numel() for gradient in gradients.values()])
    return {name: part.view_as(gradients[name]) for name, part in zip(gradients, parts, strict=True)}


@contextmanager
def restricted(parameters: Mapping[str, Parameter], masks: Mapping[str, Bool[Tensor, "*P"]]) -> Iterator[None]:
    """Let gradients reach only the marked weights within the block.

    AdamW leaves a weight alone whose gradient was always 0, unless weight decay shrinks it.
    """
    handles = [parameters[name].register_hook(_times(mask)) for name, mask in masks.items()]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _times:
    """A hook on a tensor that keeps the marked part of its gradient."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self._mask
