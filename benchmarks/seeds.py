"""Run the built-in `postgrad align` over several seeds and print gold scores with their intervals.

    python -m benchmarks.seeds --folder runs/seeds --seeds 0 1 2

Finished seeds are read, not run again. Exit status 1 when a bar is missed: rejection sampling and DPO each above SFT
beyond both 95 % intervals, DPO not below rejection sampling.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

POLICIES = ("sft", "control", "rejection", "dpo")


def results(folder: Path, seed: int) -> dict[str, float]:
    """Run one seed, or read what it found."""
    run = folder / f"seed{seed}"
    command = [sys.executable, "-m", "postgrad", "align", "--runtime.folder", str(run), "--runtime.seed", str(seed)]
    subprocess.run([*command, "--runtime.quiet"], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, float] = json.loads((run / "result.json").read_text())["results"]
    return found


def met(found: dict[str, float]) -> bool:
    """Say whether a seed meets the bars."""
    above = all(found[f"{name}_gold_low"] > found["sft_gold_high"] for name in ("rejection", "dpo"))
    return above and found["dpo_gold"] >= found["rejection_gold"]


def main() -> int:
    """Print one row a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    table = Table("seed", *POLICIES, "bars met", title="Gold score on held-out prompts, 95 % interval over prompts")
    verdicts = []
    for seed in arguments.seeds:
        found = results(arguments.folder, seed)
        cells = [
            f"{found[f'{name}_gold']:.3f} ({found[f'{name}_gold_low']:.3f} to {found[f'{name}_gold_high']:.3f})"
            for name in POLICIES
        ]
        verdicts.append(met(found))
        table.add_row(str(seed), *cells, "yes" if verdicts[-1] else "no")
    Console(width=140).print(table)
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
