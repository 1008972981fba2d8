"""The report of `evaluate`: policies side by side, best-of-n curves, responses next to one another.

Letters: P prompts, N responses of a prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from postgrad.alignment.curves import BestOfN, alarms, curve_plot, curve_table, measure, series
from postgrad.alignment.responses import Answers, read_answers
from postgrad.alignment.sample import effective_n
from postgrad.core.metrics import Interval, mean_interval, paired_difference, win_rate
from postgrad.core.report import Cell, Plot, Section, Table
from postgrad.core.store import is_sealed, read_store
from postgrad.errors import DataError

SHOWN_CHARACTERS = 600
SHAPE = ("policy", "tokens", "characters", "effective n", "cut")
NAN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Seen:
    """What is known of one policy; every list has one entry a prompt, under the prompt's id."""

    name: str
    answers: dict[str, Answers]
    gold: dict[str, list[float]]
    """Of the responses that were judged; NaN = unreadable."""
    wins: dict[str, list[float]]
    proxy: dict[str, list[float]]
    """Reward of the same responses; empty without a reward model."""

    def mean(self, values: dict[str, list[float]], ids: Sequence[str]) -> list[float]:
        """Average the readable values of each prompt."""
        return [float(np.nanmean(values[name])) for name in ids]


def read_policy(folder: Path, judged: int) -> Seen:
    """Read the stores of one policy.

    Args: judged: number of responses that were judged.
    """
    answers = {each.id: each for each in read_answers(folder / "responses")}
    gold: dict[str, list[float]] = {}
    wins: dict[str, list[float]] = {}
    for row in read_store(folder / "judged"):
        gold.setdefault(row["prompt_id"], []).append(row["gold"])
        wins.setdefault(row["prompt_id"], []).append(row["win"])
    proxy: dict[str, list[float]] = {}
    for row in read_store(folder / "scores") if is_sealed(folder / "scores") else []:
        if row["k"] < judged:
            proxy.setdefault(row["prompt_id"], []).append(row["score"])
    return Seen(folder.name, answers, gold, wins, proxy)


def common_prompts(seen: Sequence[Seen]) -> list[str]:
    """List the prompts that every policy answered with at least one readable response, in the first one's order.

    Raises: DataError: there is none.
    """
    ids = [
        name
        for name in seen[0].gold
        if all(name in policy.gold and not np.isnan(policy.gold[name]).all() for policy in seen)
        and all(not np.isnan(policy.wins[name]).all() for policy in seen)
    ]
    if not ids:
        raise DataError("The judge could read no prompt's responses of all policies; see the stores `judged`.")
    return ids


