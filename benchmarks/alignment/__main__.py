"""SFT, reward and DPO training against TRL's trainers: real tokens a second and peak memory, side by side.

    python -m benchmarks.alignment                      the whole table, on a CPU
    python -m benchmarks.alignment --cases dpo --rounds 1
    python -m benchmarks.alignment --device cuda --size 0.5b

On a CPU every run has a process of its own, on a GPU every round. Systems take turns within a round; ratios are
taken within a round and the median over rounds is shown with the least and the greatest.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.alignment.data import load, save
from benchmarks.alignment.setting import Measured, Setting
from postgrad.core.rows import Tree

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = REPOSITORY.parent / "shared" / "data" / "llm"
OURS = "postgrad"
LOSS_BAR = 1e-4
FIRST_STEPS = 4


@dataclass(frozen=True)
class Case:
    """A task on some data, and the systems that do it; the number is how many rows a peer computes at a time."""

    task: str
    data: str
    vocabulary: int
    num: int
    batch: int
    best: int
    """Rows a forward pass with which TRL was fastest (--tune)."""

    @property
    def name(self) -> str:
        """What --cases looks for."""
        return f"{self.task}-{self.data}-{self.vocabulary}"


CASES = (
    Case("dpo", "hh", 2048, num=128, batch=16, best=2),
    Case("dpo", "hh", 32768, num=32, batch=8, best=1),
    Case("dpo", "alpaca_eval", 2048, num=32, batch=8, best=1),
    Case("dpo", "alpaca_eval", 32768, num=16, batch=8, best=1),
    Case("reward", "hh", 32768, num=128, batch=16, best=4),
    Case("reward", "alpaca_eval", 32768, num=32, batch=8, best=2),
    Case("sft", "instructions", 2048, num=256, batch=32, best=8),
    Case("sft", "instructions", 32768, num=64, batch=16, best=8),
)
GPU_CASES = (
    Case("dpo", "hh", 0, num=256, batch=64, best=16),
    Case("dpo", "alpaca_eval", 0, num=128, batch=64, best=8),
    Case("reward", "hh", 0, num=256, batch=64, best=16),
    Case("reward", "alpaca_eval", 0, num=128, batch=64, best=8),
    Case("sft", "instructions", 0, num=512, batch=64, best=16),
)
GPU_VOCABULARY = {"0.5b": 151936, "1b": 128256}


def settings(case: Case, options: argparse.Namespace) -> dict[str, Setting]:
    """Lay out the systems of a case."""
    cuda = options.device == "cuda"
    ours = Setting(
        OURS, case.task, case.data, case.num, case.batch, case.vocabulary or GPU_VOCABULARY[options.size],
        size=options.size, device=options.device, seed=options.seed,
        micro_tokens=options.micro_tokens or (16384 if cuda else 2048),
    )  # fmt: skip
    found = {OURS: ours}
    if options.tune:
        tried = [batch for batch in ((8, 16, 32, 64) if cuda else (1, 2, 4, 8, 16)) if batch <= case.batch]
        return found | {f"trl best, {b} rows": replace(ours, system="trl best", peer_batch=b) for b in tried}
    found["trl default"] = replace(ours, system="trl default")
    found["trl best"] = replace(ours, system="trl best", peer_batch=case.best)
    if case.task == "sft":
        found["trl packed"] = replace(ours, system="trl packed", peer_batch=4 if cuda else 1)
    return found


def measure(settings: Sequence[Setting], trees: Sequence[Tree], threads: int) -> list[Measured]:
    """Run settings on some rows in a process of their own."""
    env = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows, out = Path(folder) / "rows.json", Path(folder) / "found.json"
        save(trees, rows)
        worker = [sys.executable, "-m", "benchmarks.alignment.worker"]
        command = [*worker, json.dumps([asdict(setting) for setting in settings]), str(rows), str(out)]
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            names = ", ".join(setting.system for setting in settings)
            raise SystemExit(f"{names} on {settings[0].task} failed:\n{done.stderr[-4000:]}")
        return [Measured(**found) for found in json.loads(out.read_text())]


def spread(values: Sequence[float]) -> str:
    """Show the median, and the least and greatest where there are several."""
    middle = f"{median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def loss_gap(ours: Measured, theirs: Measured) -> float:
    """Give the greatest difference of the first steps' losses."""
    return max(abs(a - b) for a, b in zip(ours.losses[:FIRST_STEPS], theirs.losses[:FIRST_STEPS], strict=True))


