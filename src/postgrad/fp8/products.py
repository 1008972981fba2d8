"""Products of codes: torch's scaled ones on CUDA; on a CPU the codes' values are multiplied in float32.

Letters: M rows, K inputs, N outputs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from postgrad.fp8.numerics import Quantized, dequantize

ALIGNMENT = 16
"""Rows and columns of a product on CUDA come in multiples of this; others are padded with zeros."""


def padded_size(size: int, multiple: int = ALIGNMENT) -> int:
    """Return the least multiple that is not below the size."""
    return -(-size // multiple) * multiple


def product(
    a: Quantized, b: Quantized, dtype: torch.dtype = torch.float32, *, fast: bool = False
) -> Float[Tensor, "M N"]:
    """Return a b^T of codes [M, K] and [N, K]: in float32 on a CPU, by `scaled_product` on CUDA.

    Args: fast: accumulate less exactly, in fewer bits than float32; a CPU does not know the difference.
    """
    kind = a.codes.device.type
    if kind == "cuda":
        return scaled_product(a, b, dtype, fast=fast)
    with torch.autocast(kind, enabled=False):
        values: Tensor = dequantize(a) @ dequantize(b).T
    # No cast that does nothing: compiling a function of ours, torch 2.11 loses the gradient of what that returns.
    return values if values.dtype == dtype else values.to(dtype)


def scaled_product(
    a: Quantized, b: Quantized, dtype: torch.dtype = torch.float32, *, fast: bool = False
) -> Float[Tensor, "M N"]:
    """Return a b^T by torch's scaled product, which wants a by rows, b^T by columns, K and N multiples of 16."""
    rows, columns = len(a.codes), len(b.codes)
    if not a.codes.numel() or not b.codes.numel():
        return torch.zeros(rows, columns, dtype=dtype, device=a.codes.device)
    left, right = _padded(a.codes, rows), _padded(b.codes, padded_size(columns))
    inverse_a, inverse_b = a.scale.reciprocal(), b.scale.reciprocal()
    values: Tensor = torch._scaled_mm(left, right.T, inverse_a, inverse_b, out_dtype=dtype, use_fast_accum=fast)
    return values if values.shape[1] == columns else values[:, :columns]


def _padded(codes: Tensor, rows: int) -> Tensor:
    """Return codes [M, K], row by row, with zeros up to these rows and a multiple of 16 columns."""
    below, right = rows - codes.shape[0], padded_size(codes.shape[1]) - codes.shape[1]
    if below or right:
        codes = F.pad(codes.view(torch.uint8), (0, right, 0, below)).view(codes.dtype)
    return codes.contiguous()


def turned(q: Quantized) -> Quantized:
    """Return a matrix's transpose."""
    return Quantized(q.codes.T, q.scale, q.format)