def summarise(seen: Sequence[Seen], show: int, seed: int) -> tuple[dict[str, Cell], tuple[Section, ...]]:
    """Give the results and the sections of the report."""
    ids = common_prompts(seen)
    curves = [(policy.name, found) for policy in seen if (found := _curves(policy, ids, seed))]
    proxied = [(name, found) for name, found in curves if seen[0].proxy]
    results: dict[str, Cell] = {"prompts": len(ids)}
    rows = []
    before = seen[0].mean(seen[0].gold, ids)
    for policy, (_, found) in zip(seen, curves, strict=True):
        gold = policy.mean(policy.gold, ids)
        first = policy is seen[0]
        difference = NAN if first else paired_difference(gold, before)
        wins = NAN if first else win_rate(policy.mean(policy.wins, ids))
        rows.append((policy.name, _text(mean_interval(gold)), _text(difference), _text(wins)))
        for key, value in (("gold", mean_interval(gold)), ("difference", difference), ("win_rate", wins)):
            results |= _named(f"{policy.name}_{key}", value)
        last = found.gold.ns[-1]
        if policy.proxy:
            results[f"{policy.name}_best_of_{last}"] = found.gold.mean[-1]
        results[f"{policy.name}_oracle_of_{last}"] = found.oracle.mean[-1]
    unreadable = sum(math.isnan(value) for policy in seen for own in policy.gold.values() for value in own)
    note = (
        f"{len(ids)} prompts; 95 % intervals over prompts. Difference and win rate against {seen[0].name}, paired by "
        f"prompt, both orders; ties count half. Unreadable verdicts, left out: {unreadable}."
    )
    shapes = tuple((policy.name, *_shape(policy, ids)) for policy in seen)
    sections: list[Section] = [
        Table("Policies", ("policy", "gold", "difference", "win rate"), tuple(rows), note),
        *alarms(proxied),
    ]
    sections.append(Table("Shape of the responses", SHAPE, shapes, "cut: share that ended at max_new_tokens."))
    sections += _curve_sections(curves, proxied)
    return results, (*sections, *([_side_by_side(seen, ids[:: max(1, len(ids) // show)][:show])] if show else []))


def _shape(policy: Seen, ids: Sequence[str]) -> tuple[Cell, ...]:
    """Give mean length in tokens and characters, effective n, and the share cut at max_new_tokens."""
    sets = [policy.answers[name] for name in ids]
    rows = [row for each in sets for row in each.rows]
    return (
        float(np.mean([row["n_tokens"] for row in rows])),
        float(np.mean([len(row["response"]) for row in rows])),
        float(np.mean([effective_n(each.texts) for each in sets])),
        float(np.mean([row["finish_reason"] == "length" for row in rows])),
    )


def _curves(policy: Seen, ids: Sequence[str], seed: int) -> BestOfN | None:
    """Measure best of n; without a reward model, of the oracle."""
    gold = [policy.gold[name] for name in ids]
    proxy = [policy.proxy[name] for name in ids] if policy.proxy else gold
    return measure(proxy, gold, max(map(len, gold)), seed)


def _text(value: Interval) -> str:
    if math.isnan(value.value):
        return "–"
    return f"{value.value:.4f}" + ("" if math.isnan(value.low) else f" ({value.low:.4f} to {value.high:.4f})")


def _named(name: str, value: Interval) -> dict[str, Cell]:
    """Give a result with its ends; none where there is nothing to compare with, no ends where there is one prompt."""
    numbers = {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    return {key: number for key, number in numbers.items() if not math.isnan(number)}


def _curve_sections(curves: Sequence[tuple[str, BestOfN]], proxied: Sequence[tuple[str, BestOfN]]) -> list[Section]:
    if not proxied:
        lines = tuple(series(name, found.oracle) for name, found in curves)
        note = "What picking by the judge itself would give; a reward model's curve lies below."
        return [Plot("Best of n by the oracle", "n", "gold score", lines, log_x=True, note=note)]
    by_n = tuple(series(name, found.gold) for name, found in proxied)
    by_kl = tuple(series(name, found.gold, over_kl=True) for name, found in proxied)
    scores = tuple(series(name, found.proxy) for name, found in proxied)
    return [
        Plot("Gold score of the reward model's pick", "n", "gold score", by_n, log_x=True),
        Plot("The same over KL", "KL to the policy, at most (nats)", "gold score", by_kl),
        Plot("Reward of the reward model's pick", "n", "reward", scores, log_x=True),
        *(curve_plot(f"Best of n: {name}", found) for name, found in proxied),
        curve_table(proxied),
    ]


def _side_by_side(seen: Sequence[Seen], ids: Sequence[str]) -> Table:
    """Show the first response of every policy to some prompts, with its gold score."""
    rows = []
    for name in ids:
        prompt = "\n".join(f"{m['role']}: {m['content']}" for m in seen[0].answers[name].messages)
        cells = [f"[{policy.gold[name][0]:.2f}] {policy.answers[name].texts[0]}" for policy in seen]
        rows.append(tuple(text[:SHOWN_CHARACTERS] for text in (prompt, *cells)))
    columns = ("prompt", *(policy.name for policy in seen))
    return Table("Responses side by side", columns, tuple(rows), "First response of each; gold score in brackets.")
