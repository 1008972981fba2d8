"""Line plots as inline SVG: deterministic, coloured by the page's own style, so they fit light and dark."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from postgrad.core.sections import Plot, Series, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_COLOURS = 6
"""Series colours of the style sheet, --series-0 onwards; later series start over."""
MAX_POINTS = 300
"""A longer series is drawn as means of neighbours, with their range as its band."""

# matplotlib knows no CSS variables: it draws in colours nobody picks, which are then exchanged for names.
_INK, _MUTED, _GRID = "#0a0a01", "#0a0a02", "#0a0a03"
_NAMES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--line)"} | {
    f"#0b0b0{i}": f"var(--series-{i})" for i in range(NUM_COLOURS)
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "postgrad",
    "text.parse_math": False,
    "font.size": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "text.color": _MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}


def draw(plot: Plot) -> str:
    """Draw a plot as one <svg> element, 330 points wide; the same plot gives the same text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    target = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's browser picks the font, not matplotlib
        figure = Figure(figsize=(4.6, 2.75), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for index, series in enumerate(plot.series):
            _draw_series(axes, thin(series, plot.log_x), f"#0b0b0{index % NUM_COLOURS}")
        _draw_axes(axes, plot)
        hidden = {"Date": None, "Creator": None, "Format": None, "Type": None}
        canvas.print_svg(target, metadata=hidden)
    return _clean(target.getvalue(), plot.title)


def thin(series: Series, log_x: bool = False) -> Series:
    """Drop what cannot be drawn (not finite, or x <= 0 on a log axis) and average a long series in groups."""
    keep = [
        i
        for i, (x, y) in enumerate(zip(series.x, series.y, strict=True))
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x)
    ]
    x, y, low, high = ([values[i] for i in keep] if values else [] for values in _columns(series))
    if len(x) <= MAX_POINTS:
        return Series(series.name, tuple(x), tuple(y), tuple(low), tuple(high), series.dashed)
    ends = [round(i * len(x) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    groups = [slice(a, b) for a, b in pairwise(ends)]
    return Series(
        name=series.name,
        x=tuple(_mean(x[g]) for g in groups),
        y=tuple(_mean(y[g]) for g in groups),
        low=tuple(min((low or y)[g]) for g in groups),
        high=tuple(max((high or y)[g]) for g in groups),
        dashed=series.dashed,
    )


def _columns(series: Series) -> tuple[tuple[float, ...], ...]:
    """List the four columns, the band's only if it has both ends."""
    band = (series.low, series.high) if series.low and series.high else ((), ())
    return (series.x, series.y, *band)


def _draw_series(axes: Axes, series: Series, colour: str) -> None:
    """Draw the band, then the line; few points are marked one by one."""
    if series.low:
        finite = [math.isfinite(a) and math.isfinite(b) for a, b in zip(series.low, series.high, strict=True)]
        axes.fill_between(series.x, series.low, series.high, where=finite, color=colour, alpha=0.16, linewidth=0)
    few = len(series.x) <= 16
    axes.plot(
        series.x,
        series.y,
        color=colour,
        linestyle=(0, (4, 2.5)) if series.dashed else "-",
        marker="o" if few else "",
        markersize=3.2,
    )


def _draw_axes(axes: Axes, plot: Plot) -> None:
    """Draw quiet axes: horizontal lines only, the label of y above, that of x below on the right."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_title(plot.y_label, loc="left", fontsize=8.5, color=_MUTED, pad=7)
    axes.set_xlabel(plot.x_label, loc="right", color=_MUTED)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.03, y=0.08)
    values = sorted({x for series in plot.series for x in series.x if math.isfinite(x)})
    if plot.log_x:
        values = [x for x in values if x > 0]
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(FixedLocator([]))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=all(x == int(x) for x in values)))
    if plot.log_x or len(values) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(_spread(values, plot.log_x)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(float(x))))
    decimals = _decimals([float(y) for y in axes.yaxis.get_majorticklocs()])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_number(float(y), decimals)))
    if values and values[0] == values[-1]:
        axes.set_xlim(values[0] * 0.5 - (not plot.log_x), values[0] * 2 + 1)


def _spread(values: Sequence[float], log_x: bool) -> list[float]:
    """Keep the ticks that have room for their labels; the first and the last always do."""
    if len(values) < 3:
        return list(values)
    places = [math.log(x) for x in values] if log_x else list(values)
    room = 0.075 * (places[-1] - places[0])
    kept = [0]
    for i in range(1, len(values) - 1):
        if places[i] - places[kept[-1]] >= room and places[-1] - places[i] >= room:
            kept.append(i)
    return [values[i] for i in (*kept, len(values) - 1)]


def _decimals(ticks: Sequence[float]) -> int | None:
    """Find the decimals that tell ticks apart; None where a power of ten reads better."""
    if max(map(abs, ticks)) < 1e-3:
        return None
    return next((d for d in range(5) if all(abs(tick - round(tick, d)) < 1e-9 for tick in ticks)), None)


def _tick(value: float) -> str:
    """Label a tick of x: thousands set apart, no superfluous zeros."""
    return format_number(value, 0 if value == int(value) and abs(value) < 1e6 else None)


def _clean(svg: str, title: str) -> str:
    """Cut the file down to its <svg> element, name it for screen readers and hand the colours to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # several plots share a page: ids of groups would clash
    svg = re.sub(r" font-family: [^;\"]*;?| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    svg = re.sub(r"\s+", " ", svg).replace("> <", ">\n<")
    for colour, name in _NAMES.items():
        svg = svg.replace(colour, name)
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "matplotlib wrote an SVG without a viewBox"
    body = svg[svg.index(">") + 1 :].strip()
    label = escape(title, quote=True)
    return f'<svg viewBox="{box.group(1)}" role="img" aria-label="{label}" class="plot">\n{body}'


def _mean(values: Sequence[float]) -> float:
    """Average."""
    return math.fsum(values) / len(values)
