"""Products of codes: exact where they must be, the same on every path."""

import pytest
import torch
from torch import Tensor

from postgrad.fp8.numerics import E4M3, E5M2, Format, quantize
from postgrad.fp8.products import padded_size, product, scaled_product


@pytest.mark.parametrize(("size", "padded"), [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_padded_sizes(size: int, padded: int) -> None:
    assert padded_size(size) == padded


@pytest.mark.parametrize("multiply", [product, scaled_product])
@pytest.mark.parametrize("fast", [False, True])
def test_ones_are_exact(multiply: type, fast: bool) -> None:
    a, b = quantize(torch.ones(3, 2), E4M3), quantize(torch.ones(4, 2), E4M3)
    assert torch.equal(multiply(a, b, fast=fast), torch.full((3, 4), 2.0))


@pytest.mark.parametrize(("first", "second"), [(E4M3, E4M3), (E5M2, E4M3)])
@pytest.mark.parametrize("sizes", [(5, 7, 3), (16, 32, 48), (1, 17, 33), (4, 0, 3), (0, 16, 16)])
def test_the_scaled_product_is_the_emulated_one(
    first: Format, second: Format, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, but on torch's slow product for CPUs: operands padded and laid out as CUDA asks for."""
    rows, inner, columns = sizes
    real = torch._scaled_mm

    def strict(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **rest: object) -> Tensor:
        assert a.stride() == (a.shape[1], 1) and b.stride() == (1, b.shape[0])
        assert a.shape[1] % 16 == b.shape[0] % 16 == b.shape[1] % 16 == 0
        assert scale_a.dtype == scale_b.dtype == torch.float32
        result: Tensor = real(a, b, scale_a, scale_b, **rest)  # type: ignore[call-overload]
        return result

    monkeypatch.setattr(torch, "_scaled_mm", strict)
    torch.manual_seed(0)
    a = quantize(torch.randn(inner, rows).T * 3, first)  # by columns, as a transposed operand is
    b = quantize(torch.randn(columns, inner) / 5, second)
    wanted = product(a, b)
    torch.testing.assert_close(scaled_product(a, b), wanted, rtol=1e-5, atol=1e-5)
    assert scaled_product(a, b, torch.bfloat16).dtype == torch.bfloat16
