"""Results as plain data, and the ways to show them: metrics.jsonl, the terminal, report.html."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from postgrad.core.files import write_text
from postgrad.core.page import render
from postgrad.core.plots import MAX_POINTS, thin
from postgrad.core.sections import (
    Cell,
    Note,
    Plot,
    Report,
    Section,
    Series,
    Table,
    format_cell,
    format_column,
    is_interval_end,
    is_number,
    key_results,
)

__all__ = [
    "METRICS",
    "TENSORS",
    "TIMING",
    "Cell",
    "Note",
    "Plot",
    "Report",
    "Section",
    "Series",
    "Table",
    "log_metrics",
    "print_report",
    "read_metrics",
    "training_sections",
    "write_report",
]

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
MAX_TERMINAL_ROWS = 16
MAX_TERMINAL_CHARS = 160
UNPLOTTED = frozenset({"step", "tokens", "seconds"})
"""Logged counters whose curve would say nothing."""
TENSORS = "tensors"
"""The key of figures of single tensors, thousands of them: whoever logs them plots them."""
_TONES = {"info": "blue", "good": "green", "warning": "yellow"}
_BARS = "▁▂▃▄▅▆▇█"


def log_metrics(folder: Path, row: Mapping[str, object], name: str = METRICS) -> None:
    """Append one JSON line to a log of the run; NaN and infinity become null.

    Args:    name: metrics.jsonl for what a repeated run repeats exactly; timing.jsonl for seconds and rates.
    """
    line = json.dumps({key: _finite(value) for key, value in row.items()}, ensure_ascii=False, allow_nan=False)
    with (folder / name).open("a", encoding="utf-8", newline="\n") as file:
        file.write(line + "\n")


def read_metrics(folder: Path, name: str = METRICS) -> list[dict[str, object]]:
    """Read a log of the run, without the half line a killed run may leave; none if there is no such file."""
    path = folder / name
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    rows: list[dict[str, object]] = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return rows


def write_report(report: Report, title: str) -> Path:
    """Write report.html into the run folder, whole or not at all; show its config and environment."""
    path = report.folder / "report.html"
    write_text(path, render(report, title))
    return path


def print_report(report: Report) -> None:
    """Show a report in the terminal."""
    console = Console()
    console.print()
    console.print(Text(f"postgrad {report.method}", style="bold") + Text(f"  {report.folder}", style="dim"))
    results = RichTable.grid(padding=(0, 3))
    results.add_column(style="dim")
    results.add_column(style="bold", overflow="fold")
    for name, value, interval in key_results(report.results):
        results.add_row(Text(name), Text(format_cell(value)) + Text(f"  {interval}", style="not bold dim"))
    console.print(results)
    for section in report.sections:
        console.print()
        console.print(_for_terminal(section))


def training_sections(folder: Path) -> tuple[Section, ...]:
    """Plot the numbers of metrics.jsonl and timing.jsonl over the steps, all but mere counters.

    Names that differ only in an "eval/" or "train/" in front share a plot, so a loss stands beside the
    held-out one. A number logged at one step only is no curve. A step that was logged twice, because a run
    went on from a checkpoint, counts once.
    """
    plots: list[Section] = []
    for name in (METRICS, TIMING):
        columns = _columns(read_metrics(folder, name))
        lines = [key for key in columns if not is_interval_end(key, columns)]
        curves = (_curves(title, columns) for title in dict.fromkeys(map(_family, lines)))
        plots += [plot for plot in curves if any(len(line.x) > 1 for line in plot.series)]
    return tuple(plots)


def _columns(rows: Iterable[Mapping[str, object]]) -> dict[str, dict[float, float]]:
    """Turn rows with a "step" into step -> value for each number, in order of first appearance."""
    columns: dict[str, dict[float, float]] = {}
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int | float):
            continue
        for key, value in _leaves("", {name: value for name, value in row.items() if name != TENSORS}):
            if key not in UNPLOTTED and isinstance(value, int | float) and is_number(value):
                columns.setdefault(key, {})[float(step)] = float(value)
    return columns


def _curves(title: str, columns: Mapping[str, Mapping[float, float]]) -> Plot:
    """Plot the numbers of one family; the held-out one is dashed, and has its interval if it was logged."""
    series = tuple(_curve(key, columns) for key in columns if _family(key) == title)
    long = any(len(line.x) > MAX_POINTS for line in series)
    note = "The line is the mean of neighbouring steps, the band their range." if long else ""
    return Plot(title.replace("_", " "), "step", "", series, note=note)


def _curve(key: str, columns: Mapping[str, Mapping[float, float]]) -> Series:
    """Make the line of one number, with a band from `<key>_low` to `<key>_high` where both are logged."""
    points = columns[key]
    steps = tuple(sorted(points))
    low, high = columns.get(f"{key}_low", {}), columns.get(f"{key}_high", {})
    band = bool(low) and bool(high)
    return Series(
        name=key,
        x=steps,
        y=tuple(points[step] for step in steps),
        low=tuple(low.get(step, math.nan) for step in steps) if band else (),
        high=tuple(high.get(step, math.nan) for step in steps) if band else (),
        dashed=key.startswith(("eval", "held_out")),
    )


def _family(key: str) -> str:
    """Name what is measured, apart from where it is measured."""
    for prefix in ("eval/", "train/", "eval_", "train_", "held_out/", "held_out_"):
        key = key.removeprefix(prefix)
    return key


def _leaves(name: str, value: object) -> Iterable[tuple[str, object]]:
    """List the leaves of a nested row as a/b and value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}/{key}" if name else str(key), inner)
    else:
        yield name, value


