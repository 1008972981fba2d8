"""FP8 against its peers: the optimizer's step, whole training steps, 13 billion parameters, sums over ranks.

    python -m benchmarks.fp8                          all parts on this machine: a GPU if there is one
    python -m benchmarks.fp8 --part step --shapes 1b  one part, one shape
    python -m benchmarks.fp8 --device cpu --quick     small and fast: does it run?

Every row goes to OUT/rows.jsonl as soon as it is measured, the tables to OUT/table.md. What is not installed, does not
fit or fails is a row that says so; what time does not allow, too.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.fp8 import optimizers, reductions, steps
from benchmarks.fp8.lab import Lab, markdown
from benchmarks.fp8.llama import SHAPES

PARTS = ("reduction", "optimizer", "large", "step")
PEERS = ("torchao", "bitsandbytes", "transformer_engine")


def machine(device: torch.device) -> dict[str, str | int]:
    """Describe what the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        **{name: _version(name) for name in ("torch", "triton", "transformers", *PEERS)},
        "python": platform.python_version(), "processor": models[0] if models else platform.processor(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none",
        "gpu memory GiB": torch.cuda.get_device_properties(device).total_memory >> 30 if device.type == "cuda" else 0,
        "cores": os.cpu_count() or 1, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--part", nargs="+", default=list(PARTS), choices=PARTS)
    add("--shapes", nargs="*", default=[], choices=sorted(SHAPES), help="of part step; none = those of the device")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--quick", action="store_true", help="tiny sizes, nothing compiled: does it run?")
    add("--no-compile", action="store_true", help="leave out what compiles, and train eagerly")
    add("--minutes", type=float, default=9.0, help="rows that would begin later are left out, and say so")
    add("--threads", type=int, default=0, help="0 = torch's choice")
    add("--out", type=Path, default=Path("runs/benchmarks/fp8"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write rows as they come, then the tables."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    compile = not (options.no_compile or options.quick)
    lab = Lab(device, options.quick, compile, time.monotonic() + 60 * options.minutes, options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rows.jsonl").write_text("")
    about = machine(device)
    (options.out / "machine.json").write_text(json.dumps(about, indent=1))
    print(about)
    for part in (part for part in PARTS if part in options.part):
        if part == "step":
            steps.run(lab, options.shapes)
        else:
            {"reduction": reductions.run, "optimizer": optimizers.run, "large": steps.run_large}[part](lab)
        write(lab, about)
    print((options.out / "table.md").read_text())
    return 0


def write(lab: Lab, about: dict[str, str | int]) -> None:
    """Write the tables of all parts so far."""
    texts = [", ".join(f"{key} {value}" for key, value in about.items())]
    for part in PARTS:
        if rows := [row for row in lab.rows if row.part == part]:
            texts.append(f"### {part}\n\n{markdown(rows)}")
    (lab.out / "table.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
