"""Numbers that formulas take: in single precision at least, and roots that have a gradient at 0."""

import torch
from jaxtyping import Float
from torch import Tensor


def full(values: Tensor) -> Tensor:
    """Bring half precision to float32; leave float32 and float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def root(squares: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Take the square root; its gradient at 0 is 0, where it would be infinite.

    torch's vector_norm has that gradient too, but adds up less exactly on a CPU.
    """
    zero = squares == 0
    return squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