def table(case: Case, rounds: Sequence[dict[str, Measured]], origin: str) -> Table:
    """Show a case: what each system measured, and its ratios to postgrad's run of the same round."""
    tokens = rounds[0][OURS].tokens
    shown = Table(title=f"{case.name}: {case.num} rows ({origin}), {tokens:,} real tokens", title_justify="left")
    columns = ("system", "tokens/s", "tokens/CPU s", "time ratio", "CPU time ratio", "peak GiB", "of it for training",
               "memory ratio", "loss gap")  # fmt: skip
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i else "left")
    for name in rounds[0]:
        runs = [(found[name], found[OURS]) for found in rounds]
        own = [run for run, _ in runs]
        ratios = [
            [a.wall / b.wall for a, b in runs],
            [a.cpu / b.cpu for a, b in runs],
            [(a.peak - a.base) / (b.peak - b.base) for a, b in runs],
        ]
        gap = f"{max(loss_gap(b, a) for a, b in runs):.1e}" if name == "trl default" else ""
        shown.add_row(
            name, f"{median([tokens / run.wall for run in own]):,.0f}", f"{median([tokens / r.cpu for r in own]):,.0f}",
            spread(ratios[0]), spread(ratios[1]), f"{median([run.peak for run in own]):.2f}",
            f"{median([run.peak - run.base for run in own]):.2f}", spread(ratios[2]), gap,
        )  # fmt: skip
    return shown


def run_case(case: Case, options: argparse.Namespace, console: Console) -> list[dict[str, Measured]]:
    """Run all rounds of a case; each round begins with another system."""
    systems = list(settings(case, options).items())
    one = systems[0][1]
    trees, origin = load(case.data, case.num, one.vocabulary, seed=one.seed, folder=TEXTS)
    rounds: list[dict[str, Measured]] = []
    for number in range(options.rounds):
        turned = systems[number % len(systems) :] + systems[: number % len(systems)]
        together = [turned] if options.device == "cuda" else [[system] for system in turned]
        found: dict[str, Measured] = {}
        for group in together:
            measured = measure([setting for _, setting in group], trees, options.threads)
            found |= dict(zip([name for name, _ in group], measured, strict=True))
        rounds.append({name: found[name] for name, _ in systems})
    console.print(table(case, rounds, origin))
    gaps = [loss_gap(found[OURS], found["trl default"]) for found in rounds if "trl default" in found]
    if options.device == "cpu" and any(gap > LOSS_BAR for gap in gaps):
        raise SystemExit(f"{case.name}: losses differ by {max(gaps):.2g}, at most {LOSS_BAR} is expected")
    return rounds


def machine(options: argparse.Namespace) -> dict[str, str | int]:
    """Describe what the numbers depend on."""
    names = ("torch", "transformers", "trl")
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        **{name: metadata.version(name) for name in names}, "python": platform.python_version(),
        "processor": model[0] if model else platform.processor(), "cores": os.cpu_count() or 1,
        "threads": options.threads,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases asked for, print their tables, write all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=("small", "0.5b", "1b"), default="small")
    parser.add_argument("--micro-tokens", type=int, default=0, help="postgrad: packed tokens a forward pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="try TRL's best settings with several batch sizes")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/alignment.json"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and options.size == "small":
        options.size = "0.5b"
    console = Console(width=max(Console().width, 150))
    written: dict[str, object] = {"machine": machine(options), "options": {**vars(options), "out": str(options.out)}}
    console.print(written["machine"])
    for case in GPU_CASES if options.device == "cuda" else CASES:
        if options.cases in case.name:
            rounds = run_case(case, options, console)
            written[case.name] = [{name: asdict(found) for name, found in one.items()} for one in rounds]
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
