"""Runs of methods in tests: a configuration sent to a folder, a finished run, a process that dies."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from postgrad.core.config import RuntimeConfig
from postgrad.core.report import Report

Config = TypeVar("Config")


class Killed(BaseException):
    """Stands for a process that dies: nothing is meant to catch it."""


@dataclass(frozen=True)
class Done:
    """A finished run."""

    config: Any
    report: Report
    folder: Path

    @property
    def service(self) -> Path:
        """Name the folder of its service."""
        return self.folder / "service"


def at(folder: Path, config: Config, **changes: Any) -> Config:
    """Send a run to a folder."""
    runtime = RuntimeConfig(folder=str(folder), seed=3, device="cpu", quiet=True)
    return replace(config, runtime=runtime, **changes)  # type: ignore[type-var]
