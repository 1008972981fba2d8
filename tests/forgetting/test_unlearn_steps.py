"""The steps of unlearning: the gradient of the objective, however a step is split; bounds; blocks that are let go."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from texts import PACKING, TRAIN, job, prepared
from torch import Tensor, nn

from postgrad.core.layer_adapters import activate, initialise, inject, pairs
from postgrad.core.loop import ENOUGH
from postgrad.errors import GateError
from postgrad.forgetting.text_batches import Phase, both_batches
from postgrad.forgetting.text_losses import TextObjectiveConfig
from postgrad.forgetting.text_measures import measure
from postgrad.forgetting.unlearn_steps import Task, Watch, _let_go, prepare, step_loss

SPARSE = Phase("sparse", 15, True)


def stirred(task: Task) -> Task:
    """Give the adapter a B that is not 0."""
    for number, (_, b) in enumerate(pairs(task.place.model, task.place.name).values()):
        torch.nn.init.normal_(b, std=0.05, generator=torch.Generator().manual_seed(number))
    return task


def gradients(task: Task, micro_tokens: int, folder: Path) -> tuple[list[Tensor], float]:
    """Add a step's micro-batches up as the loop does."""
    task.place.model.zero_grad()
    train = replace(TRAIN, micro_tokens=micro_tokens)
    both = task.trees.retain, task.taught
    batches = both_batches(both, task.settings.objective.kept, train, PACKING, job(folder), SPARSE)
    losses = [step_loss(task, SPARSE)(part, 0) for part in batches[0]]
    for loss in losses:
        loss.sum.backward()
    assert sum(loss.weight for loss in losses) == pytest.approx(1)
    matrices = [matrix for pair in pairs(task.place.model, task.place.name).values() for matrix in pair]
    return [matrix.grad.clone() for matrix in matrices], sum(loss.sum.item() for loss in losses)


@pytest.mark.parametrize(
    "objective",
    [
        TextObjectiveConfig(kind="bounded", bound=9.0),
        TextObjectiveConfig(kind="npo", kl=0.5),
        TextObjectiveConfig(kind="idk"),
        TextObjectiveConfig(),
    ],
    ids=lambda objective: objective.kind,
)
def test_no_split_of_a_step_changes_it(tmp_path: Path, objective: TextObjectiveConfig) -> None:
    task = stirred(prepared(tmp_path, objective))
    whole, value = gradients(task, 10_000, tmp_path)
    split, again = gradients(task, 100, tmp_path)
    assert again == pytest.approx(value, rel=1e-5)
    for ours, theirs in zip(split, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    named = task.place.model.named_parameters()
    assert all(parameter.grad is None for name, parameter in named if "lora" not in name)


def test_the_objective_is_what_it_says(tmp_path: Path) -> None:
    """A step over all rows equals the formula computed from whole measurements."""
    objective = TextObjectiveConfig(kind="bounded", alpha=0.1, bound=9.0, beta=0.7, kept=3)
    task = stirred(prepared(tmp_path, objective))  # 8 rows to forget with 24 to keep: all of them
    _, value = gradients(task, 10_000, tmp_path)
    own = pairs(task.place.model, task.place.name)
    gone, kept = (task.see(part, job(tmp_path)) for part in (task.trees.forget, task.trees.retain))
    norms = sum(
        math.sqrt(sum(float(m.detach().square().sum()) for layer in block.linears for m in own[layer]))
        for block in task.blocks
    )
    expected = kept.loss + 0.7 * float((9.0 - gone.means).clamp(min=0).mean()) + 0.1 * norms
    assert value == pytest.approx(expected, rel=1e-4)


def test_bounds(tmp_path: Path) -> None:
    """As rows never seen; where none is known, the logarithm of the vocabulary; or the number given."""
    task = prepared(tmp_path, TextObjectiveConfig())
    order = task.before["forget"].losses.argsort(stable=True)
    assert (task.bounds[order].diff() >= 0).all() and task.settings.objective.kind == "matched"
    alone = prepared(tmp_path, TextObjectiveConfig(), held_out=False)
    assert alone.settings.objective.kind == "bounded" and float(alone.bounds[0]) == pytest.approx(math.log(261))
    assert float(prepared(tmp_path, TextObjectiveConfig(kind="npo", bound=3.0)).bounds[0]) == 3


def test_earlier_adapters_stay_as_they_are(tmp_path: Path) -> None:
    """They are computed with, before and while a request is unlearnt, and get no gradient."""
    task = prepared(tmp_path, TextObjectiveConfig(kl=0.5))
    model = task.place.model
    was = measure(model, task.trees.forget, PACKING, job(tmp_path))
    layer = task.blocks[0].linears[0]
    inject(model, "request-old", [layer], rank=2, alpha=8.0)
    initialise(model, "request-old", seed=0)
    torch.nn.init.normal_(pairs(model, "request-old")[layer][1], generator=torch.Generator().manual_seed(0))
    activate(model, ["request-old"])
    now = measure(model, task.trees.forget, PACKING, job(tmp_path))
    assert not torch.allclose(now.losses, was.losses)
    place = task.place._replace(earlier=("request-old",))
    again = stirred(prepare(place, task.trees, task.before, task.settings, 0))
    gradients(again, 10_000, tmp_path)
    assert all(matrix.grad is None for matrix in pairs(model, "request-old")[layer])
    activate(model, ["request-old"])
    assert torch.equal(measure(model, task.trees.forget, PACKING, job(tmp_path)).losses, now.losses)


def test_blocks_near_zero_are_let_go(tmp_path: Path) -> None:
    """A block below the threshold loses its pairs, its layers are the base's; when all are, the run is refused."""
    task = prepared(tmp_path, TextObjectiveConfig())
    model = task.place.model
    with torch.no_grad():
        for layer in task.blocks[0].linears:
            for matrix in pairs(model, task.place.name)[layer]:
                matrix.mul_(1e-4)
    norms = _let_go(task)
    assert norms[task.blocks[0].name] == 0 < norms[task.blocks[1].name]
    assert set(pairs(model, task.place.name)) == set(task.blocks[1].linears)
    assert all(isinstance(model.get_submodule(layer), nn.Linear) for layer in task.blocks[0].linears)
    with torch.no_grad():
        for pair in pairs(model, task.place.name).values():
            for matrix in pair:
                matrix.zero_()
    with pytest.raises(GateError, match=r"every block's group ended below 0\.05"):
        _let_go(task)


@pytest.mark.parametrize(("bound", "enough"), [(1e-3, 1.0), (99.0, 0.0)])
def test_training_stops_when_all_is_forgotten(tmp_path: Path, bound: float, enough: float) -> None:
    task = prepared(tmp_path, TextObjectiveConfig(kind="bounded", bound=bound))
    figures = Watch(task, job(tmp_path))(1)
    assert figures[ENOUGH] == figures["forgotten"] == enough and figures["blocks"] == 2
    assert 0 <= figures["mia_auc"] <= 1 and figures["retain_loss"] > 0
