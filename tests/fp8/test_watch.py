"""What is measured of tensors equals what the measures say of them, and comes at its steps only."""

import math
from pathlib import Path

import pytest
import torch
from fp8_training import STEPS, Small, TokenBatches, next_token, settings, train_small

from postgrad.core.config import OptimConfig, PrecisionConfig
from postgrad.core.report import TENSORS, read_metrics
from postgrad.core.sections import Plot, Table
from postgrad.fp8.levels import prepare
from postgrad.fp8.numerics import E4M3, E5M2, dequantize, quantize, share_saturated, snr_db
from postgrad.fp8.optimizer import Fp8AdamW
from postgrad.fp8.watch import KINDS, Watch, watch_sections


def test_measures_equal_those_of_the_tensors() -> None:
    model, optimizer = prepare(Small(), OptimConfig(beta2=0.95), "O2", PrecisionConfig(min_size=16))
    assert isinstance(optimizer, Fp8AdamW)
    seen: dict[str, torch.Tensor] = {}
    layer = model.get_submodule("up")
    layer.register_forward_hook(lambda _, args, y: seen.update(x=args[0].detach(), y=y))
    watch = Watch(model, every=3)
    tokens = TokenBatches()[0][0]
    for step in (0, 1, 2):
        watch.begin(step)
        next_token(model)(tokens, step).sum.backward()  # type: ignore[no-untyped-call]
        found = watch.end(optimizer, {param: param for param in optimizer.param_groups[0]["params"]}, 0.5)
        assert bool(found) == (step == 2)
        optimizer.step(divide=2.0)
        optimizer.zero_grad()
    assert list(found) == list(KINDS)
    assert all(set(names) == {"up", "down"} for names in found.values())
    x = seen["x"].reshape(-1, 32)
    q = quantize(x, E4M3)
    assert found["x"]["up"]["snr_db"] == pytest.approx(float(snr_db(x, q)), rel=1e-5)
    assert found["x"]["up"]["saturation"] == pytest.approx(float(share_saturated(q)))
    for kind, low, high in (("x", 25, 40), ("w", 25, 40), ("dy", 18, 34), ("g", 25, 40), ("m", 25, 40), ("v", 55, 90)):
        for name in ("up", "down"):
            assert low < found[kind][name]["snr_db"] < high, (kind, name)
    assert found["master"]["up"]["snr_db"] > 55


def test_what_the_step_stores_is_what_was_measured() -> None:
    model, optimizer = prepare(Small(), OptimConfig(beta2=0.95), "O2", PrecisionConfig(min_size=16))
    assert isinstance(optimizer, Fp8AdamW)
    weight = optimizer.param_groups[0]["params"][0]
    watch = Watch(model, every=1)
    watch.begin(0)
    next_token(model)(TokenBatches()[0][0], 0).sum.backward()  # type: ignore[no-untyped-call]
    gradient = optimizer.gradients.of(weight)
    assert gradient is not None
    exact = 0.1 * dequantize(gradient.q)
    found = watch.end(optimizer, {weight: weight}, 1.0)
    optimizer.step(max_norm=0.0)
    stored = optimizer.moments_of(weight, optimizer.param_groups[0]).m.q
    assert found["m"]["up"]["snr_db"] == pytest.approx(float(snr_db(exact, stored)), rel=1e-4)


def test_rows_come_at_their_steps_and_make_plots(tmp_path: Path) -> None:
    _, report = train_small(tmp_path, settings("O2", watch_every=2))
    rows = [row for row in read_metrics(tmp_path) if TENSORS in row]
    assert [row["step"] for row in rows] == list(range(2, STEPS + 1, 2))
    titles = [section.title for section in report.sections]
    assert "Signal to noise, dB: 8 bits" in titles and f"Noisiest tensors at step {STEPS}" in titles
    assert not any("tensors/" in title for title in titles)
    plots = [section for section in report.sections if section.title.startswith("Signal")]
    assert [line.name for plot in plots if isinstance(plot, Plot) for line in plot.series] == list(KINDS)
    table = report.sections[-1]
    assert isinstance(table, Table)
    noise = [row[2] for row in table.rows]
    assert noise == sorted(noise) and all(isinstance(value, float) and math.isfinite(value) for value in noise)


def test_without_measurements_there_is_nothing_to_show(tmp_path: Path) -> None:
    train_small(tmp_path, settings("O2"))
    assert watch_sections(read_metrics(tmp_path)) == ()


def test_a_gradient_below_e5m2_is_told_as_underflow() -> None:
    x = torch.tensor([[1.0, 2.0**-40], [0.0, 1.0]])
    q = quantize(x, E5M2)
    watch = Watch(torch.nn.Linear(2, 2), every=1)
    watch._due = True
    watch._note("dy", "layer", x, q)
    model, optimizer = prepare(Small(), precision=PrecisionConfig(min_size=16))
    assert model and isinstance(optimizer, Fp8AdamW)
    assert watch.end(optimizer, {}, 1.0)["dy"]["layer"]["underflow"] == 0.25
