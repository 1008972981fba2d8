"""Best-of-n curves: what a judge's verdicts become, the gate, the alarm."""

import math

import numpy as np
import pytest

from postgrad.alignment.curves import (
    alarms,
    curve_table,
    gate,
    is_absolute,
    judge_responses,
    measure,
    own_opponents,
    powers_of_two,
    without_nan,
)
from postgrad.alignment.exchange import Ledger
from postgrad.alignment.judge import Comparison, JudgeConfig, RuleJudge, Verdict
from postgrad.core.metrics import best_of_n_kl
from postgrad.core.report import Note
from postgrad.errors import GateError

PROMPT = ({"role": "user", "content": "say a"},)


def length(prompt, response) -> float:
    return float(len(response))


def draws(correlation: float, num: int = 200, n: int = 16) -> tuple[list[list[float]], list[list[float]]]:
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(num, n))
    proxy = correlation * gold + math.sqrt(1 - correlation**2) * rng.normal(size=(num, n))
    return proxy.tolist(), gold.tolist()


def over_optimised() -> tuple[list[list[float]], list[list[float]]]:
    """Proxy = gold but for one response in eight that it loves and that is worthless."""
    proxy, gold = (np.array(part) for part in draws(0.9))
    hacked = np.random.default_rng(1).random(gold.shape) < 1 / 8
    return np.where(hacked, proxy + 9, proxy).tolist(), np.where(hacked, -3, gold).tolist()


def test_absolute_judges_score_and_compare():
    found = judge_responses(RuleJudge(length), [PROMPT], [["aa", "b", "cc"]], [["b", "b", "dddd"]], absolute=True)
    assert found.gold == [[2.0, 1.0, 2.0]] and found.wins == [[1.0, 0.5, 0.0]]


class Fickle:
    """Likes what is shown first; cannot read answers with a question mark."""

    name, version, ledger = "fickle", "", Ledger()

    def compare(self, comparisons: list[Comparison]) -> list[Verdict]:
        return [
            Verdict((math.nan, math.nan), math.nan) if "?" in each.first + each.second else Verdict((0.9, 0.1), 0.9)
            for each in comparisons
        ]


def test_a_judge_that_only_compares_gives_p_of_better_in_both_orders():
    found = judge_responses(Fickle(), [PROMPT, PROMPT], [["a", "?"], ["b"]], [["c", "d"], ["e"]], absolute=False)
    assert found.gold[0][0] == pytest.approx(0.5) and found.wins[1] == pytest.approx([0.5])
    assert math.isnan(found.gold[0][1]) and math.isnan(found.wins[0][1])
    assert is_absolute(JudgeConfig()) and not is_absolute(JudgeConfig(kind="endpoint"))
    assert is_absolute(JudgeConfig(kind="endpoint", mode="single"))


def test_small_helpers():
    assert own_opponents([["a", "b", "c"], ["d"]]) == [["b", "c", "a"], ["d"]]
    assert powers_of_two(1) == [1] and powers_of_two(8) == [1, 2, 4, 8] and powers_of_two(11) == [1, 2, 4, 8, 11]
    nan = math.nan
    assert without_nan([[1.0, nan], [nan]], [[2.0, 3.0], [4.0]]) == ([[1.0]], [[2.0]])
    assert measure([[nan]], [[1.0]], 1, 0) is None


def test_curves_of_a_good_proxy_rise_below_the_oracle():
    found = measure(*draws(0.8), 16, 0)
    assert found is not None and not found.alarm and found.gold.best_n == 16
    assert found.gold.ns == (1, 2, 4, 8, 16)
    assert all(a < b for a, b in zip(found.gold.mean, found.gold.mean[1:], strict=False))
    assert all(g <= o for g, o in zip(found.gold.mean, found.oracle.mean, strict=True))
    table = curve_table([("sft", found)])
    assert [row[2] for row in table.rows] == pytest.approx([best_of_n_kl(n) for n in found.gold.ns])


def test_the_alarm_rings_when_gold_surely_falls():
    found = measure(*over_optimised(), 16, 0)
    assert found is not None and found.alarm and 1 <= found.gold.best_n < 16
    (note,) = alarms([("sft", found)])
    assert note.kind == "warning" and f"from n = {found.gold.best_n} to 16" in note.text
    fine = measure(*draws(0.8), 16, 0)
    assert fine is not None and alarms([("sft", fine)]) == []


def test_the_gate_lets_a_good_proxy_pass_uncapped():
    n, sections = gate(*draws(0.8), 16, 0)
    assert n == 16 and not [s for s in sections if isinstance(s, Note)]


def test_the_gate_caps_n_where_gold_peaks():
    proxy, gold = over_optimised()
    found = measure(proxy, gold, 16, 0)
    assert found is not None
    if found.gold.best_n == 1:  # the proxy's love is strong enough to spoil even two
        pytest.fail("the example must peak after 1")
    n, sections = gate(proxy, gold, 16, 0)
    assert n == found.gold.best_n
    assert "n is capped" in [s.title for s in sections]


def test_the_gate_refuses_a_proxy_that_is_wrong():
    proxy, gold = draws(-0.5)
    with pytest.raises(GateError, match=r"do not get better with n on 200 held-out prompts \(n=1: .*Train a better"):
        gate(proxy, gold, 16, 0)
    with pytest.raises(GateError, match="could read no response"):
        gate([[1.0]], [[math.nan]], 1, 0)


def test_the_gate_says_when_the_gain_may_be_chance():
    proxy, gold = draws(0.3, num=4, n=2)
    values = measure(proxy, gold, 2, 0)
    assert values is not None
    if values.gold.best_n == 2:
        assert "The gain is not certain" in [s.title for s in gate(proxy, gold, 2, 0)[1]]
