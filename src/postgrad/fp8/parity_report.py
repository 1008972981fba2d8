"""What a comparison of number formats found: gaps to the reference, a verdict by numbers, curves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from postgrad.core.report import Cell, Note, Plot, Section, Series, Table

REFERENCE = "reference"
PARITY, NO_PARITY, NOTHING_SHOWN = "parity", "no parity", "nothing shown"
CONTROLS = ("e4m3_v", "e4m3_master")
"""Recipes that the paper found to fail: a comparison that cannot tell them from full precision shows nothing."""


@dataclass(frozen=True)
class Curve:
    """One run: its last held-out loss, infinite where it came apart, and both losses by step."""

    loss: float
    train: Mapping[int, float] = field(default_factory=dict)
    held: Mapping[int, float] = field(default_factory=dict)
    diverged: str = ""


@dataclass(frozen=True)
class Gap:
    """How far a candidate is from the reference, in percent of its loss, a figure a seed."""

    name: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; NaN of one seed, or where a run came apart."""
        finite = all(map(math.isfinite, self.values))
        return stdev(self.values) if finite and len(self.values) > 1 else math.nan


def gap_of(name: str, candidate: Sequence[Curve], reference: Sequence[Curve]) -> Gap:
    """Compare runs seed by seed: 100 (candidate - reference) / reference."""
    pairs = zip(candidate, reference, strict=True)
    return Gap(name, tuple(100 * (mine.loss - other.loss) / other.loss for mine, other in pairs))


def seed_spread(reference: Sequence[Curve]) -> float:
    """Return the standard deviation of the reference's loss over seeds, in percent of its mean; NaN of one seed."""
    losses = [curve.loss for curve in reference]
    return 100 * stdev(losses) / fmean(losses) if len(losses) > 1 else math.nan


def holds(gap: Gap, spread: float, bar: float) -> bool:
    """Tell whether a candidate did what is expected of it.

    A control has to be above the bar by more than a standard error. Others have to be within the bar and, where that
    is known, within the spread over seeds.
    """
    if gap.name in CONTROLS:
        error = 0.0 if math.isnan(gap.spread) else gap.spread / math.sqrt(len(gap.values))
        return gap.mean - error > bar
    return abs(gap.mean) <= bar and not abs(gap.mean) > spread


def verdict(gaps: Sequence[Gap], spread: float, bar: float) -> str:
    """Sum up: parity needs every candidate to hold and every control to fail."""
    tested = [gap for gap in gaps if gap.name not in CONTROLS]
    if not all(holds(gap, spread, bar) for gap in tested):
        return NO_PARITY
    controls_fail = all(holds(gap, spread, bar) for gap in gaps if gap.name in CONTROLS)
    return PARITY if tested and controls_fail else NOTHING_SHOWN


def comparison(
    curves: Mapping[str, Sequence[Curve]], seeds: Sequence[int], bar: float
) -> tuple[dict[str, Cell], tuple[Section, ...]]:
    """Put runs side by side; give the key results and the sections of the report.

    Args:    curves: of the reference and each candidate, one a seed.
    """
    reference = curves[REFERENCE]
    gaps = [gap_of(name, found, reference) for name, found in curves.items() if name != REFERENCE]
    spread = seed_spread(reference)
    results: dict[str, Cell] = {"verdict": verdict(gaps, spread, bar)}
    for gap in gaps:
        key = f"gap_percent_{gap.name}"
        results |= {key: gap.mean, f"{key}_low": min(gap.values), f"{key}_high": max(gap.values)}
    results |= {"seed_spread_percent": spread, "reference_loss": fmean(curve.loss for curve in reference)}
    tested = [name for name in curves if name not in (REFERENCE, *CONTROLS)]
    controls = [name for name in curves if name in CONTROLS]
    sections: list[Section] = [
        _note(gaps, spread, bar),
        _verdicts(gaps, spread, bar),
        _losses(curves, gaps, seeds),
        _curves("Losses in training and held out", [REFERENCE, *tested], curves),
        _gap_curves("Gap to the reference", tested, curves),
        _curves("Losses of the controls", [REFERENCE, *controls], curves),
        _gap_curves("Gap of the controls to the reference", controls, curves),
    ]
    told = [section for section in sections if not isinstance(section, Plot) or len(section.series) > 0]
    return results, tuple(told)


