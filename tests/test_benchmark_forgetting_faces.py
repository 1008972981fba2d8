"""The benchmark of all methods runs in small, goes on where it stopped, and its means are those worked out by hand."""

import json
import sys
from pathlib import Path

import pytest
import torch

from postgrad.core.runtime import Job
from postgrad.forgetting.forget import ForgetConfig

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # benchmarks are not installed

from benchmarks import forgetting_faces as command  # noqa: E402

RECIPE = """
tasks = [6, 2, 2]
baselines = ["ssd", "lwf"]
[baseline]
epochs = 1
[data]
limit = 400
[model]
width = 16
depth = 2
heads = 2
patch = 8
[base.train]
epochs = 20
[base.train.optim]
lr = 1e-2
[runtime]
threads = 1
"""


def recipe(folder: Path) -> Path:
    """Write a recipe of eight digits: the first request keeps six, the second four."""
    images = folder / "digits.npz"
    if not images.exists():
        import numpy as np
        from sklearn.datasets import load_digits

        digits = load_digits()
        chosen = digits.target < 8
        np.savez(images, images=digits.images[chosen] / 16, labels=digits.target[chosen])
    path = folder / "forget_tiny.toml"
    path.write_text(RECIPE.replace("limit", f'path = "{images}"\nlimit'), encoding="utf-8")
    return path


def test_runs_in_small_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gold has no excess over itself, the base forgets nothing; a second call measures what is new alone."""
    call = [str(recipe(tmp_path)), "--folder", str(tmp_path / "kept"), "--methods", "ssd", "gold"]
    assert command.main([*call, "gs-lora", "retrain"]) == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.json")}
    figures = {path: json.loads(path.read_text()) for path in files if path.parent.name == "figures"}
    by_method = {each["method"]: each["requests"] for each in figures.values()}
    assert by_method.keys() == {"base", "gs-lora", "ssd", "retrain", "gold"}
    for requests in by_method.values():
        assert len(requests) == 2 and "acc_o" not in requests[0] and "acc_o" in requests[1]
    for first, last in zip(by_method["gold"], by_method["base"], strict=True):
        assert first["acc_f"] == last["h"] == 0 and last["acc_f"] == last["acc_f_pretrained"] > 50
    assert max(each["acc_f"] for each in by_method["retrain"]) == 0, "retrain saw none of them"
    shown = capsys.readouterr().out
    assert "| gold | " in shown and "| 0, 0 | 0, 0 |" in shown and "forget_tiny, seeds: 1" in shown

    assert command.main([*call, "lwf", "--seeds", "2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files, "what was measured is read"
    later = [path for path in (tmp_path / "kept").rglob("figures/*.json") if path not in files]
    assert len(later) == 1 + 4
    assert "±" in capsys.readouterr().out

    assert command.main([*call, "--shots", "4"]) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert len(list((tmp_path / "kept").rglob("base/model"))) == 2, "a base a seed, whatever the shots"


def test_the_best_rate_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By H of the first request; one that diverged is never taken; what has no rate is not tuned."""
    hs = {1e-4: [{"h": 60.0}], 1e-3: [{"h": 80.0}], 1e-2: []}
    asked = []

    def figures(self: command.Store, method: str, lr: float, num: int = 0) -> list[dict[str, float]]:
        asked.append((method, lr, num))
        return hs[lr]

    monkeypatch.setattr(command.Store, "figures", figures)
    job = Job("benchmark", tmp_path, 0, torch.device("cpu"), torch.float32, 0, 1, True)
    store = command.Store(ForgetConfig(), job)
    assert command.tuned(store, "lwf", list(hs)) == 1e-3
    assert asked == [("lwf", lr, 1) for lr in hs]
    for method in ("safe", "ssd", "gold"):
        assert command.tuned(store, method, list(hs)) == 0.0
    assert command.tuned(store, "scrub", [3e-4]) == 3e-4, "there is nothing to choose"
    assert len(asked) == 3
    given = command.parse(["recipe.toml", "--lr", "lwf=1e-3", "scrub=2e-4"]).lr
    assert given == [("lwf", 1e-3), ("scrub", 2e-4)]
    with pytest.raises(SystemExit):
        command.parse(["recipe.toml", "--lr", "lfw=1e-3"])


def test_excess_is_over_gold_of_the_same_seed() -> None:
    own = [[{"knn_found": 40.0, "probe_found": 30.0}], [{"knn_found": 20.0, "probe_found": 30.0}], []]
    gold = [[{"knn_found": 35.0, "probe_found": 31.0}], [{"knn_found": 5.0, "probe_found": 10.0}], own[0]]
    found = command.beside_gold({"lwf": own, "gold": gold})
    assert [[each["knn_excess"] for each in requests] for requests in found["lwf"]] == [[5.0], [15.0], []]
    assert [[each["probe_excess"] for each in requests] for requests in found["lwf"]] == [[-1.0], [20.0], []]
    assert command.beside_gold({"lwf": own}) == {"lwf": own}


def test_rows() -> None:
    """Means over seeds, with deviation / sqrt(number); the worst of any seed and request."""
    one = [
        {"h": 80.0, "acc_r": 90.0, "acc_f": 0.0, "knn_excess": 4.0, "probe_excess": 1.0},
        {"h": 70.0, "acc_r": 80.0, "acc_f": 6.0, "acc_o": 2.0, "knn_excess": -2.0, "probe_excess": 3.0},
    ]
    two = [
        {"h": 84.0, "acc_r": 92.0, "acc_f": 1.0, "knn_excess": 6.0, "probe_excess": 1.0},
        {"h": 70.0, "acc_r": 84.0, "acc_f": 5.0, "acc_o": 3.0, "knn_excess": -2.0, "probe_excess": 3.0},
    ]
    assert command.cells([one, two], 0) == ["82.0 ± 2.0", "91.0 ± 1.0", "0.5 ± 0.5", "", "", "+5.0 ± 1.0", "+1.0 ± 0.0"]
    assert command.cells([one, []], 1) == ["70.0", "80.0", "6.0", "2.0", "", "-2.0", "+3.0"]
    row, lost = command.lines({"lwf": [one, two], "scrub": [[], []]})[2:]
    assert row == "| lwf | 82.0 ± 2.0 | 70.0 ± 0.0 | 82.0 ± 2.0 | 6.0 | 3.0 | 5, -2 | 1, 3 |"
    assert lost == "| scrub | diverged |"
