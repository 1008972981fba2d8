from pathlib import Path

import pytest
import torch
from torch import Tensor

from postgrad.core.optim import global_norm, scale_gradients
from postgrad.core.runtime import Job
from postgrad.core.tally import Loss, Tally, means, total_up


def job(device: str = "cpu") -> Job:
    return Job("toy", Path("x"), 0, torch.device(device), torch.float32, 0, 1, quiet=True)


def add_up(device: str) -> Tally:
    """Two micro-batches; the second does not measure b, and c counts nothing."""
    tally = Tally()
    number = torch.tensor(6.0, device=device, requires_grad=True)
    tally.add(Loss(number * 1, 2.0, {"a": (number / 2, 1.0), "b": (5.0, 2.0)}, num_tokens=7))
    tally.add(Loss(number * 2, 4.0, {"a": (torch.tensor(4), 3.0), "c": (0.0, 0.0)}, num_tokens=1))
    total_up(tally, torch.tensor(0.5, device=device), [], job(device))
    return tally


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sums_and_weights_are_added_then_divided(device: str) -> None:
    tally = add_up(device)
    assert tally.sums == {"loss": [18.0, 6.0], "a": [7.0, 4.0], "b": [5.0, 2.0], "c": [0.0, 0.0]}
    assert (tally.tokens, tally.norm, tally.stop, tally.error) == (8, 0.5, False, None)
    assert means(tally.sums) == {"loss": 3.0, "a": 1.75, "b": 2.5}


def test_no_graph_is_kept() -> None:
    tally = Tally()
    number = torch.tensor(6.0, requires_grad=True)
    tally.add(Loss(number * 1, 2.0, {"a": (number / 2, 1.0)}))
    assert not any(value.requires_grad for _, value, _ in tally.entries if isinstance(value, Tensor))


def test_a_metric_may_not_hide_the_loss() -> None:
    with pytest.raises(AssertionError, match="may not be called 'loss'"):
        Tally().add(Loss(torch.zeros(()), 1.0, {"loss": (1.0, 1.0)}))


@pytest.mark.gpu
def test_gradients_on_a_gpu_are_cut() -> None:
    gradients = [torch.tensor([6.0], device="cuda"), torch.tensor([[8.0]], device="cuda")]
    scale_gradients(gradients, weight=2.0, norm=global_norm(gradients).item(), clip=2.5)
    assert [gradient.item() for gradient in gradients] == [1.5, 2.0]
