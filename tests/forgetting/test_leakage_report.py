"""The leakage report: every model is a row, missing gold is said, and the note names what leaks."""

from dataclasses import replace

from postgrad.core.metrics import Interval
from postgrad.core.plots import draw
from postgrad.core.sections import Plot, Table
from postgrad.forgetting.leakage import Recovery
from postgrad.forgetting.leakage_audit import Audit
from postgrad.forgetting.leakage_report import leakage_note, leakage_sections, summary_table
from postgrad.forgetting.membership import Attack, Curve, Separation
from postgrad.forgetting.metrics import AccTable, ClassDrop
from postgrad.forgetting.relearn import Relearned

HALF = Interval(0.5, 0.4, 0.6)
FOUND = Interval(60.0, 50.0, 70.0)


def even(share: float, over: float) -> Recovery:
    return Recovery(Interval(share, share - 9, share + 9), FOUND, Interval(over, over - 9, over + 9))


def one(name: str, over: float) -> Audit:
    """Make an audit whose feature attacks find so many points more than gold's."""
    return Audit(
        name=name,
        accuracy=AccTable(
            acc_r=Interval(94.0, 92.0, 96.0),
            acc_f=Interval(0.0, 0.0, 2.0),
            acc_o=None,
            acc_m=None,
            acc_r_pretrained=95.0,
            acc_f_pretrained=90.0,
            acc_r_start=95.0,
            acc_f_start=90.0,
        ),
        knn=even(60 + over, over),
        knn_alone=even(62 + over, over),
        probe=even(61 + over, over / 2),
        probe_alone=even(63 + over, over / 2),
        swap=even(60.0, 0.0),
        membership=Separation(HALF, HALF, Interval(0.0, -0.1, 0.1)),
        streisand=Separation(Interval(0.9, 0.85, 0.95), Interval(0.88, 0.8, 0.9), Interval(0.02, -0.02, 0.06)),
        streisand_entropy=Separation(HALF, HALF, Interval(0.0, -0.1, 0.1)),
        svc={"confidence": Attack(FOUND, Interval(52.0, 45.0, 59.0))},
        svc_gold={"confidence": Attack(FOUND, FOUND)},
        cka=0.6,
        cosine=Interval(0.7, 0.6, 0.8),
        js_gold=0.2,
        activation_gold=0.4,
        zrf=None,
        drops=(ClassDrop(1, 96.0, 90.0),),
        unseen=(),
        knn_curve={1: 60.0, 5: 60 + over},
        member_curve=Curve((0.0, 1.0), (0.0, 1.0)),
        outlier_curve=Curve((0.0, 0.2, 1.0), (0.0, 0.8, 1.0)),
        relearned=Relearned((0, 8, 16), (0.0, 50.0, 90.0)),
        relearned_gold=Relearned((0, 8, 16), (0.0, 40.0, 90.0)),
    )


def without_gold(audit: Audit) -> Audit:
    bare = {name: Recovery(vars(audit)[name].share) for name in ("knn", "knn_alone", "probe", "probe_alone", "swap")}
    apart = {name: Separation(vars(audit)[name].auc) for name in ("membership", "streisand", "streisand_entropy")}
    return replace(audit, **bare, **apart, svc_gold={}, js_gold=None, activation_gold=None, relearned_gold=None)


AUDITS = [one("base", 28.0), one("gs-lora", 24.0), one("leak-free", 2.0), one("gold", 0.0)]


def test_every_model_is_a_row_of_every_table() -> None:
    sections = leakage_sections(AUDITS)
    tables = [section for section in sections if isinstance(section, Table)]
    assert len(tables) == 5
    for table in tables:
        assert [row[0] for row in table.rows] == [audit.name for audit in AUDITS]
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_the_summary_shows_what_the_spec_asks() -> None:
    table = summary_table(AUDITS)
    assert table.columns == (
        "model",
        "Acc_r",
        "Acc_f",
        "H",
        "kNN excess",
        "probe excess",
        "MIA AUC",
        "relearn 50%",
        "relearn 90%",
        "Streisand AUC",
    )
    row = dict(zip(table.columns, table.rows[1], strict=True))
    assert row["kNN excess"] == "24.0 (15.0 to 33.0)" and row["probe excess"] == "12.0 (3.0 to 21.0)"
    assert (row["relearn 50%"], row["relearn 90%"]) == ("0.50", "1.00")
    assert row["MIA AUC"] == "0.500 (0.400 to 0.600)"


def test_the_note_names_the_leaks_and_only_them() -> None:
    note = leakage_note(AUDITS)
    assert note.kind == "warning"
    leaky, clean = note.text.split("leak-free", 1)
    assert "gs-lora names 0.0 % of the forgotten test samples rightly, but nearest neighbours find 84.0 %" in leaky
    assert "a linear probe" in leaky and "head refitted" not in leaky and "base" not in leaky
    assert "no attack surely does better" in clean
    assert leakage_note([AUDITS[2]]).kind == "good"


def test_the_note_sees_both_sides_of_other_leaks() -> None:
    telling = replace(
        one("other", 0.0),
        membership=Separation(Interval(0.3, 0.2, 0.4)),
        streisand=Separation(HALF, HALF, Interval(-0.4, -0.5, -0.3)),
        relearned=Relearned((0, 8, 16), (0.0, 90.0, 90.0)),
    )
    text = leakage_note([telling]).text
    assert "its loss tells" in text and "stand out less than in gold" in text and "after 50% of the samples" in text


def test_missing_gold_is_said_and_never_a_zero() -> None:
    bare = [without_gold(audit) for audit in AUDITS[1:3]]
    note = leakage_note(bare)
    assert note.kind == "info" and "without it that says nothing" in note.text
    row = dict(zip(summary_table(bare).columns, summary_table(bare).rows[0], strict=True))
    assert row["kNN excess"] == row["probe excess"] == row["relearn 90%"] == "no gold reference"
    bare_of_all = [replace(audit, relearned=None) for audit in bare]
    assert summary_table(bare_of_all).rows[0][7] == "not measured"


def test_each_claim_has_a_plot_with_gold_dashed() -> None:
    plots = [section for section in leakage_sections(AUDITS) if isinstance(section, Plot)]
    assert len(plots) == 4
    for plot in plots:
        assert [(line.name, line.dashed) for line in plot.series] == [(a.name, a.name == "gold") for a in AUDITS]
        assert draw(plot).startswith("<svg")
    assert len([s for s in leakage_sections([replace(AUDITS[0], relearned=None)]) if isinstance(s, Plot)]) == 3


def test_unseen_classes_have_their_table() -> None:
    missing = replace(AUDITS[1], unseen=(ClassDrop(2, 90.0, 40.0),))
    titles = [s.title for s in leakage_sections([missing]) if isinstance(s, Table)]
    assert "Retained classes without training data" in titles


def test_the_report_is_the_same_each_time() -> None:
    assert leakage_sections(AUDITS) == leakage_sections(AUDITS)
