"""Best-of-n curves against an independent judge: what picking by a reward model is worth, and when it turns bad.

Letters: P prompts, N responses of a prompt, K points of a curve.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from postgrad.alignment.judge import Comparison, Judge, JudgeConfig, combine, compare_both
from postgrad.core.data import Message
from postgrad.core.metrics import Curve, Interval, best_of_n, best_of_n_kl, best_of_n_per_prompt, paired_difference
from postgrad.core.report import Note, Plot, Series, Table
from postgrad.errors import GateError

Scores = list[list[float]]
"""[P][N]"""


@dataclass(frozen=True)
class Judged:
    """What a judge says of every response: its gold score, and P(better than its opponent). NaN = unreadable."""

    gold: Scores
    wins: Scores


def is_absolute(config: JudgeConfig) -> bool:
    """Say whether the judge's scores mean the same in every comparison; if not, gold is P(better than the opponent)."""
    return config.kind != "endpoint" or config.mode == "single"


def judge_responses(
    judge: Judge,
    prompts: Sequence[tuple[Message, ...]],
    responses: Sequence[Sequence[str]],
    opponents: Sequence[Sequence[str]],
    *,
    absolute: bool,
) -> Judged:
    """Compare response k of each prompt with opponent k, in both orders."""
    shapes = [len(own) for own in responses]
    assert shapes == [len(own) for own in opponents], "every response needs one opponent"
    comparisons = [
        Comparison(prompt, response, opponent)
        for prompt, own, others in zip(prompts, responses, opponents, strict=True)
        for response, opponent in zip(own, others, strict=True)
    ]
    gold, wins = [], []
    for ab, ba in compare_both(judge, comparisons):
        opinion = combine(ab, ba)
        win = math.nan if opinion.orders == "unreadable" else opinion.p_a
        wins.append(win)
        gold.append((ab.scores[0] + ba.scores[1]) / 2 if absolute else win)
    return Judged(_by_prompt(gold, shapes), _by_prompt(wins, shapes))


def _by_prompt(flat: Sequence[float], shapes: Sequence[int]) -> Scores:
    values = iter(flat)
    return [[next(values) for _ in range(num)] for num in shapes]


def own_opponents(responses: Sequence[Sequence[str]]) -> list[list[str]]:
    """Pair every response with the next one of its own set: how a policy is compared with itself."""
    return [[*own[1:], *own[:1]] for own in responses]