def _finite(value: object) -> object:
    """Replace what JSON cannot say."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _for_terminal(section: Section) -> RenderableType:
    """Make a section printable."""
    match section:
        case Table():
            return _text_table(section)
        case Plot():
            return _text_plot(section)
        case Note():
            return Panel(Text(section.text), title=Text(section.title), title_align="left", style=_TONES[section.kind])


def _text_table(table: Table) -> RenderableType:
    """Show the top of a table; columns of figures are set to the right, long texts are cut."""
    rows, more = table.rows[:MAX_TERMINAL_ROWS], len(table.rows) - MAX_TERMINAL_ROWS
    shown = RichTable(box=SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for i, name in enumerate(table.columns):
        figures = all(is_number(row[i]) for row in rows)
        shown.add_column(Text(name), justify="right" if figures else "left", overflow="fold")
    texts = [format_column([row[i] for row in rows]) for i in range(len(table.columns))]
    for cells in zip(*texts, strict=True):
        shown.add_row(*(Text(_cut(cell)) for cell in cells))
    notes = [f"{more} more rows in report.html"] if more > 0 else []
    notes += [table.note] if table.note else []
    return Group(Text(table.title, style="bold"), shown, *(_note(text) for text in notes))


def _cut(text: str) -> str:
    """Keep the beginning of a long text."""
    return text if len(text) <= MAX_TERMINAL_CHARS else text[: MAX_TERMINAL_CHARS - 1].rstrip() + "…"


def _text_plot(plot: Plot) -> RenderableType:
    """Show each line of a plot as small bars between its first and last value."""
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(justify="right")
    grid.add_column()
    grid.add_column(justify="right")
    for series in plot.series:
        points = thin(series, plot.log_x).y
        if points:
            first, last = format_cell(float(points[0])), format_cell(float(points[-1]))
            grid.add_row(Text(series.name), first, Text(_bars(points), style="cyan"), last)
    heading = Text(plot.title, style="bold") + Text(f"  over {plot.x_label}", style="dim")
    return Group(heading, grid, *([_note(plot.note)] if plot.note else []))


def _bars(points: tuple[float, ...], width: int = 40) -> str:
    """Draw a line in one row of text."""
    count = min(width, len(points))
    picked = [points[round(i * (len(points) - 1) / max(1, count - 1))] for i in range(count)]
    low, high = min(picked), max(picked)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in picked)


def _note(text: str) -> Text:
    """Make small print."""
    return Text(text, style="dim")
