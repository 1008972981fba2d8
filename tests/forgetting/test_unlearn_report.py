"""The report of unlearning: figures by hand, and what is said when something is amiss."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from postgrad.core.report import Note
from postgrad.forgetting.membership import auc, loss_sides
from postgrad.forgetting.policy import judge
from postgrad.forgetting.text_losses import TextObjectiveConfig
from postgrad.forgetting.text_measures import Known, Measured
from postgrad.forgetting.text_service import LIMITS
from postgrad.forgetting.unlearn_report import Found, Record, recorded, summary, unlearn_sections, utility
from postgrad.forgetting.unlearn_steps import Outcome

OUTCOME = Outcome({"a": 2.0, "b": 0.0}, 7, (), TextObjectiveConfig(), 0, ())
RECORD = Record(True, ())


def known(*losses: float, right: float = 1.0, offered: tuple[tuple[float, ...], ...] = ()) -> Known:
    """Rows of one token each."""
    values = torch.tensor(losses, dtype=torch.float64)
    measured = Measured(values, torch.full_like(values, right), torch.ones(len(losses), dtype=torch.int64))
    return Known(measured, torch.full_like(values, right), offered)


BEFORE = {
    "forget": known(0.1, 0.2, offered=((0.1, 3.0), (0.2, 3.0))),
    "retain": known(0.1, 0.1, 0.1),
    "held_out": known(3.0, 4.0, right=0.0),
}
AFTER = {
    "forget": known(3.5, 3.6, right=0.0, offered=((1.0, 1.0), (1.0, 2.0))),
    "retain": known(0.1, 0.2, 0.3, offered=((0.0, 50.0),) * 3),
    "held_out": known(3.0, 4.0, right=0.0),
}


def found(**more: Any) -> Found:
    return replace(Found(BEFORE, AFTER, {}, OUTCOME, 0), **more)


def titles(one: Found, record: Record = RECORD) -> list[str]:
    sections = unlearn_sections(one, {}, record)
    assert sections[-1].title == "Everything is as recorded"
    return [section.title for section in sections[:-1] if isinstance(section, Note)]


def test_key_figures() -> None:
    results = summary(found(), RECORD)
    assert results["forget_loss"] == pytest.approx(3.55) and results["forget_loss_before"] == pytest.approx(0.15)
    assert results["retain_rise"] == pytest.approx(0.1) and results["forget_recited"] == 0
    assert results["mia_auc"] == auc(loss_sides(torch.tensor([3.5, 3.6]), torch.tensor([3.0, 4.0]))) == 0.5
    assert results["blocks_changed"] == 1 and results["blocks"] == 2 and results["steps"] == 7
    assert "forget_quality" not in results and "model_utility_gold" not in results
    gold = summary(found(gold=AFTER), RECORD)
    assert gold["forget_quality"] == 1 and gold["forget_loss_gold"] == results["forget_loss"]


def test_utility_is_of_what_is_kept() -> None:
    """Probability, ROUGE-L and truth of the rows to keep; of other files the share of what is offered."""
    probability = float(torch.exp(-torch.tensor([0.1, 0.2, 0.3])).mean())
    assert utility(AFTER) == pytest.approx(3 / (1 / probability + 1 + 1))
    world = known(1.0, right=0.5, offered=((1.0, 1.0),))
    assert utility({**AFTER, "world": world}) == 0  # right and wrong answers are as likely


def test_the_ledger_gets_finite_figures_under_the_names_it_knows() -> None:
    """The policy's limits are judged from them; what inside the model knows is not measured."""
    figures = recorded(found(num_earlier=1))
    assert figures["acc_f"] == 0 and figures["acc_r"] == 100 and figures["num_target_tokens"] == 2
    outcomes = {verdict.name: verdict.outcome for verdict in judge(LIMITS, figures)}
    assert outcomes["acc_f_max"] == outcomes["acc_r_min_drop"] == outcomes["mia_auc_band"] == "met"
    assert outcomes["acc_o_max"] == outcomes["knn_excess_max"] == "not measured" and "few_shot_min" not in outcomes
    earlier = {**AFTER, "earlier": known(0.1)}
    more = recorded(found(before={**BEFORE, "earlier": known(0.1)}, after=earlier))
    assert more["acc_o"] == more["acc_o_pretrained"] == 100 and more["acc_o_high"] == 100


def test_what_is_amiss_is_said() -> None:
    assert titles(found()) == ["Can be undone"]
    num = torch.linspace(0.1, 1, 30).tolist()
    known_still = {**AFTER, "forget": known(*num), "held_out": known(*[3.0 + x for x in num], right=0.0)}
    assert titles(found(after=known_still))[0] == "Forgotten rows can still be told"
    unlikely = {**AFTER, "forget": known(*[9 + x for x in num], right=0.0), "held_out": known(*num)}
    assert titles(found(after=unlikely))[0] == "Forgotten rows are too unlikely"
    bounded = OUTCOME._replace(objective=TextObjectiveConfig(kind="bounded"), missed=1)
    alone = [{name: rows for name, rows in parts.items() if name != "held_out"} for parts in (BEFORE, AFTER)]
    said = titles(found(before=alone[0], after=alone[1], outcome=bounded), RECORD._replace(undone=False))
    assert said == ["Not all rows are forgotten", "Nothing to compare with", "Cannot be undone"]
