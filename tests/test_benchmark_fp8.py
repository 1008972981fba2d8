"""The FP8 benchmark runs in small; its bytes are the formula's, its rings and ratios those of numbers worked out."""

import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # benchmarks are not installed

from benchmarks.fp8 import __main__ as command  # noqa: E402
from benchmarks.fp8 import lab as shared  # noqa: E402
from benchmarks.fp8 import optimizers, reductions, steps  # noqa: E402
from benchmarks.fp8.lab import MEASURED, NO_MEMORY, NO_TIME, Lab, Row, held_bytes, markdown, peak_bytes  # noqa: E402
from benchmarks.fp8.llama import SHAPES, build, coded_share, keep, to_bf16, to_codes  # noqa: E402
from postgrad.core.config import PrecisionConfig  # noqa: E402
from postgrad.fp8.levels import prepare  # noqa: E402
from postgrad.fp8.numerics import F16, dequantize, quantize  # noqa: E402
from postgrad.fp8.scaled import ScaledTensor  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("fp8_benchmark")]
CPU = torch.device("cpu")
QUICK_REAL = reductions.REAL[:1]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one quick run of everything."""
    folder = tmp_path_factory.mktemp("fp8")
    assert command.main(["--quick", "--device", "cpu", "--threads", "1", "--out", str(folder)]) == 0
    return folder


def rows_of(folder: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_every_system_has_a_row_and_none_fails(out: Path) -> None:
    rows = rows_of(out)
    assert not [row for row in rows if row.status.startswith("failed")], rows
    named = Counter((row.part, row.system) for row in rows if "memory" not in row.case)
    wanted = [("optimizer", name) for name in ("copy", optimizers.BASELINE, *optimizers.SYSTEMS)]
    wanted += [("step", name) for name in steps.SYSTEMS] + [("large", "ours, O2"), ("large", steps.REFERENCE)]
    wanted += [("reduction", f"{world} ranks, gloo") for world in QUICK_REAL]
    assert set(wanted) <= named.keys()
    assert all(named["reduction", f"{world} ranks, simulated"] == 2 for world in reductions.WORLDS)
    measured = {(row.part, row.system) for row in rows if row.status == MEASURED}
    assert {("optimizer", "ours, torch"), ("step", "ours, O1"), ("step", "ours, O2"), ("large", "ours, O2")} <= measured
    away = {row.system: row.status for row in rows if row.status != MEASURED}
    assert away["TE FP8, float32 AdamW"].startswith("not ") and away["ours, triton"].startswith("not run")


def test_bytes_on_the_wire_are_the_formulas(out: Path) -> None:
    rows = [row for row in rows_of(out) if row.system.endswith("gloo")]
    for row, world in zip(rows, QUICK_REAL, strict=True):
        expected = 2 * (world - 1) / world + 8 / 2**14
        assert row.numbers["FP8 B"] == row.numbers["a2a B, counted"] == row.numbers["a2a B, wire"] == expected
        # "native" needs no second magnitude: its scale is known before the sum
        assert row.numbers["native B, counted"] == pytest.approx(expected - 4 / 2**14)
        assert row.numbers["BF16 B"] == 4 * (world - 1) / world and row.numbers["float32 B"] == 8 * (world - 1) / world
        assert row.numbers["a2a dB"] > 27


def test_processes_and_simulation_agree(out: Path) -> None:
    """Same draws, same codes, so the same noise."""
    found = {row.system: row.numbers for row in rows_of(out) if row.part == "reduction" and row.case == "Gaussian"}
    for world in QUICK_REAL:
        assert found[f"{world} ranks, gloo"]["a2a dB"] == found[f"{world} ranks, simulated"]["a2a dB"]


def test_two_roundings_stay_where_rings_fall(out: Path) -> None:
    found = {row.system: row.numbers for row in rows_of(out) if row.part == "reduction" and row.case == "Gaussian"}
    many = found["64 ranks, simulated"]
    rings = [many[f"ring, mu {name} dB"] for name in ("1", "1/sqrt N", "1/N")]
    assert many["a2a dB"] > max(rings) + 10 and many["native dB"] > rings[0] and many["its mu"] < 1


def test_bytes_held_are_counted(out: Path) -> None:
    found = {row.system: row.numbers for row in rows_of(out) if row.part == "optimizer" and row.status == MEASURED}
    assert found[optimizers.BASELINE]["bytes held"] == pytest.approx(16, abs=0.01)
    assert 6 < found["ours, torch"]["bytes held"] <= 6.01
    assert found["torch AdamW, fused, all BF16"]["bytes held"] == pytest.approx(8, abs=0.01)
    assert found["FP8 states, eager"]["peak bytes"] > found["ours, torch"]["peak bytes"] > 6
    share = {row.system: row.numbers for row in rows_of(out) if row.part == "large"}["ours, O2"]["coded"]
    trained = {row.system: row.numbers for row in rows_of(out) if row.part == "step" and row.status == MEASURED}
    assert trained["ours, O2"]["held bytes a parameter"] == pytest.approx(5 * share + 12 * (1 - share), abs=0.02)
    assert trained["ours, O1"]["held bytes a parameter"] == pytest.approx(10 * share + 12 * (1 - share), abs=0.02)


def test_systems_start_alike_and_learn(out: Path) -> None:
    rows = [row for row in rows_of(out) if row.part in ("step", "large") and row.status == MEASURED]
    losses = [row.numbers["loss, step 3"] for row in rows if "tokens" in row.case]
    assert len(losses) >= 6 and max(losses) - min(losses) < 0.01
    assert max(losses) < math.log(256) + 0.01


def test_equal_memory_keeps_to_it(out: Path) -> None:
    rows = [row for row in rows_of(out) if row.part == "step"]
    budget = next(row for row in rows if row.system == steps.REFERENCE).numbers["peak GiB"]
    larger = {row.system: row for row in rows if row.case.endswith("memory")}
    assert larger.keys() == {"ours, O2", "ours, O1", "all BF16, AdamW"}
    found = larger["all BF16, AdamW"].numbers
    assert found["rows"] > 2 and found["peak GiB"] <= budget


def test_tables_have_a_cell_for_every_column(out: Path) -> None:
    text = (out / "table.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("###")] == [f"### {part}" for part in command.PARTS]
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert f"| {optimizers.BASELINE} |" in text and "| not run: its kernels need a GPU |" in text


def quick(tmp_path: Path, *, deadline: float = math.inf) -> Lab:
    return Lab(CPU, True, False, deadline, tmp_path, say=lambda line: None)


def test_a_row_outlives_its_failure(tmp_path: Path) -> None:
    lab = quick(tmp_path)

    def no_memory() -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def absent() -> dict[str, float]:
        import nowhere_to_be_found  # type: ignore[import-not-found]  # noqa: F401

        return {}

    def broken() -> dict[str, float]:
        raise TypeError("no such argument\nand more")

    for run in (no_memory, absent, broken, lambda: {"ms": 2.0}):
        lab.measure("step", "1b", "a", run)
    late = quick(tmp_path, deadline=time.monotonic())
    late.measure("step", "1b", "b", lambda: {"ms": 2.0})
    statuses = [row.status for row in rows_of(tmp_path)]
    missing = "not installed: No module named 'nowhere_to_be_found'"
    assert statuses == [NO_MEMORY, missing, "failed: TypeError: no such argument", MEASURED, NO_TIME]
    assert markdown(lab.rows[2:]).splitlines() == [
        "| case | system | ms |", "| --- | --- | --- |",
        "| 1b | a | failed: TypeError: no such argument |", "| 1b | a | 2 |",
    ]  # fmt: skip


def test_peak_counts_what_is_there_at_once() -> None:
    def run() -> None:
        one = torch.ones(2**20)
        two = one + 1  # two are there
        del one
        three = two * 2  # two are there
        del two, three

    assert peak_bytes(CPU, run) == pytest.approx(2 * 2**22, rel=0.01)


def test_held_bytes_look_inside_and_count_once() -> None:
    plain = torch.zeros(100)
    scaled = ScaledTensor(quantize(torch.ones(100), F16), torch.float32)
    assert held_bytes([plain, plain[:50], nn.Parameter(scaled)]) == 400 + 200 + 4


def test_turns_are_fewer_where_calls_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    runs = [lambda: calls.append(0), lambda: calls.append(1)]
    assert [len(times) for times in shared.interleaved(CPU, runs, repeats=3, warm_up=1)] == [3, 3]
    assert calls == [0, 1, 1, 0, 0, 1, 1, 0]
    monkeypatch.setattr(shared, "PATIENCE", 0.0)
    assert [len(times) for times in shared.interleaved(CPU, runs, repeats=9)] == [1, 1]


def test_a_ring_of_equal_ranks() -> None:
    """Values that FP8 holds are added exactly until they are too large, which is when the sum saturates."""
    ranks = [torch.tensor([1.0, -0.5, 0.25, 448.0])] * 2
    found, saturated = reductions.ring(ranks, 0.5)
    assert found.equal(ranks[0]) and saturated == 0.25
    found, saturated = reductions.ring(ranks, 1.0)
    assert found.tolist() == [1.0, -0.5, 0.25, 224.0] and saturated == 0.25


def test_layers_become_codes_as_they_are_made() -> None:
    """A model made layer by layer is the one made in float32, whose weights become codes afterwards."""
    shape, precision = SHAPES["tiny"], PrecisionConfig(min_size=16)
    whole, streamed = build(shape, CPU, keep), build(shape, CPU, to_codes)
    assert streamed.config.num_hidden_layers == len(streamed.model.layers) == shape.layers
    prepare(whole, level="O2", precision=precision)
    before = {name: param for name, param in streamed.named_parameters() if isinstance(param, ScaledTensor)}
    prepare(streamed, level="O2", precision=precision)
    for (name, a), b in zip(whole.named_parameters(), streamed.parameters(), strict=True):
        assert isinstance(a, ScaledTensor) == (name in before)
        if isinstance(a, ScaledTensor):
            assert isinstance(b, ScaledTensor) and dequantize(a.quantized).equal(dequantize(b.quantized))
            assert b.codes.data_ptr() == before[name].codes.data_ptr(), "codes are not made twice"
        else:
            assert a.equal(b)
    assert 0.5 < coded_share(list(whole.parameters())) < 1


def test_bf16_keeps_the_frequencies() -> None:
    model = build(SHAPES["tiny"], CPU, to_bf16)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_the_largest_batch_that_should_fit() -> None:
    """2 rows take 4 GiB beside 6: of 20 GiB, 97 % = 19.4 leave room for 6.7 rows; 90 % and 75 % of 6 are tried then."""
    row = Row("step", "1b", "ours", MEASURED, {"rows": 2, "held GiB": 6.0, "peak GiB": 10.0})
    assert list(steps.tries(row, 20.0)) == [6, 5, 4]
    assert list(steps.tries(row, 10.0)) == []