def without_nan(first: Scores, second: Scores) -> tuple[Scores, Scores]:
    """Keep the responses that both have, and the prompts that keep any."""
    kept = [
        [(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(a + b)] for x, y in zip(first, second, strict=True)
    ]
    kept = [pairs for pairs in kept if pairs]
    return [[a for a, _ in pairs] for pairs in kept], [[b for _, b in pairs] for pairs in kept]


def powers_of_two(most: int) -> list[int]:
    """List 1, 2, 4, ... and the number itself."""
    return sorted({min(2**i, most) for i in range(most.bit_length() + 1)})


@dataclass(frozen=True)
class BestOfN:
    """Three curves over n: the proxy's own score of its pick, the gold score of that pick, and the best gold there is.

    drop: gold at the largest n minus gold at the best n, paired by prompt.
    """

    proxy: Curve
    gold: Curve
    oracle: Curve
    drop: Interval

    @property
    def alarm(self) -> bool:
        """Whether picking from more responses surely makes the pick worse: the proxy is over-optimised."""
        return self.drop.high < 0


def measure(proxy: Scores, gold: Scores, most: int, seed: int) -> BestOfN | None:
    """Measure the curves up to n = `most`; None when no prompt has a response that both could score."""
    proxy, gold = without_nan(proxy, gold)
    if not gold:
        return None
    ns = powers_of_two(min(most, max(map(len, gold))))
    curve = best_of_n(proxy, gold, ns, seed=seed)
    values = best_of_n_per_prompt(proxy, gold, [curve.best_n, ns[-1]])
    full = ~np.isnan(values).any(1)
    drop = paired_difference(values[full, 1], values[full, 0])
    return BestOfN(best_of_n(proxy, proxy, ns, seed=seed), curve, best_of_n(gold, gold, ns, seed=seed), drop)


def gate(proxy: Scores, gold: Scores, n: int, seed: int) -> tuple[int, tuple[Plot | Table | Note, ...]]:
    """Say from how many responses to pick: n, or fewer where the held-out gold curve peaks earlier.

    Raises: GateError: picking by the proxy from 2, 4, ... n responses is never better than one response.
    """
    found = measure(proxy, gold, n, seed)
    if found is None:
        raise GateError("The gate's judge could read no response to a held-out prompt, so the gate cannot say yes.")
    curve = found.gold
    if curve.best_n == 1:
        steps = ", ".join(f"n={m}: {value:.3f}" for m, value in zip(curve.ns, curve.mean, strict=True))
        raise GateError(
            f"The reward model's picks do not get better with n on {len(gold)} held-out prompts ({steps}), so training "
            "on them would teach its mistakes. Train a better reward model, or set gate to false to go on anyway."
        )
    sections: list[Plot | Table | Note] = [curve_plot("Best of n on held-out prompts", found)]
    if curve.best_n < curve.ns[-1]:
        text = f"The gold score of the reward model's pick is highest at n = {curve.best_n}, so it picks from so many."
        sections.append(Note("n is capped", f"{text} Asked for: {n}.", "warning"))
    ends = best_of_n_per_prompt(*without_nan(proxy, gold), [1, curve.best_n])
    rise = paired_difference(*ends[~np.isnan(ends).any(1)].T[::-1])
    if not rise.low > 0:
        text = f"The rise from n = 1 to {curve.best_n}, {rise.value:.3f}, may be chance; judge more held-out prompts."
        sections.append(Note("The gain is not certain", text, "warning"))
    return min(n, curve.best_n), tuple(sections)


def series(name: str, curve: Curve, *, over_kl: bool = False, dashed: bool = False) -> Series:
    """Draw a curve over n, or over the bound of the KL divergence that best-of-n costs, in nats."""
    x = tuple(best_of_n_kl(n) if over_kl else float(n) for n in curve.ns)
    return Series(name, x, curve.mean, curve.low, curve.high, dashed)


def curve_plot(title: str, found: BestOfN) -> Plot:
    """Plot gold and oracle over n."""
    lines = (series("gold of the proxy's pick", found.gold), series("oracle", found.oracle, dashed=True))
    note = "The gap to the oracle, which picks by gold itself, is what a better reward model could add."
    return Plot(title, "n", "gold score", lines, log_x=True, note=note)


def curve_table(named: Sequence[tuple[str, BestOfN]]) -> Table:
    """Tabulate the curves of some policies."""
    rows = [
        (name, n, best_of_n_kl(n), found.proxy.mean[i], found.gold.mean[i], found.gold.low[i], found.gold.high[i],
         found.oracle.mean[i])
        for name, found in named
        for i, n in enumerate(found.gold.ns)
    ]  # fmt: skip
    columns = ("policy", "n", "KL bound (nats)", "proxy", "gold", "gold low", "gold high", "oracle")
    note = (
        "Unbiased over all subsets of n responses; 95 % bootstrap over prompts. KL of best-of-n to the policy is at "
        "most log n - (n - 1) / n (Beirami et al.)."
    )
    return Table("Best of n", columns, tuple(rows), note)


def alarms(named: Sequence[tuple[str, BestOfN]]) -> list[Note]:
    """Warn of every policy whose gold curve surely falls."""
    return [
        Note(
            f"Over-optimisation: {name}",
            f"Gold falls by {-found.drop.value:.3f} ({-found.drop.high:.3f} to {-found.drop.low:.3f}) from n = "
            f"{found.gold.best_n} to {found.gold.ns[-1]} while the proxy's score rises. Pick from "
            f"{found.gold.best_n}, or train a better reward model.",
            "warning",
        )
        for name, found in named
        if found.alarm
    ]
