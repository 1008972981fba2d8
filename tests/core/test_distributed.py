import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_training
from toy_training import CONFIG, Toy, ToyBatches, toy_evaluate, toy_job, toy_loss

from postgrad.core import distributed
from postgrad.core.loop import train
from postgrad.core.report import read_metrics

pytestmark = pytest.mark.xdist_group("ranks")  # one worker, so that the ranks are started once

Found = dict[str, Any]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found, Found]:
    """Two processes, started as torchrun starts them, and what each of them found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, toy_training.__file__, str(folder), "ranks"]
    processes = []
    for rank in range(2):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "localhost", **{key: str(value) for key, value in ranks.items()}}
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=110)
        assert process.returncode == 0, errors
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2))
    return folder, first, second


def test_start_joins_the_ranks(group: tuple[Path, Found, Found]) -> None:
    _, first, second = group
    assert (first["rank"], second["rank"], first["world"], second["world"]) == (0, 1, 2, 2)


def test_sums_and_messages(group: tuple[Path, Found, Found]) -> None:
    for found in group[1:]:
        assert found["collectives"] == [[2.0, 1.0], 5, [{"rank": 0}, {"rank": 1}], 0]


def test_gradients_are_summed_in_buckets(group: tuple[Path, Found, Found]) -> None:
    for found in group[1:]:
        assert found["gradients"] == [[10.0] * 3, [12.0] * 3, [14.0] * 3]


def test_a_gradient_on_one_rank_counts_and_on_none_stays_away(group: tuple[Path, Found, Found]) -> None:
    for found in group[1:]:
        assert found["no_gradient"] == [[2.0, 2.0], [3.0, 4.0], None]


def test_two_ranks_equal_one(group: tuple[Path, Found, Found], tmp_path: Path) -> None:
    folder, first, second = group
    assert first["training"] == second["training"]
    model = Toy()
    model.drop.p = 0.0
    report = train(model, ToyBatches(), toy_loss(model), toy_evaluate(model), CONFIG, toy_job(tmp_path))
    one = [*model.first.weight.flatten().tolist(), report.results["error"]]
    assert first["training"] == pytest.approx(one, rel=1e-4, abs=1e-6)
    for ours, alone in zip(read_metrics(folder / "training"), read_metrics(tmp_path), strict=True):
        assert ours == pytest.approx(alone, rel=1e-4)


def test_a_rank_without_micro_batches_takes_part(group: tuple[Path, Found, Found], tmp_path: Path) -> None:
    folder, first, second = group
    assert first["idle_rank"] == second["idle_rank"]
    model = Toy()
    model.drop.p = 0.0
    train(model, ToyBatches(), toy_loss(model), None, replace(CONFIG, eval_every=0), toy_job(tmp_path))
    assert first["idle_rank"] == model.first.weight.flatten().tolist()
    assert read_metrics(folder / "idle_rank") == read_metrics(tmp_path)


def test_a_signal_to_one_rank_stops_all(group: tuple[Path, Found, Found]) -> None:
    folder, first, second = group
    assert first["stop"] == second["stop"]
    assert first["stop"].startswith("Interrupted: Step 3 of 7 is saved")
    assert (folder / "stop" / "checkpoints" / "step-00000003").is_dir()


def test_an_error_of_one_rank_ends_all(group: tuple[Path, Found, Found]) -> None:
    _, first, second = group
    assert second["error_on_one"] == "DataError: row 17 is broken"
    assert first["error_on_one"].startswith("PostgradError: Another rank failed")


def test_an_error_of_the_first_rank_reaches_all(group: tuple[Path, Found, Found]) -> None:
    _, first, second = group
    assert first["error_of_first"] == second["error_of_first"]
    assert "runtime.seed: 0 -> 1" in first["error_of_first"][0]


def test_alone_everything_is_itself() -> None:
    tensor = torch.ones(2)
    assert distributed.sum_over_ranks(tensor) is tensor
    assert distributed.broadcast_object("x") == "x" and distributed.gather_objects("x") == ["x"]
    assert distributed.first_rank(lambda: 3) == distributed.on_every_rank(lambda: 3) == 3
    assert (distributed.rank(), distributed.world()) == (0, 1)
    distributed.barrier()
    distributed.init_ranks(torch.device("cpu"))
    assert not torch.distributed.is_initialized()
