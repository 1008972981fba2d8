import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_training
from torch import Tensor, nn
from toy_training import CONFIG, STEPS, Toy, ToyBatches, toy_evaluate, toy_job, toy_loss, train_toy

from postgrad.core.config import OptimConfig, TrainConfig
from postgrad.core.loop import ENOUGH, Loss, LossFunction, train
from postgrad.core.optim import make_optimizer, schedule
from postgrad.core.report import read_metrics
from postgrad.errors import ArtefactError, ConfigError, DataError, Diverged, Interrupted


def trained(folder: Path) -> dict[str, bytes]:
    """Everything a run leaves that must not depend on how it was run."""
    files = [folder / "metrics.jsonl", *sorted((folder / "checkpoints").rglob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nothing disturbs leaves."""
    folder = tmp_path_factory.mktemp("straight")
    train_toy(folder)
    return trained(folder)


def with_signal(model: nn.Module, at: int) -> LossFunction:
    def loss_fn(batch: Tensor, step: int) -> Loss:
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy_loss(model)(batch, step)

    return loss_fn


def test_equals_a_plain_loop(tmp_path: Path) -> None:
    config = replace(CONFIG, optim=OptimConfig(lr=0.05, weight_decay=0.1, clip=0.5, warmup=0.3))
    ours, theirs = Toy().eval(), Toy().eval()
    ours.drop.p = theirs.drop.p = 0.0
    train(ours, ToyBatches(micro=3), toy_loss(ours), None, config, toy_job(tmp_path))
    optimizer = make_optimizer(list(theirs.parameters()), config.optim)
    for step in range(STEPS):
        (batch,) = ToyBatches()[step]
        (theirs(batch) - batch.sum(1)).square().mean().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        factor = schedule(step, STEPS, kind="cosine", warmup=0.3, final=0.1)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * factor
        optimizer.step()
        optimizer.zero_grad()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, msg=lambda text, name=name: f"{name}: {text}")


def test_micro_batches_do_not_matter(tmp_path: Path) -> None:
    models = []
    for micro in (8, 1):
        model = Toy()
        model.drop.p = 0.0
        train_toy(tmp_path / str(micro), model, ToyBatches(micro=micro))
        models.append(model)
    for one, eight in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, eight)
    rows = zip(read_metrics(tmp_path / "8"), read_metrics(tmp_path / "1"), strict=True)
    for one_row, eight_row in rows:
        assert one_row == pytest.approx(eight_row, rel=1e-5)


def test_logs_means_since_the_last_row_and_no_times(tmp_path: Path) -> None:
    per_step = tmp_path / "each"
    train_toy(per_step, config=replace(CONFIG, log_every=1))
    train_toy(tmp_path / "thirds")
    each = [row for row in read_metrics(per_step) if "loss" in row]
    thirds = [row for row in read_metrics(tmp_path / "thirds") if "loss" in row]
    assert [row["step"] for row in thirds] == [3, 6, 7]
    assert thirds[0]["loss"] == pytest.approx(sum(row["loss"] for row in each[:3]) / 3)
    assert list(thirds[0]) == ["step", "loss", "distance", "lr", "grad_norm", "tokens"]
    assert thirds[-1] == each[-1] and thirds[-1]["tokens"] == 7 * 8 * 3
    evaluated = [row for row in read_metrics(per_step) if "eval/error" in row]
    assert [row["step"] for row in evaluated] == [4, 7]
    timing = read_metrics(tmp_path / "thirds", "timing.jsonl")
    assert [list(row) for row in timing] == [["step", "seconds", "tokens_per_second", "peak_memory_gib"]] * 3
    assert sorted(path.name for path in (per_step / "checkpoints").iterdir()) == ["step-00000006", "step-00000007"]


def test_report_holds_the_last_evaluation(tmp_path: Path) -> None:
    model = Toy()
    report = train_toy(tmp_path, model)
    assert report.results == {"error": toy_evaluate(model)(7)["error"], "at": 7.0}
    assert not model.training and report.method == "toy" and report.folder == tmp_path


def test_without_evaluation_the_report_holds_the_loss(tmp_path: Path) -> None:
    model = Toy()
    report = train(model, ToyBatches(), toy_loss(model), None, CONFIG, toy_job(tmp_path))
    assert report.results == {"loss": read_metrics(tmp_path)[-1]["loss"]}


def test_evaluates_without_gradients_and_dropout(tmp_path: Path) -> None:
    model, seen = Toy(), []

    def evaluate(step: int) -> dict[str, float]:
        seen.append((model.training, torch.is_grad_enabled()))
        return {}

    train(model, ToyBatches(), toy_loss(model), evaluate, CONFIG, toy_job(tmp_path))
    assert seen == [(False, False)] * 2


@pytest.mark.parametrize("at", [0, 1, 3, 6])
def test_a_stopped_run_ends_in_the_same_bytes(tmp_path: Path, straight: dict[str, bytes], at: int) -> None:
    model = Toy()
    with pytest.raises(Interrupted, match=f"Step {at + 1} of 7 is saved"):
        train_toy(tmp_path, model, loss_fn=with_signal(model, at))
    assert (tmp_path / "checkpoints" / f"step-{at + 1:08d}").is_dir()
    train_toy(tmp_path)
    found = trained(tmp_path)
    # A stop leaves one more checkpoint behind; the logs and what the run ends with are the same.
    assert found["metrics.jsonl"] == straight["metrics.jsonl"]
    last = [name for name in straight if "step-00000007" in name]
    assert len(last) == 4 and {name: found[name] for name in last} == {name: straight[name] for name in last}


def test_a_run_killed_in_a_checkpoint_ends_in_the_same_bytes(tmp_path: Path, straight: dict[str, bytes]) -> None:
    command = [sys.executable, toy_training.__file__, str(tmp_path)]
    killed = subprocess.run(command, env={**os.environ, "TOY_KILL": "3"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "checkpoints").glob(".*"))) == 1, "expected the half-written checkpoint"
    assert read_metrics(tmp_path)[-1]["step"] == 6, "expected rows from after the last checkpoint"
    train_toy(tmp_path)
    assert trained(tmp_path) == straight


def test_an_evaluation_may_end_the_training_and_it_stays_ended(tmp_path: Path) -> None:
    model = Toy()
    config = replace(CONFIG, eval_every=2)
    job = toy_job(tmp_path / "run")
    evaluate = lambda step: {"error": 1.0, ENOUGH: float(step >= 4)}  # noqa: E731
    steps = []

    def loss_fn(batch: Tensor, step: int) -> Loss:
        steps.append(step)
        return toy_loss(model)(batch, step)

    first = train(model, ToyBatches(), loss_fn, evaluate, config, job)
    weights = [param.detach().clone() for param in model.parameters()]
    assert max(steps) == 3 and first.results[ENOUGH] == 1
    steps.clear()
    again = train(model, ToyBatches(), loss_fn, evaluate, config, job)
    assert steps == [] and again.results == first.results
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, straight: dict[str, bytes]) -> None:
    model = Toy()
    with pytest.raises(Interrupted):
        train_toy(tmp_path, model, loss_fn=with_signal(model, 4))
    file = tmp_path / "checkpoints" / "step-00000005" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="step-00000005: optimizer.safetensors does not have the sha256"):
        train_toy(tmp_path)
    assert trained(tmp_path) == straight


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    first = Toy()
    report = train_toy(tmp_path, first)

    def never(batch: Tensor, step: int) -> Loss:
        raise AssertionError("trained again")

    second = Toy()
    assert train_toy(tmp_path, second, loss_fn=never) == report
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_other_data_is_refused(tmp_path: Path) -> None:
    train_toy(tmp_path)
    with pytest.raises(ArtefactError, match="run of 7 steps, but the data now makes 9"):
        train_toy(tmp_path, batches=ToyBatches(steps=9))


def test_another_model_is_refused(tmp_path: Path) -> None:
    train_toy(tmp_path)
    with pytest.raises(ArtefactError, match=r"'first.weight' is float32 \[5, 3\] in the model and float32 \[4, 3\]"):
        train_toy(tmp_path, Toy(width=5))


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "loss nan"), (float("inf"), "loss inf")])
def test_stops_before_a_step_that_diverged(tmp_path: Path, value: float, text: str) -> None:
    model = Toy()
    before: list[Tensor] = []

    def loss_fn(batch: Tensor, step: int) -> Loss:
        loss = toy_loss(model)(batch, step)
        if step < 3:
            return loss
        before[:] = [param.detach().clone() for param in model.parameters()]
        return replace(loss, sum=loss.sum * value)

    with pytest.raises(Diverged, match=f"Step 4 of 7.*found {text}, distance.*step-00000002"):
        train_toy(tmp_path, model, loss_fn=loss_fn)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_infinite_gradient_of_a_finite_loss_diverges(tmp_path: Path) -> None:
    model = Toy()

    def loss_fn(batch: Tensor, step: int) -> Loss:
        return Loss((model(batch) * 0).abs().sqrt().sum(), len(batch))

    with pytest.raises(Diverged, match="found loss 0, gradient norm nan"):
        train_toy(tmp_path, model, loss_fn=loss_fn)


@pytest.mark.parametrize("seconds", [0.0, 0.003])
def test_what_goes_wrong_in_the_batches_comes_through(tmp_path: Path, seconds: float) -> None:
    class Broken(ToyBatches):
        def __getitem__(self, step: int, /) -> Sequence[Tensor]:
            time.sleep(seconds)
            if step == 4:
                raise DataError("row 17 is broken")
            return super().__getitem__(step)

    with pytest.raises(DataError, match="row 17"):
        train_toy(tmp_path, batches=Broken())


def test_slow_batches_are_made_ahead_once_each(tmp_path: Path, straight: dict[str, bytes]) -> None:
    made: list[tuple[int, str]] = []

    class Slow(ToyBatches):
        def __getitem__(self, step: int, /) -> Sequence[Tensor]:
            made.append((step, threading.current_thread().name))
            time.sleep(0.003)
            return super().__getitem__(step)

    train_toy(tmp_path, batches=Slow())
    assert made == [*((step, "MainThread") for step in range(2)), *((step, "batches") for step in range(2, STEPS))]
    assert trained(tmp_path) == straight
    assert "batches" not in {thread.name for thread in threading.enumerate()}


def test_a_step_without_weight_is_refused(tmp_path: Path) -> None:
    model = Toy()

    def loss_fn(batch: Tensor, step: int) -> Loss:
        return Loss(torch.zeros(()), 0.0)

    with pytest.raises(DataError, match=r"Step 1 of 7.*weight 0"):
        train_toy(tmp_path, model, loss_fn=loss_fn)


def test_micro_batches_without_targets_are_harmless(tmp_path: Path) -> None:
    model = Toy()

    def loss_fn(batch: Tensor, step: int) -> Loss:
        return toy_loss(model)(batch, step) if len(batch) > 2 else Loss(torch.zeros(()), 0.0)

    train_toy(tmp_path, model, ToyBatches(micro=3), loss_fn)


def test_nothing_to_train_or_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Toy has no parameter that trains"):
        train_toy(tmp_path, Toy().requires_grad_(False))
    with pytest.raises(DataError, match="no step to train"):
        train_toy(tmp_path, batches=ToyBatches(steps=0))


def test_a_loss_apart_from_the_model_is_our_mistake(tmp_path: Path) -> None:
    def loss_fn(batch: Tensor, step: int) -> Loss:
        return Loss(torch.ones((), requires_grad=True) * 2, 1.0)

    with pytest.raises(AssertionError, match="none received a gradient"):
        train_toy(tmp_path, loss_fn=loss_fn)


def test_what_is_frozen_or_unused_stays_as_it_is(tmp_path: Path) -> None:
    model, fresh = Toy(), Toy()
    train_toy(tmp_path, model)
    assert torch.equal(model.frozen.weight, fresh.frozen.weight)
    assert torch.equal(model.unused.weight, fresh.unused.weight), "weight decay must not touch it either"
    assert not torch.equal(model.last.bias, fresh.last.bias)


def test_draws_do_not_depend_on_what_was_drawn_before(tmp_path: Path, straight: dict[str, bytes]) -> None:
    torch.rand(17)
    train_toy(tmp_path)
    assert trained(tmp_path) == straight


def test_learns(tmp_path: Path) -> None:
    model = Toy(width=8)
    config = TrainConfig(log_every=20, optim=OptimConfig(lr=0.03))
    report = train_toy(tmp_path, model, ToyBatches(steps=100), config=config)
    before = toy_evaluate(Toy(width=8).eval())(0)["error"]
    assert isinstance(report.results["error"], float) and report.results["error"] < 0.2 * before


def test_a_batch_may_be_anything(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    batches: list[list[Any]] = [[{"x": 1.0}], [{"x": 2.0}, {"x": 3.0}]]

    def loss_fn(batch: dict[str, float], step: int) -> Loss:
        return Loss(model(torch.tensor([batch["x"]])).square().sum(), 1.0, {"x": (batch["x"], 1.0)})

    train(model, batches, loss_fn, None, replace(CONFIG, log_every=1), toy_job(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["x"] for row in rows] == [1.0, 2.5]
