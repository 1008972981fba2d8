"""The comparison by hand: gaps, spread, verdicts, and what the report shows of them."""

import math

import pytest

from postgrad.core.report import Note, Plot, Table
from postgrad.fp8.parity_report import (
    NO_PARITY,
    NOTHING_SHOWN,
    PARITY,
    REFERENCE,
    Curve,
    Gap,
    comparison,
    gap_of,
    holds,
    seed_spread,
    verdict,
)

REFERENCES = [Curve(2.0), Curve(2.2)]


def test_gaps_are_paired() -> None:
    """2.02 beside 2.0 and 2.178 beside 2.2: 1 and -1 percent, mean 0, standard deviation sqrt 2."""
    gap = gap_of("O2", [Curve(2.02), Curve(2.178)], REFERENCES)
    assert gap.values == pytest.approx((1.0, -1.0))
    assert gap.mean == pytest.approx(0.0, abs=1e-9) and gap.spread == pytest.approx(math.sqrt(2))


def test_seed_spread_by_hand() -> None:
    """2.0 and 2.2: standard deviation 0.1 sqrt 2 of a mean of 2.1. One seed has none."""
    assert seed_spread(REFERENCES) == pytest.approx(100 * 0.1 * math.sqrt(2) / 2.1)
    assert math.isnan(seed_spread(REFERENCES[:1]))


@pytest.mark.parametrize(
    ("name", "mean", "spread", "expected"),
    [
        ("O2", 0.3, 1.0, True),
        ("O2", 0.31, 1.0, False),
        ("O2", -0.31, 1.0, False),
        ("O2", 0.2, 0.1, False),
        ("O2", 0.2, math.nan, True),
        ("O2", math.inf, 1.0, False),
        ("e4m3_v", 0.31, 1.0, True),
        ("e4m3_v", 0.3, 1.0, False),
        ("e4m3_v", math.inf, 1.0, True),
        ("e4m3_master", 5.1, 9.0, True),
        ("e4m3_master", 0.29, 1.0, False),
    ],
)
def test_what_is_asked_of_each(name: str, mean: float, spread: float, expected: bool) -> None:
    """Candidates stay within bar and spread, controls have to be above the bar."""
    assert holds(Gap(name, (mean,)), spread, 0.3) is expected


def test_a_control_is_above_the_bar_by_more_than_a_standard_error() -> None:
    """Mean 0.5, sd 0.2 sqrt(2), standard error 0.2: it is 0.3 at least."""
    assert holds(Gap("e4m3_v", (0.3, 0.7)), 1.0, 0.299) and not holds(Gap("e4m3_v", (0.3, 0.7)), 1.0, 0.301)


def test_verdicts() -> None:
    """A candidate that fails decides; controls that do not fail leave nothing shown."""
    good, bad = Gap("O2", (0.1, 0.1)), Gap("O1", (0.9, 0.9))
    fails, mild = Gap("e4m3_v", (3.0, 3.0)), Gap("e4m3_master", (0.1, 0.9))
    assert verdict([good, fails], 1.0, 0.3) == verdict([good], 1.0, 0.3) == PARITY
    assert verdict([good, bad, fails], 1.0, 0.3) == verdict([bad, mild], 1.0, 0.3) == NO_PARITY
    assert verdict([good, fails, mild], 1.0, 0.3) == verdict([fails], 1.0, 0.3) == NOTHING_SHOWN


def curve(end: float, steps: int = 3) -> Curve:
    """A line down to a loss."""
    held = {step: end + steps - step for step in range(1, steps + 1)}
    return Curve(end, {step: value + 1 for step, value in held.items()}, held)


def test_the_report_of_a_comparison() -> None:
    """Two seeds, a candidate and a control of which one run came apart after two steps."""
    torn = Curve(math.inf, {1: 5.0}, {1: 4.0, 2: 3.5}, "Step 3: not finite")
    curves = {
        REFERENCE: [curve(2.0), curve(2.2)],
        "O2": [curve(2.002), curve(2.2022)],
        "e4m3_v": [curve(2.5), torn],
    }
    results, sections = comparison(curves, [7, 8], 0.3)
    assert results["verdict"] == PARITY and next(iter(results)) == "verdict"
    assert results["gap_percent_O2"] == pytest.approx(0.1)
    assert results["gap_percent_O2_low"] == pytest.approx(results["gap_percent_O2_high"], abs=1e-9)
    assert results["gap_percent_e4m3_v"] == math.inf and results["gap_percent_e4m3_v_low"] == pytest.approx(25.0)
    assert results["reference_loss"] == pytest.approx(2.1)
    notes = [section for section in sections if isinstance(section, Note)]
    assert notes[0].kind == "good" and "+0.100 %" in notes[0].text and "without end" in notes[0].text
    told, runs = (section for section in sections if isinstance(section, Table))
    assert [row[-1] for row in told.rows] == ["parity", "fails, as it should"]
    assert [row[:3] for row in runs.rows][:3] == [(REFERENCE, 7, 2.0), (REFERENCE, 8, 2.2), ("O2", 7, 2.002)]
    assert runs.columns[-1] == "came apart" and runs.rows[-1][-1] == "Step 3: not finite"
    plots = {section.title: section for section in sections if isinstance(section, Plot)}
    first = plots["Losses in training and held out"]
    assert [line.name for line in first.series] == [
        "reference, training", "reference, held out", "O2, training", "O2, held out",
    ]  # fmt: skip
    held = first.series[1]
    assert held.dashed and held.x == (1.0, 2.0, 3.0) and held.y == pytest.approx((4.1, 3.1, 2.1))
    assert held.low == pytest.approx((4.0, 3.0, 2.0)) and held.high == pytest.approx((4.2, 3.2, 2.2))
    gap = plots["Gap to the reference"].series[0]
    assert gap.y[-1] == pytest.approx(0.1)
    control = plots["Gap of the controls to the reference"].series[0]
    assert control.x == (1.0, 2.0), "both runs reached two steps"


def test_one_run_of_each_has_no_spread() -> None:
    """Notes say why nothing is shown, or what is out of the bar; a seed alone has no band."""
    _, sections = comparison({REFERENCE: [curve(2.0)], "O2": [curve(2.1)]}, [0], 0.3)
    note = sections[0]
    assert isinstance(note, Note) and note.title == "No parity" and "bar of 0.3 %: O2" in note.text
    plot = next(section for section in sections if isinstance(section, Plot))
    assert not plot.series[1].low
    _, sections = comparison({REFERENCE: [curve(2.0)], "e4m3_v": [curve(2.001)]}, [0], 0.3)
    assert isinstance(sections[0], Note) and "e4m3_v do not fail as they should" in sections[0].text