def _note(gaps: Sequence[Gap], spread: float, bar: float) -> Note:
    """Say in words what the verdict means."""
    found = verdict(gaps, spread, bar)
    parts = [f"{gap.name} {_percent(gap.mean)}" for gap in gaps]
    told = f"Mean gaps of the last held-out loss: {', '.join(parts)}; {_of_seeds(spread)}."
    match found:
        case _ if found == PARITY:
            return Note("Parity", f"{told} What should follow full precision does, what should fail fails.", "good")
        case _ if found == NO_PARITY:
            bad = [gap.name for gap in gaps if gap.name not in CONTROLS and not holds(gap, spread, bar)]
            return Note("No parity", f"{told} Out of the bar of {bar:g} %: {', '.join(bad)}.", "warning")
    mild = [gap.name for gap in gaps if gap.name in CONTROLS and not holds(gap, spread, bar)]
    why = f"the controls {', '.join(mild)} do not fail as they should" if mild else "no candidate was tested"
    return Note("Nothing shown", f"{told} But {why}: train longer, or on harder text.", "warning")


def _of_seeds(spread: float) -> str:
    """Say how far seeds alone are apart."""
    known = not math.isnan(spread)
    return f"the reference's standard deviation over seeds is {spread:.3f} %" if known else "one seed has no spread"


def _percent(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:+.3f} %" if math.isfinite(value) else "without end"


def _verdicts(gaps: Sequence[Gap], spread: float, bar: float) -> Table:
    """List mean gaps and what was asked of each."""
    rows: list[tuple[Cell, ...]] = []
    for gap in gaps:
        control = gap.name in CONTROLS
        asked = f"{'above' if control else 'within'} {bar:g} %"
        right, wrong = ("fails, as it should", "does not fail") if control else ("parity", "no parity")
        rows.append((gap.name, gap.mean, gap.spread, asked, right if holds(gap, spread, bar) else wrong))
    note = (
        f"Gaps in percent of the reference's loss, paired by seed; {_of_seeds(spread)}, and a candidate's mean gap has "
        "to be within that too."
    )
    return Table("Verdict", ("candidate", "mean gap, %", "sd over seeds", "asked for", "found"), tuple(rows), note)


def _losses(curves: Mapping[str, Sequence[Curve]], gaps: Sequence[Gap], seeds: Sequence[int]) -> Table:
    """List the last held-out loss of every run, and its gap."""
    values = {gap.name: gap.values for gap in gaps}
    rows = tuple(
        (name, seed, curve.loss, values[name][i] if name in values else math.nan, curve.diverged)
        for name, found in curves.items()
        for i, (seed, curve) in enumerate(zip(seeds, found, strict=True))
    )
    columns = ("run", "seed", "held-out loss", "gap to the reference, %", "came apart")
    kept = len(columns) if any(row[-1] for row in rows) else len(columns) - 1
    return Table("Last held-out loss of every run", columns[:kept], tuple(row[:kept] for row in rows))


def _curves(title: str, names: Sequence[str], curves: Mapping[str, Sequence[Curve]]) -> Plot:
    """Plot both losses, the mean over seeds; held-out ones dashed and with their range.

    Training begins with the first evaluation: the fall before it would leave no room for what differs.
    """
    series = []
    for name in names if len(names) > 1 else ():
        training = [
            {step: loss for step, loss in curve.train.items() if step >= min(curve.held, default=0)}
            for curve in curves[name]
        ]
        line = _over_seeds(f"{name}, training", training, band=False)
        held = _over_seeds(f"{name}, held out", [curve.held for curve in curves[name]], band=True, dashed=True)
        series += [each for each in (line, held) if len(each.x) > 1]
    return Plot(title, "step", "nats a token", tuple(series), note="Mean over seeds; bands are their range.")


def _gap_curves(title: str, names: Sequence[str], curves: Mapping[str, Sequence[Curve]]) -> Plot:
    """Plot the gap of the held-out loss at every evaluation, paired by seed."""
    series = []
    for name in names:
        pairs = zip(curves[name], curves[REFERENCE], strict=True)
        each = [
            {step: 100 * (mine.held[step] / other.held[step] - 1) for step in mine.held if step in other.held}
            for mine, other in pairs
        ]
        line = _over_seeds(name, each, band=True)
        series += [line] if len(line.x) > 1 else []
    return Plot(title, "step", "percent of the held-out loss", tuple(series), note="Mean over seeds, and their range.")


def _over_seeds(name: str, found: Sequence[Mapping[int, float]], *, band: bool, dashed: bool = False) -> Series:
    """Average curves over seeds, at the steps that all of them reached."""
    steps = sorted(set.intersection(*(set(curve) for curve in found)))
    columns = [[curve[step] for curve in found] for step in steps]
    wide = band and len(found) > 1
    return Series(
        name=name,
        x=tuple(map(float, steps)),
        y=tuple(map(fmean, columns)),
        low=tuple(map(min, columns)) if wide else (),
        high=tuple(map(max, columns)) if wide else (),
        dashed=dashed,
    )
