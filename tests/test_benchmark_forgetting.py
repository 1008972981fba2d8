"""The benchmark of forgetting runs in small, and its ratios and bars are those of numbers worked out by hand."""

import json
import sys
from pathlib import Path

import pytest
import torch

from postgrad.core.runtime import Job
from postgrad.errors import Diverged

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # benchmarks are not installed

from benchmarks import forgetting as command  # noqa: E402
from benchmarks.forgetting import Round, Served  # noqa: E402

METHODS = ["safe", "thorough", "gs-lora", "paper", "scrub", "salun"]


def served(cpu: float, wall: float, h: float, acc_o: float | None = None) -> Served:
    return Served(cpu, wall, 100.0, h=h, acc_r=90.0, acc_f=0.0, acc_o=acc_o)


def rounds() -> list[Round]:
    """Two rounds of two requests: ratios of all are 60 / 5 and 50 / 5, of the second 40 / 3 and 25 / 4."""
    return [
        {"safe": [served(2, 4, 95.0), served(3, 4, 94.0, 0.0)], "paper": [served(20, 30, 95.2), served(40, 50, 94.0)]},
        {"safe": [served(1, 4, 95.0), served(4, 4, 93.5, 0.0)], "paper": [served(25, 30, 95.2), served(25, 50, 94.5)]},
    ]


def test_runs_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--quick", "--folder", str(tmp_path / "kept"), "--out", str(tmp_path / "found.json")]
    assert command.main([*files, "--gold"]) == 1  # two epochs of the official schedule are too few
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rates"].keys() == {"scrub", "salun"} and found["missed"]
    assert found["missed"][0] in " ".join(shown.split())
    (one,) = found["rounds"]
    assert list(one) == METHODS
    for name, requests in one.items():
        assert len(requests) == 2 and name in shown
        for request in requests:
            assert request["cpu"] > 0 and request["wall"] > 0
            assert 0 <= request["acc_r"] <= 100 and 0 <= request["acc_f"] <= 100
            assert (request["image_passes"] is None) == (name in ("scrub", "salun"))
            assert request["knn"] is not None and request["probe"] is not None
        assert [request["acc_o"] is None for request in requests] == [True, False]
    short = ["--no-bar", "--max-epochs", "1", "--baselines"]
    weights = next((tmp_path / "kept").rglob("model.safetensors"))
    written = weights.stat().st_mtime_ns
    assert command.main([*files, *short]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["rounds"][0]) == METHODS[:4] and found["rounds"][0]["safe"][0]["knn"] is None
    assert weights.stat().st_mtime_ns == written, "the base is trained once"


def test_ratios_are_taken_within_a_round() -> None:
    assert command.ratios(rounds(), "safe", "cpu") == [12.0, 10.0]
    assert command.ratios(rounds(), "safe", "wall") == [10.0, 10.0]
    assert command.ratios(rounds(), "safe", "cpu", 1) == [40 / 3, 25 / 4]
    assert command.behind(rounds(), "safe") == pytest.approx([0.2, 0.5])


def test_table_shows_requests_and_their_sum() -> None:
    cells = [list(column.cells) for column in command.table(rounds(), "").columns]
    rows = list(zip(*cells, strict=True))
    assert rows[1] == ("safe", "2", "3.5", "4.0", "9.79 (6.25 to 13.33)", "12.50 (12.50 to 12.50)", "100", "93.8",
                       "90.0", "0.0", "0.0")  # fmt: skip
    assert rows[2][:8] == ("safe", "all", "5.0", "8.0", "11.00 (10.00 to 12.00)", "10.00 (10.00 to 10.00)", "200",
                           "94.4")  # fmt: skip
    assert rows[0][10] == ""


def test_bars() -> None:
    """Met at a median ratio of 11 and 0.5 points of H at most; missed by one request, or by the sum of seconds."""
    assert command.missed(rounds(), "cpu") == []
    safe = [served(1, 4, 95.0), served(4, 4, 94.0)]
    slow = [{"safe": safe, "paper": [served(20, 30, 95.2), served(25, 50, 94.5)]}]
    assert command.missed(slow, "cpu") == ["paper takes 9.00 times as long as safe, expected at least 10"]
    assert command.missed(slow, "wall") == []
    worse = [{"safe": safe, "paper": [served(25, 30, 90.0), served(25, 50, 95.1)]}]
    (line,) = command.missed(worse, "cpu")
    assert "1.10 points of H behind paper" in line


def test_a_rate_that_diverges_has_no_h(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def serve(lab: object, method: str, lr: float, job: Job, num: int) -> list[Served]:
        assert num == 1
        if lr > 0.1:
            raise Diverged("too much")
        return [served(1, 1, 100 * lr)]

    monkeypatch.setattr(command, "serve", serve)
    job = Job("benchmark", tmp_path, 0, torch.device("cpu"), torch.float32, 0, 1, True)
    found = command.rates(None, "scrub", (0.01, 0.1, 1.0), job)  # type: ignore[arg-type]
    assert found == {0.01: 1.0, 0.1: 10.0, 1.0: 0.0}
