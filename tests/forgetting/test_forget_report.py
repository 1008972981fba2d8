"""The report of a run of requests: figures by hand, one row a request, every line of the comparison drawn."""

from dataclasses import replace
from pathlib import Path

import pytest
from forgotten import Made, forgotten, images, load

from postgrad.core.metrics import Interval
from postgrad.core.plots import draw
from postgrad.core.sections import Note, Plot, Table
from postgrad.core.vision_models import Classifier
from postgrad.forgetting.bench import Bench
from postgrad.forgetting.comparison import Served
from postgrad.forgetting.forget_report import (
    comparison_plot,
    comparison_table,
    forget_sections,
    requests_table,
    summary,
)
from postgrad.forgetting.leakage import Recovery
from postgrad.forgetting.leakage_audit import Audit, AuditConfig
from postgrad.forgetting.ledger_report import limits_table, verdicts
from postgrad.forgetting.relearn import RelearnConfig, Relearned
from postgrad.forgetting.sample_audit import Scope
from postgrad.forgetting.schedules import TaskSplit
from postgrad.forgetting.service import Service

CONFIG = AuditConfig(svc=False, relearn=RelearnConfig(steps=0))
SPLITS = (TaskSplit((1, 2, 3, 4, 5, 7, 8, 9), (0, 6)), TaskSplit((1, 2, 3, 5, 7, 8, 9), (4,), (0, 6)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return forgotten(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def audits(made: Made) -> tuple[Audit, ...]:
    base: Classifier = load(made.model)
    scopes = [Scope(split) for split in SPLITS]
    bench = Bench(CONFIG, images(), (), scopes, load(made.model), (), 0)
    with Service.open(made.service, base, "base") as service:
        found = []
        for number, shown in enumerate((["first"], ["first", "second"])):
            service.show(shown)
            found.append(bench.measure("own", service.classifier, number))
    return tuple(found)


@pytest.fixture
def service(made: Made) -> Service:
    return Service.read(made.service, load(made.model), "base")


def with_figures(audit: Audit, h: float, forgotten: float, old: float | None) -> Audit:
    """Set accuracies so that H is `h` where nothing of the request is left."""
    kept, gone = Interval(h, h - 1, h + 1), Interval(forgotten, forgotten, forgotten)
    acc_o = None if old is None else Interval(old, old, old)
    table = replace(audit.accuracy, acc_r=kept, acc_f=gone, acc_o=acc_o, acc_f_pretrained=h + forgotten)
    return replace(audit, accuracy=table)


def with_excess(audit: Audit, knn: float, probe: float) -> Audit:
    share = Interval(50.0, 40.0, 60.0)
    values = (Recovery(share, share, Interval(value, value - 1, value + 1)) for value in (knn, probe))
    return replace(audit, **dict(zip(("knn", "probe"), values, strict=True)))


def test_key_figures_by_hand(audits: tuple[Audit, ...], service: Service) -> None:
    first = with_excess(with_figures(audits[0], 80.0, 3.0, None), 12.0, 1.0)
    second = with_excess(with_figures(audits[1], 60.0, 0.0, 7.0), 4.0, 9.0)
    found = summary([first, second], service)
    expected = {
        "h_mean": 70.0, "h_worst": 60.0, "acc_r": 60.0, "acc_r_low": 59.0, "acc_r_high": 61.0, "acc_f_worst": 3.0,
        "acc_o_worst": 7.0, "knn_excess_worst": 12.0, "probe_excess_worst": 9.0, "requests_in_use": 2,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["mia_auc"] == second.membership.auc.value
    assert found["limits_missed"] == sum(not verdict.passed for _, verdict in verdicts(service.ledger.entries()))


def test_without_gold_no_excess_is_claimed(audits: tuple[Audit, ...], service: Service) -> None:
    found = summary(audits, service)
    assert "knn_excess_worst" not in found and "probe_excess_worst" not in found


def test_each_request_is_a_row(service: Service) -> None:
    table = requests_table(service)
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [(row["request"], row["state"]) for row in rows] == [("first", "frozen"), ("second", "active")]
    assert rows[0]["Acc_o"] == "–" and isinstance(rows[1]["Acc_o"], float)
    for row, entry in zip(rows, (service.applied("first"), service.applied("second")), strict=True):
        assert entry is not None
        metrics = vars(entry.body)["metrics"]
        assert (row["Acc_r"], row["Acc_f"], row["H"]) == (metrics["acc_r"], metrics["acc_f"], metrics["h"])
        assert row["blocks changed"] == "1 of 2" and row["steps"] == metrics["steps"]


def test_limits_say_what_was_not_measured(service: Service) -> None:
    table = limits_table(service.ledger.entries())
    rows = {row[:2]: row[2:] for row in table.rows}
    assert rows[("first", "knn_excess_max")] == (10.0, "–", "not measured")
    assert ("first", "acc_o_max") not in rows and ("second", "acc_o_max") in rows
    assert len(table.rows) == len(verdicts(service.ledger.entries()))


def test_a_revocation_is_told(audits: tuple[Audit, ...], tmp_path: Path) -> None:
    given = forgotten(tmp_path)
    with Service.open(given.service, load(given.model), "base") as service:
        service.revoke("first", images()[1])
        sections = forget_sections(service, audits, (), ())
        notes = [section for section in sections if isinstance(section, Note)]
        assert (
            notes[0].title == "Request first was revoked" and notes[0].kind == "good" and "bit for bit" in notes[0].text
        )
        assert requests_table(service).rows[0][1] == "revoked"


def test_all_methods_stand_side_by_side(audits: tuple[Audit, ...]) -> None:
    first, second = with_figures(audits[0], 80.0, 0.0, None), with_figures(audits[1], 60.0, 0.0, 7.0)
    other = Served("other", (with_figures(audits[0], 50.0, 0.0, None), with_excess(second, 3.0, 2.0)))
    table = comparison_table((first, second), (other,))
    assert table.columns[1:3] == ("H 1", "H 2")
    ours, theirs = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (ours["method"], ours["H 1"], ours["H 2"], ours["Acc_r at last"], ours["worst Acc_o"]) == (
        "own", 80.0, 60.0, 60.0, 7.0,
    )  # fmt: skip
    assert (ours["kNN excess"], theirs["kNN excess"], theirs["probe excess"]) == ("–", 3.0, 2.0)
    plot = comparison_plot((first, second), (other,))
    assert [(line.name, line.x, line.y, line.dashed) for line in plot.series] == [
        ("own", (1.0, 2.0), (80.0, 60.0), False), ("other", (1.0, 2.0), (50.0, 60.0), True),
    ]  # fmt: skip
    assert "<svg" in draw(plot)


def test_sections_come_in_order(audits: tuple[Audit, ...], service: Service) -> None:
    other = Served("other", tuple(replace(audit, name="other") for audit in audits))
    alone, compared = (forget_sections(service, audits, others, ()) for others in ((), (other,)))
    titles = [section.title for section in compared]
    assert titles[:4] == ["Requests", "Limits of the policy", "Methods on the same requests", "H over the requests"]
    assert [title for title in titles if title not in {each.title for each in alone}] == titles[2:4]
    leaks = next(each for each in compared if each.title == "What was forgotten, and what leaks")
    assert isinstance(leaks, Table) and [row[0] for row in leaks.rows] == ["own", "other"]
    assert any(isinstance(each, Plot) for each in alone)


FAST, SLOW = Relearned((0, 8), (0.0, 90.0)), Relearned((0, 8, 16), (0.0, 0.0, 95.0))
NEVER = Relearned((0, 8), (0.0, 9.0))


def test_how_fast_classes_come_back_is_a_key_figure(audits: tuple[Audit, ...], service: Service) -> None:
    """90 of 100 % after 8 images for us and 16 for gold: half of its samples."""
    audit = with_figures(audits[0], 100.0, 0.0, None)
    for ours, gold, expected in ((FAST, SLOW, 0.5), (SLOW, FAST, 2.0), (NEVER, FAST, "never")):
        found = summary([replace(audit, relearned=ours, relearned_gold=gold)], service)
        assert found["relearn_90"] == expected
    for ours, gold in ((NEVER, NEVER), (FAST, None)):
        assert "relearn_90" not in summary([replace(audit, relearned=ours, relearned_gold=gold)], service)
    assert "relearn_90" not in replace(audit, relearned=NEVER, relearned_gold=FAST).figures(), "no number, no entry"


def test_each_request_says_how_fast_it_is_taught_again(audits: tuple[Audit, ...], service: Service) -> None:
    audit = with_figures(audits[0], 100.0, 0.0, None)
    shown = [replace(audit, relearned=SLOW, relearned_gold=NEVER), replace(audit, relearned=FAST, relearned_gold=None)]
    sections = forget_sections(service, shown, (), (), names=("first", "second"))
    (table,) = (each for each in sections if isinstance(each, Table) and each.title == "Taught again")
    assert table.columns == ("request", "to 50%", "gold to 50%", "to 90%", "gold to 90%", "shown at most")
    assert table.rows == (("first", 16, "more", 16, "more", 16), ("second", 8, "–", 8, "–", 8))
    assert not [
        each for each in forget_sections(service, audits, (), (), names=("a", "b")) if each.title == "Taught again"
    ]
