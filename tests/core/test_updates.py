"""The seam between gradients and weights: full precision through it is a plain AdamW step."""

import torch
from torch import nn

from postgrad.core.config import OptimConfig, PrecisionConfig, TrainConfig
from postgrad.core.optim import make_optimizer
from postgrad.core.precision import updates_of
from postgrad.core.updates import FullUpdates, Updates


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_a_step_is_the_mean_gradient_cut_to_its_norm() -> None:
    config = OptimConfig(lr=0.1, weight_decay=0.2)
    ours, theirs = layer(), layer()
    updates = FullUpdates(list(ours.parameters()), config)
    optimizer = make_optimizer(list(theirs.parameters()), config)
    x = torch.randn(4, 3)
    updates.begin(0)
    ours(x).square().sum().backward()
    updates.reduce()
    norm = float(updates.norm())
    assert updates.step(4.0, norm, 0.5) == {}
    (theirs(x).square().sum() / 4).backward()
    nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
        assert mine.grad is None
    assert not updates.skip() and updates.sections([]) == ()


def test_the_level_chooses(tmp_path: object) -> None:
    from pathlib import Path

    from fp8_training import Small
    from toy_training import toy_job

    from postgrad.fp8.updates import Fp8Updates

    job = toy_job(Path(str(tmp_path)))
    model = Small()
    params = list(model.parameters())
    assert isinstance(updates_of(model, params, TrainConfig(), job), FullUpdates)
    config = TrainConfig(precision=PrecisionConfig(level="O1", min_size=16))
    updates = updates_of(model, params, config, job)
    assert isinstance(updates, Fp8Updates) and isinstance(updates, Updates)
    updates.finish()
    assert all(type(param) is nn.Parameter for param in model.parameters())
