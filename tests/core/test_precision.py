from pathlib import Path

import pytest
import torch

from postgrad.core.precision import autocast
from postgrad.core.runtime import Job


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_in_the_jobs_dtype_and_keeps_fp32(dtype: torch.dtype) -> None:
    job = Job("toy", Path("x"), 0, torch.device("cpu"), dtype, 0, 1, quiet=True)
    linear = torch.nn.Linear(2, 2)
    with autocast(job):
        out = linear(torch.ones(1, 2))
    out.float().sum().backward()
    assert out.dtype == dtype
    assert linear.weight.grad is not None and linear.weight.grad.dtype == linear.weight.dtype == torch.float32
