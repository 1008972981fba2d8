"""Runs in a process of their own: settings as JSON and a file of rows in, a file of what each measured out.

On a CPU a process runs one setting, for a process's peak memory never falls; on a GPU several, one after another.
"""

import gc
import json
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

from benchmarks.alignment.data import saved
from benchmarks.alignment.setting import Measured, Setting
from postgrad.core.rows import Tree


def run(setting: Setting, trees: list[Tree]) -> Measured:
    """Run one system on the rows of its task."""
    with tempfile.TemporaryDirectory() as folder:
        if setting.system == "postgrad":
            from benchmarks.alignment import ours

            return ours.run(setting, trees, Path(folder) / "run")
        from benchmarks.alignment import peer

        return peer.run(setting, trees, Path(folder) / "run")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    trees = saved(Path(sys.argv[2]))
    found = []
    for setting in json.loads(sys.argv[1]):
        found.append(asdict(run(Setting(**setting), trees)))
        gc.collect()
    Path(sys.argv[3]).write_text(json.dumps(found))
