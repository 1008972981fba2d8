"""report.html: one calm file without scripts or network, for light and dark, wide and narrow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path

from postgrad.core.plots import NUM_COLOURS, draw
from postgrad.core.sections import (
    Cell,
    Note,
    Plot,
    Report,
    Result,
    Section,
    Series,
    Table,
    format_cell,
    format_column,
    is_number,
    key_results,
)

NUM_KEY_RESULTS = 6
"""Results shown large; the others follow in small print."""
MAX_OPEN_CHARS = 480
"""A longer text cell is folded."""
MAX_POINTS_LISTED = 24
"""A plot with at most so many points of x lists them in a table under it."""

# Figures that arrive as text: 0.52 ± 0.03, 12 %, 1e-5, 3/4, [0.1, 0.2].
_FIGURE = re.compile(r"[\[(]?[<>≤≥~+\-−]?\d[\d.,]*(e[+\-−]?\d+)?([\s%×x±/\[\](),–+\-−\d.e]|to|of)*", re.I)


def render(report: Report, title: str) -> str:
    """Write the page: headline, key results, sections in order, config and environment."""
    body = [
        f'<p class="kicker"><b>postgrad {escape(report.method)}</b> · {escape(report.folder.name)}</p>',
        f"<h1>{escape(title)}</h1>",
        _results(report.results),
        _contents(report.sections),
        *_sections(report.sections),
        f"<footer>{_config(report.folder)}{_environment(report.folder)}</footer>",
    ]
    style = files("postgrad.core").joinpath("report.css").read_text(encoding="utf-8")
    lines = "\n".join(part for part in body if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{lines}\n</main>\n</body>\n</html>\n"
    )


def _results(results: Mapping[str, Cell]) -> str:
    """Show the first figures large, the rest as a list."""
    items = key_results(results)
    large = [item for item in items if is_number(item.value) or len(str(item.value)) <= 60][:NUM_KEY_RESULTS]
    cards = "".join(_card(item) for item in large)
    lines = "".join(_line(item) for item in items if item not in large)
    columns = 4 if len(large) == 4 else 3
    shown = f'<dl class="key" style="--columns:{columns}">{cards}</dl>' if cards else ""
    return shown + (f'\n<dl class="more">{lines}</dl>' if lines else "")


def _card(item: Result) -> str:
    """Write a result large, its interval small below."""
    text = escape(format_cell(item.value))
    kind = "figure" if _is_figure(item.value) else "words"
    size = " wide" if kind == "figure" and len(text) > 12 else ""
    interval = f"<small>{escape(item.interval)}</small>" if item.interval else ""
    return f'<div><dt>{escape(item.name)}</dt><dd class="{kind}{size}">{text}{interval}</dd></div>'


def _line(item: Result) -> str:
    """Write a result as a line of a list."""
    text = format_cell(item.value) + (f" ({item.interval})" if item.interval else "")
    return f"<div><dt>{escape(item.name)}</dt><dd>{escape(text)}</dd></div>"


def _contents(sections: Sequence[Section]) -> str:
    """List the sections of a long page."""
    titles = [(i, s.title) for i, s in enumerate(sections) if isinstance(s, Table | Plot)]
    if len(titles) < 6:
        return ""
    return "<nav>" + "".join(f'<a href="#s{i}">{escape(title)}</a>' for i, title in titles) + "</nav>"


def _sections(sections: Sequence[Section]) -> Iterable[str]:
    """Write each section; neighbouring plots share a grid, neighbouring notes a block."""
    for kind, group in groupby(enumerate(sections), key=lambda item: type(item[1])):
        members = list(group)
        if kind is Plot:
            yield ('<div class="plots">' + "\n".join(_plot(i, s) for i, s in members if isinstance(s, Plot)) + "</div>")
        elif kind is Note:
            yield "<section>" + "\n".join(_note(s) for _, s in members if isinstance(s, Note)) + "</section>"
        else:
            yield from (_table_section(i, s) for i, s in members if isinstance(s, Table))


def _note(note: Note) -> str:
    """Write a coloured note."""
    return f'<aside class="note {note.kind}"><h2>{escape(note.title)}</h2><p>{escape(note.text)}</p></aside>'


def _plot(index: int, plot: Plot) -> str:
    """Write a plot with its legend and, if short, its figures."""
    lines = "".join(_legend_line(i, series) for i, series in enumerate(plot.series))
    legend = f'<ul class="legend">{lines}</ul>' if len(plot.series) > 1 else ""
    return (
        f'<figure id="s{index}"><h2>{escape(plot.title)}</h2>{_caption(plot.note)}'
        f"{draw(plot)}{legend}{_figures(plot)}</figure>"
    )


def _legend_line(index: int, series: Series) -> str:
    """Write one line of a legend."""
    line = "dashed" if series.dashed else "solid"
    style = f"border-color:var(--series-{index % NUM_COLOURS})"
    return f'<li><i class="{line}" style="{style}"></i>{escape(series.name)}</li>'


def _figures(plot: Plot) -> str:
    """List the points of a plot, folded away, when they are few."""
    places = sorted({x for s in plot.series for x in s.x})
    if not 0 < len(places) <= MAX_POINTS_LISTED:
        return ""
    columns: list[str] = [plot.x_label]
    values: list[list[Cell]] = [[int(x) if x == int(x) else x for x in places]]
    for series in plot.series:
        band = series.low and series.high
        parts = [(series.name, series.y)]
        parts += [(f"{series.name}, low", series.low), (f"{series.name}, high", series.high)] if band else []
        for name, column in parts:
            at = dict(zip(series.x, column, strict=True))
            columns.append(name)
            values.append([at.get(x, "") for x in places])
    rows = tuple(zip(*values, strict=True))
    return f"<details><summary>Values</summary>{_table(tuple(columns), rows)}</details>"


def _table_section(index: int, table: Table) -> str:
    """Write a table with its title and note."""
    head = f"<h2>{escape(table.title)}</h2>{_caption(table.note)}"
    return f'<section id="s{index}">{head}{_table(table.columns, table.rows)}</section>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Write a table; columns of figures are set to the right, long texts wrap and fold."""
    kinds = [_kind([row[i] for row in rows]) for i in range(len(columns))]
    texts = [format_column([row[i] for row in rows]) for i in range(len(columns))]
    head = "".join(
        f'<th scope="col" class="{kind}">{escape(name)}</th>' for kind, name in zip(kinds, columns, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(f'<td class="{kinds[i]}">{_cell(texts[i][r])}</td>' for i in range(len(columns))) + "</tr>"
        for r in range(len(rows))
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _kind(cells: Sequence[Cell]) -> str:
    """Tell a column of figures from one of words and one of long texts."""
    if any(c != "" for c in cells) and all(c == "" or _is_figure(c) for c in cells):
        return "figure"
    return "text long" if any(len(str(c)) > 60 for c in cells) else "text"


def _is_figure(cell: Cell) -> bool:
    """Tell whether a cell reads as a figure."""
    return is_number(cell) or cell in ("–", "-") or bool(_FIGURE.fullmatch(str(cell).strip()))


def _cell(text: str) -> str:
    """Write a cell; a long text shows its beginning and unfolds."""
    if len(text) <= MAX_OPEN_CHARS:
        return escape(text)
    start = text[: MAX_OPEN_CHARS // 2].rsplit(maxsplit=1)[0].rstrip()
    rest = text[len(start) :].lstrip()
    return f"<details><summary>{escape(start)} …</summary>{escape(rest)}</details>"


def _caption(note: str) -> str:
    """Write the small print under a title."""
    return f'<p class="caption">{escape(note)}</p>' if note else ""


def _config(folder: Path) -> str:
    """Show the recipe that runs this again."""
    path = folder / "config.toml"
    if not path.is_file():
        return ""
    return f"<details><summary>Config</summary><pre>{escape(path.read_text(encoding='utf-8'))}</pre></details>"


def _environment(folder: Path) -> str:
    """Show what the run ran on."""
    path = folder / "environment.json"
    if not path.is_file():
        return ""
    rows = tuple(_flatten("", json.loads(path.read_text(encoding="utf-8"))))
    return f"<details><summary>Environment</summary>{_table(('', 'found'), rows)}</details>"


def _flatten(name: str, value: object) -> Iterable[tuple[str, str]]:
    """List the leaves of nested JSON as dotted name and text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(f"{name}.{key}" if name else str(key), inner)
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
