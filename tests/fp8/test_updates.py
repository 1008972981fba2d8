"""FP8 in the training loop: levels agree, killed runs resume to the bit, steps that are not finite are left out."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_training import STEPS, Small, TokenBatches, next_token, ranks, settings, train_small
from safetensors.torch import load_file
from toy_training import toy_job

from postgrad.core.loop import MOST_SKIPPED, Loss, train
from postgrad.core.report import read_metrics
from postgrad.errors import ArtefactError, Diverged, Interrupted

VARIANTS: dict[str, dict[str, Any]] = {
    "O1": {"level": "O1"},
    "O2": {"level": "O2"},
    "O3": {"level": "O3"},
    "delayed": {"level": "O2", "scaling": "delayed"},
    "stochastic": {"level": "O2", "rounding": "stochastic"},
    "jit": {"level": "O2", "scales": "jit"},
    "native": {"level": "O2", "reduction": "native"},
    "watched": {"level": "O3", "watch_every": 2},
}


def left(folder: Path) -> dict[str, bytes]:
    files = [folder / "metrics.jsonl", *sorted((folder / "checkpoints").rglob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_learns_about_as_well_as_full_precision(tmp_path: Path, level: str) -> None:
    losses = {}
    for name in ("off", level):
        train_small(tmp_path / name, settings(name))
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / name)]
    assert losses[level][-1] == pytest.approx(losses["off"][-1], rel=0.02)
    assert losses[level] != losses["off"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_ends_in_the_same_bytes(tmp_path: Path, variant: str) -> None:
    config = settings(**VARIANTS[variant])
    train_small(tmp_path / "straight", config)
    model = Small()

    def stopping(tokens: torch.Tensor, step: int) -> Loss:
        if step == 3:
            raise RuntimeError("killed")
        return next_token(model)(tokens, step)

    with pytest.raises(RuntimeError, match="killed"):
        train_small(tmp_path / "stopped", config, model=model, loss_fn=stopping)
    again, _ = train_small(tmp_path / "stopped", config)
    assert left(tmp_path / "stopped") == left(tmp_path / "straight")
    loaded, _ = train_small(tmp_path / "straight", config)
    for (name, one), (_, other) in zip(again.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_to_the_bit_and_o3_gives_what_o2_gives(tmp_path: Path, world: int) -> None:
    found = {level: ranks(tmp_path / level, world, level) for level in ("O2", "O3")}
    for other in (*found["O2"][1:], *found["O3"]):
        for name, param in found["O2"][0].items():
            assert torch.equal(param, other[name]), name
    rows = [read_metrics(tmp_path / level / "run") for level in ("O2", "O3")]
    assert rows[0] == rows[1]
    train_small(tmp_path / "alone", settings("O2"))
    losses = [row["loss"] for row in read_metrics(tmp_path / "alone")]
    assert [row["loss"] for row in rows[0]] == pytest.approx(losses, rel=0.01)


def test_native_sums_keep_their_factors_in_checkpoints(tmp_path: Path) -> None:
    found = ranks(tmp_path, 2, "O2", "native")
    assert all(torch.equal(param, found[1][name]) for name, param in found[0].items())
    kept = left(tmp_path / "run")
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert {f"{name}.weight/mu" for name in ("up", "down")} <= set(load_file(last / "optimizer.safetensors"))
    shutil.rmtree(last)
    again = ranks(tmp_path, 2, "O2", "native")
    assert left(tmp_path / "run") == kept
    assert all(torch.equal(param, again[0][name]) for name, param in found[0].items())


def test_a_run_of_two_ranks_goes_on_with_one(tmp_path: Path) -> None:
    ranks(tmp_path, 2, "O3")
    run = tmp_path / "run"
    kept = sorted((run / "checkpoints").iterdir())
    shutil.rmtree(kept[-1])
    train_small(run, settings("O3"))
    assert [row["step"] for row in read_metrics(run)] == list(range(1, STEPS + 1))
    assert sorted((run / "checkpoints").iterdir())[-1] == kept[-1]


def test_a_gradient_that_is_not_finite_costs_its_step_and_nothing_else(tmp_path: Path) -> None:
    for bad, name in ((2, "bad"), (None, "good")):
        model = Small()

        def loss_fn(tokens: torch.Tensor, step: int, bad: int | None = bad, model: Small = model) -> Loss:
            loss = next_token(model)(tokens, step)
            return replace(loss, sum=loss.sum * (math.inf if step == bad else 1))

        batches = TokenBatches()
        train(model, batches, loss_fn, None, settings("O2"), toy_job(tmp_path / name))
    bad_rows, good_rows = (read_metrics(tmp_path / name) for name in ("bad", "good"))
    assert [row["step"] for row in bad_rows] == [1, 2, 4, 5, 6]
    assert [row.get("skipped_steps") for row in bad_rows] == [None, None, 1, 1, 1]
    assert bad_rows[:2] == good_rows[:2]
    state = json.loads((tmp_path / "bad" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["optimizer"]["up.weight/step"] == 3


def test_steps_that_are_never_finite_end_the_run(tmp_path: Path) -> None:
    model = Small()

    def loss_fn(tokens: torch.Tensor, step: int) -> Loss:
        loss = next_token(model)(tokens, step)
        return replace(loss, sum=loss.sum * math.nan)

    with pytest.raises(Diverged, match=f"Step {MOST_SKIPPED} of 12"):
        train(model, TokenBatches(steps=12), loss_fn, None, settings("O2"), toy_job(tmp_path))


def test_a_checkpoint_of_another_precision_is_refused(tmp_path: Path) -> None:
    for first, second in (("off", "O2"), ("O2", "off"), ("O1", "O2")):
        folder = tmp_path / f"{first}-{second}"
        train_small(folder, settings(first))
        with pytest.raises(ArtefactError, match=r"precision|exp_avg of parameter 0 must be torch.float8"):
            train_small(folder, settings(second))


def test_a_signal_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    import os
    import signal

    model = Small()

    def loss_fn(tokens: torch.Tensor, step: int) -> Loss:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_token(model)(tokens, step)

    with pytest.raises(Interrupted):
        train_small(tmp_path / "a", settings("O3"), model=model, loss_fn=loss_fn)
    train_small(tmp_path / "a", settings("O3"))
    train_small(tmp_path / "b", settings("O3"))
    assert left(tmp_path / "a")["metrics.jsonl"] == left(tmp_path / "b")["metrics.jsonl"]
