from pathlib import Path
from typing import Any

import pytest
import torch

from postgrad.core.config import PrecisionConfig
from postgrad.core.precision import autocast, check_precision
from postgrad.core.runtime import Job
from postgrad.errors import ConfigError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_in_the_jobs_dtype_and_keeps_fp32(dtype: torch.dtype) -> None:
    job = Job("toy", Path("x"), 0, torch.device("cpu"), dtype, 0, 1, quiet=True)
    linear = torch.nn.Linear(2, 2)
    with autocast(job):
        out = linear(torch.ones(1, 2))
    out.float().sum().backward()
    assert out.dtype == dtype
    assert linear.weight.grad is not None and linear.weight.grad.dtype == linear.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"level": "O2", "min_size": 8}, "min_size must be >= 16"),
        ({"level": "O2", "watch_every": -1}, "watch_every must be >= 0"),
        ({"level": "O3", "reduction": "native"}, "reduction a2a"),
        ({"level": "O3", "products": "full"}, "products fp8"),
        ({"level": "O1", "state": "e4m3_v"}, "state paper"),
        ({"level": "O2", "products": "full", "scaling": "delayed"}, "scaling jit"),
    ],
)
def test_settings_that_would_be_passed_over_are_refused(settings: dict[str, Any], words: str) -> None:
    check_precision(PrecisionConfig())
    with pytest.raises(ConfigError, match=f"train.precision: .*{words}"):
        check_precision(PrecisionConfig(**settings))
