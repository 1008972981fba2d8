"""A detector's small service with its base, as `postgrad forget_boxes` leaves them: made once, then copied."""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from cases import case
from forgotten import Made

from postgrad.core.runtime import Job
from postgrad.forgetting.box_files import BoxesConfig
from postgrad.forgetting.forget_boxes import run

SEED = 3
DATA = BoxesConfig(limit=24)


def job(folder: Path) -> Job:
    """Make a run's frame without starting a run."""
    folder.mkdir(parents=True, exist_ok=True)
    return Job("forget_boxes", folder, SEED, torch.device("cpu"), torch.float32, 0, 1, True)


@cache
def _original() -> tuple[TemporaryDirectory[str], Made]:
    """Train a detector for a moment and serve two requests: the ring, then the square."""
    keeper = TemporaryDirectory()
    config = case("forget_boxes", Path(keeper.name))
    folder = Path(keeper.name) / "run"
    run(replace(config, revoke=(), runtime=replace(config.runtime, folder=str(folder))))
    return keeper, Made(folder / "service", folder / "base" / "model")


def forgotten_boxes(folder: Path) -> Made:
    """Copy a service that has two requests in use, request-1 and request-2, and its base into a folder."""
    made = Made(folder / "service", folder / "base")
    _, original = _original()
    shutil.copytree(original.service, made.service)
    shutil.copytree(original.model, made.model)
    return made
