"""One run in a process of its own: a setting as JSON in, what it measured as JSON out."""

import json
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

from benchmarks.alignment.data import load
from benchmarks.alignment.setting import Measured, Setting


def run(setting: Setting) -> Measured:
    """Run one system on its task."""
    trees, _ = load(setting.data, setting.num, setting.vocabulary, seed=setting.seed, folder=Path(setting.folder))
    with tempfile.TemporaryDirectory() as folder:
        if setting.system == "postgrad":
            from benchmarks.alignment import ours

            return ours.run(setting, trees, Path(folder) / "run")
        from benchmarks.alignment import peer

        return peer.run(setting, trees, Path(folder) / "run")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = run(Setting(**json.loads(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(asdict(found)))
