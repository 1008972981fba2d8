"""How far a judge can be trusted, from judged pairs: agreement of the two orders, liking for positions and length.

All shares are means over prompts with 95 % intervals over prompts, so that many pairs of one prompt do not
pass for independent evidence.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from postgrad.alignment.exchange import Ledger
from postgrad.alignment.judge import Opinion, Verdict, combine
from postgrad.core.metrics import Interval, mean_interval, wilson_interval
from postgrad.core.report import Cell, Note, Section, Table
from postgrad.errors import GateError

Row = dict[str, Any]
"""A row of the annotate store."""

LEAST_DECIDED = 0.05
"""Below this share of pairs with a winner a judge tells answers apart too rarely to be worth its price."""
NOTED_CONSISTENCY = 0.6
"""Below this consistency the report warns; tossing coins gives 0.5."""
NUM_EXAMPLES = 3
"""Pairs shown of each kind."""
LONGEST_EXAMPLE = 400
"""Characters shown of each text."""


class Quality(NamedTuple):
    """Figures of a judge on some pairs; NaN where nothing was measured."""

    num_pairs: int
    num_prompts: int
    consistency: Interval
    """Share of readable pairs with the same outcome in both orders."""
    p_first: Interval
    """Mean probability given to the answer shown first; 0.5 = no liking for a position."""
    decided: Interval
    """Share of readable pairs with a winner."""
    longer_wins: Interval
    """Share of decided pairs of unlike length whose longer answer wins."""
    unreadable: Interval
    """Share of pairs without a readable verdict in one order or both."""


def opinion_of(row: Row) -> Opinion:
    """Rebuild the opinion that a stored pair was settled from."""
    ab = Verdict(tuple(row["score_ab"]), row["p_ab"])
    ba = Verdict(tuple(row["score_ba"][::-1]), 1 - row["p_ba"])
    return combine(ab, ba)


def measure(rows: Sequence[Row]) -> Quality:
    """Measure a judge on judged pairs, kept and dropped ones together."""
    seen = [(row, opinion_of(row)) for row in rows]
    readable = [(row, opinion) for row, opinion in seen if opinion.orders != "unreadable"]
    won = [(row, opinion) for row, opinion in readable if opinion.label != "tie"]
    unlike = [(row, opinion) for row, opinion in won if len(row["response_a"]) != len(row["response_b"])]
    return Quality(
        num_pairs=len(rows),
        num_prompts=len({row["prompt_id"] for row in rows}),
        consistency=_share(readable, lambda row, opinion: opinion.orders == "agree"),
        p_first=_interval(_by_prompt(readable, lambda row, opinion: opinion.p_first)),
        decided=_share(readable, lambda row, opinion: opinion.label != "tie"),
        longer_wins=_share(unlike, _longer_wins),
        unreadable=_share(seen, lambda row, opinion: opinion.orders == "unreadable"),
    )


Judged = list[tuple[Row, Opinion]]


def _longer_wins(row: Row, opinion: Opinion) -> bool:
    return (len(row["response_a"]) > len(row["response_b"])) == (opinion.label == "a")


def _by_prompt(judged: Judged, value: Callable[[Row, Opinion], float]) -> list[float]:
    groups: dict[str, list[float]] = {}
    for row, opinion in judged:
        groups.setdefault(row["prompt_id"], []).append(float(value(row, opinion)))
    return [sum(values) / len(values) for values in groups.values()]


def _share(judged: Judged, value: Callable[[Row, Opinion], float]) -> Interval:
    means = _by_prompt(judged, value)
    if not means:
        return Interval(math.nan, math.nan, math.nan)
    return wilson_interval(min(sum(means), float(len(means))), len(means))


def _interval(means: list[float]) -> Interval:
    return mean_interval(means) if means else Interval(math.nan, math.nan, math.nan)


def check_quality(rows: Sequence[Row], *, min_consistency: float, max_unreadable: float) -> None:
    """Stop a judge that is surely worthless, before it costs more.

    "Surely": the interval's good end is on the wrong side of the limit; a dozen pairs are enough for a judge
    that always names the first.

    Raises:  GateError.
    """
    found = measure(rows)
    if not rows:
        return
    name = f"The judge {rows[0]['judge']}"
    if found.unreadable.low > max_unreadable:
        raw = next(_raw(row) for row in rows if opinion_of(row).orders == "unreadable")
        raise GateError(
            f"{name}: expected verdicts that can be read, found none in {found.unreadable.value:.0%} of "
            f"{found.num_pairs} pairs; the first such reply is {raw[:200]!r}. Use another judge.mode or model, or "
            "raise judge.max_tokens if replies are cut short. max_unreadable is the limit."
        )
    if found.consistency.high < min_consistency:
        raise GateError(
            f"{name}: expected the same verdict in both orders, found it in {found.consistency.value:.0%} of "
            f"{found.num_pairs} pairs; it gives the answer shown first {found.p_first.value:.0%} of the preference. "
            "It looks at positions, not at answers. Use another judge.mode or model. min_consistency is the limit."
        )
    if found.decided.high < LEAST_DECIDED:
        raise GateError(
            f"{name}: expected winners, found {found.decided.value:.0%} decided of {found.num_pairs} pairs; it takes "
            "nearly all answers for equal. Use another judge.mode or model, or a smaller judge.tie."
        )


def quality_results(rows: Sequence[Row]) -> dict[str, Cell]:
    """Name the key figures, kept and dropped pairs together; what was not measured is left out."""
    found = measure(rows)
    kept = [row for row in rows if not row["reason"]]
    figures = {
        "consistency": found.consistency.value,
        "p_first": found.p_first.value,
        "longer_wins": found.longer_wins.value,
    }
    measured = {name: value for name, value in figures.items() if not math.isnan(value)}
    cost = math.fsum(row["cost"] for row in rows)
    return {"judged": found.num_pairs, "kept": len(kept), **measured, "cost": cost}


def quality_sections(rows: Sequence[Row], ledger: Ledger) -> tuple[Section, ...]:
    """Show how far the judge can be trusted, what it said, what it cost, and examples."""
    turns = sorted({row["turn"] for row in rows})
    slices = [("all", list(rows))]
    if len(turns) > 1:
        slices += [(f"turn {turn}", [row for row in rows if row["turn"] == turn]) for turn in turns]
    measured = [(name, measure(part)) for name, part in slices]
    return (
        *_notes(measured[0][1]),
        _quality_table(measured),
        _label_table(rows),
        _example_table(rows),
        *([_cost_table(ledger)] if ledger.requests + ledger.cached else []),
    )


def _notes(found: Quality) -> list[Note]:
    notes = []
    if found.consistency.value < NOTED_CONSISTENCY:
        text = (
            f"Both orders agree in {found.consistency.value:.0%} of the pairs, where tossing coins gives 50 %. "
            "What is kept rests on the pairs on which they agree."
        )
        notes.append(Note("The judge contradicts itself", text, "warning"))
    if found.p_first.high < 0.5 or found.p_first.low > 0.5:
        place = "first" if found.p_first.value > 0.5 else "second"
        text = (
            f"The answer shown {place} is preferred ({found.p_first.value:.3f} for the first, interval "
            f"{found.p_first.low:.3f} to {found.p_first.high:.3f}). Both orders were asked, so the labels do not "
            "lean; they are fewer."
        )
        notes.append(Note("The judge has a liking for a position", text, "info"))
    if found.longer_wins.low > 0.5:
        text = (
            f"The longer answer wins {found.longer_wins.value:.0%} of the decided pairs. It may be the better one; "
            "a reward model trained on these pairs has to beat that rule to show that it learnt more."
        )
        notes.append(Note("Longer answers win more often", text, "info"))
    return notes


def _quality_table(measured: Sequence[tuple[str, Quality]]) -> Table:
    columns = ("pairs of", "pairs", "prompts", "both orders agree", "P(first shown)", "longer wins", "unreadable")
    rows = tuple(
        (
            name,
            found.num_pairs,
            found.num_prompts,
            _text(found.consistency),
            _text(found.p_first),
            _text(found.longer_wins),
            _text(found.unreadable),
        )
        for name, found in measured
    )
    return Table("The judge", columns, rows, "Means over prompts with 95 % intervals over prompts.")


def _text(value: Interval) -> str:
    if math.isnan(value.value):
        return "-"
    ends = "" if math.isnan(value.low) else f" ({value.low:.3f} to {value.high:.3f})"
    return f"{value.value:.3f}{ends}"


def _label_table(rows: Sequence[Row]) -> Table:
    names = {"a": "a is better", "b": "b is better", "tie": "tie"}
    kept = Counter(names[row["label"]] for row in rows if not row["reason"])
    dropped = Counter(f"dropped: {row['reason']}" for row in rows if row["reason"])
    cells = [(name, kept[name]) for name in names.values()] + sorted(dropped.items())
    shares = tuple((name, count, round(count / max(1, len(rows)), 4)) for name, count in cells)
    return Table("Labels", ("label", "pairs", "share"), shares)


def _cost_table(ledger: Ledger) -> Table:
    names = {"cost": "cost of all replies used", "paid_now": "cost paid by this process"}
    rows = tuple((names.get(name, name.replace("_", " ")), value) for name, value in asdict(ledger).items())
    return Table("Requests and costs", ("what", "number"), rows)


def _example_table(rows: Sequence[Row]) -> Table:
    """Show the first pairs of each kind by id, which is a hash and so as good as random."""
    kinds: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: str(row["id"])):
        kinds.setdefault(row["reason"] or f"kept: {row['label']}", []).append(row)
    cells = tuple(
        (
            kind,
            _cut(json.loads(row["prompt_messages"])[-1]["content"]),
            _cut(row["response_a"]),
            _cut(row["response_b"]),
            f"{_scores(row['score_ab'])} | {_scores(row['score_ba'])}",
            round(row["p_a"], 3),
            _cut(_raw(row)),
        )
        for kind in sorted(kinds)
        for row in kinds[kind][:NUM_EXAMPLES]
    )
    columns = ("kind", "last message", "answer a", "answer b", "scores a : b, by order", "p(a)", "a judge's words")
    return Table("Examples", columns, cells)


def _raw(row: Row) -> str:
    """Return the reply that could not be read, else that of the first order."""
    raw: str = row["raw_ba"] if math.isnan(row["p_ba"]) and not math.isnan(row["p_ab"]) else row["raw_ab"]
    return raw


def _scores(scores: Sequence[float]) -> str:
    return " : ".join("?" if math.isnan(score) else f"{score:.3g}" for score in scores)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_EXAMPLE else f"{text[:LONGEST_EXAMPLE]} ..."
