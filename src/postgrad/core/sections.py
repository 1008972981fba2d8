"""What a report is made of: plain data, and how one figure is written."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

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
    """What a run found: its key results, the most telling first, then sections."""

    method: str
    folder: Path
    results: Mapping[str, Cell]
    sections: tuple[Section, ...] = ()


class Result(NamedTuple):
    """A key result as shown, with the interval the run reports beside it."""

    name: str
    value: Cell
    interval: str = ""


def key_results(results: Mapping[str, Cell]) -> list[Result]:
    """List results in words; `x_low` and `x_high` become the interval of `x`."""
    shown = []
    for name, value in results.items():
        low, high = results.get(f"{name}_low"), results.get(f"{name}_high")
        interval = ""
        if low is not None and high is not None:
            interval = " to ".join(format_column([value, low, high])[1:])
        if not is_interval_end(name, results):
            shown.append(Result(name.replace("_", " "), value, interval))
    return shown


def is_interval_end(name: str, names: Container[str]) -> bool:
    """Tell whether a figure is the end of another's interval, `x_low` or `x_high` beside `x`."""
    stem = name.removesuffix("_low").removesuffix("_high")
    return stem != name and all(part in names for part in (stem, f"{stem}_low", f"{stem}_high"))


def is_number(cell: object) -> bool:
    """Tell figures from text; a truth value is text."""
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def format_cell(cell: Cell) -> str:
    """Write one figure alone, with four digits; text stays as it is."""
    return format_column([cell])[0]


def format_column(cells: Sequence[Cell]) -> list[str]:
    """Write a column whose figures compare at a glance: equal decimals, four digits of the largest.

    Figures too small for that, or too far apart, keep three digits each. A missing figure (NaN) is a dash.
    """
    floats = [abs(c) for c in cells if isinstance(c, float) and math.isfinite(c) and c != 0]
    largest = max(floats, default=1.0)
    decimals = min(4, max(int(largest < 1e4), 3 - math.floor(math.log10(largest))))
    far_apart = min(floats, default=1.0) < 0.5 * 10**-decimals or largest >= 1e7
    return [_format(cell, None if far_apart else decimals) for cell in cells]


def _format(cell: Cell, decimals: int | None) -> str:
    """Write one cell; without decimals a float keeps three digits."""
    if isinstance(cell, str | bool):
        return str(cell)
    if isinstance(cell, int):
        return f"{cell:,}".replace("-", "−")
    return format_number(cell, decimals)


def format_number(value: float, decimals: int | None) -> str:
    """Write a figure with thousands set apart; without decimals in three digits, 5e-7 if very small."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = _short(abs(value)) if decimals is None else f"{abs(value):,.{decimals}f}"
    return "−" + text if value < 0 and text.strip("0.,") else text


def _short(value: float) -> str:
    """Write three digits of a figure that is not negative; with an exponent below a thousandth, 5e-7."""
    digits, mark, exponent = (f"{value:.2e}" if 0 < value < 1e-3 else f"{value:.3g}").partition("e")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return f"{digits}e{int(exponent)}" if mark else digits
