"""Bytes a parameter: six for the paper's states, sixteen in full precision."""

import pytest
import torch
from torch import nn

from postgrad.fp8.memory import memory_report
from postgrad.fp8.optimizer import Fp8AdamW


def trained(state):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 600), nn.Linear(600, 700))
    optimizer = Fp8AdamW(model.parameters(), state=state)
    optimizer.store_gradients()
    model(torch.randn(2, 1000)).sum().backward()
    optimizer.step()
    return optimizer


def test_the_papers_states_take_six_bytes_a_parameter():
    coded, plain = memory_report(trained("paper"))
    assert coded.num_elements == 1_020_000 and plain.num_elements == 1300
    each = coded.per_parameter
    assert [each[kind] for kind in ("weight", "gradient", "m", "v")] == [2, 1, 1, 2]
    assert 6 < each["total"] <= 6.01
    assert plain.per_parameter["total"] == pytest.approx(16, abs=0.05)


def test_full_precision_takes_sixteen():
    coded, plain = memory_report(trained("fp32"))
    assert coded.num_elements == 0 and coded.per_parameter["total"] == 0
    assert plain.per_parameter["total"] == pytest.approx(16, abs=0.01)


def test_gradients_are_gone_after_zero_grad():
    optimizer = trained("paper")
    optimizer.zero_grad()
    coded, plain = memory_report(optimizer)
    assert coded.per_parameter["gradient"] == plain.per_parameter["gradient"] == 0
