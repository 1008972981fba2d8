"""The report on single images: plain words, a row a model, a warning where something tells them."""

from dataclasses import replace

from postgrad.core.metrics import Interval
from postgrad.forgetting.sample_audit import SampleAudit
from postgrad.forgetting.sample_report import apart, sample_note, sample_sections, sample_table

FINE = SampleAudit(
    name="safe", acc_f=Interval(90.0, 70.0, 97.0), acc_h=Interval(92.0, 85.0, 96.0), acc_r=Interval(97.0, 95.0, 98.0),
    acc_o=None, membership=Interval(0.52, 0.4, 0.64), acc_excess=Interval(2.5, -9.0, 14.0),
    mia_excess=Interval(0.01, -0.1, 0.12), acc_f_gold=87.5, mia_gold=0.51, acc_f_pretrained=100.0,
    acc_h_pretrained=92.5, acc_r_pretrained=97.5, mia_pretrained=0.7,
)  # fmt: skip
LEAKS = replace(FINE, mia_excess=Interval(0.2, 0.05, 0.35))


def test_only_what_is_sure_is_told() -> None:
    assert not apart(FINE) and apart(LEAKS) and apart(replace(FINE, mia_excess=Interval(-0.2, -0.35, -0.05)))
    assert apart(replace(FINE, acc_excess=Interval(10.0, 1.0, 19.0)))
    assert not apart(replace(FINE, acc_excess=Interval(-10.0, -19.0, -1.0))), (
        "fewer named is told by the loss, if at all"
    )


def test_the_note_speaks_of_each_request() -> None:
    note = sample_note([("a", [FINE]), ("b", [LEAKS])])
    assert note.kind == "warning" and note.title == "Single images can still be told from unseen ones"
    assert (
        "a: 90.0 % of them are named rightly, 2.5 (−9.0 to 14.0) points above gold, which never saw them" in note.text
    )
    assert "b: 90.0 %" in note.text and "0.200 (0.050 to 0.350) more than on gold." in note.text
    calm = sample_note([("a", [replace(FINE, mia_gold=None, acc_f_gold=None)])])
    assert calm.kind == "good" and "points above unseen images" in calm.text and "more than chance." in calm.text


def test_models_stand_beside_each_other() -> None:
    table = sample_table([("a", [replace(FINE, name="base"), FINE]), ("b", [LEAKS])])
    assert [row[:2] for row in table.rows] == [("a", "base"), ("a", "safe"), ("b", "safe")]
    assert table.rows[1] == (
        "a", "safe", 90.0, 92.0, "2.5 (−9.0 to 14.0)", 0.52, "0.010 (−0.100 to 0.120)", 97.0,
    )  # fmt: skip
    assert sample_sections([]) == () and len(sample_sections([("a", [FINE])])) == 2
