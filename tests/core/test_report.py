"""The report: what is logged comes back, the page is whole, escaped, self-contained and repeatable."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from postgrad.core.plots import MAX_POINTS, draw, thin
from postgrad.core.report import (
    Note,
    Plot,
    Report,
    Series,
    Table,
    log_metrics,
    print_report,
    read_metrics,
    training_sections,
    write_report,
)
from postgrad.core.sections import format_cell, format_column

BON = Plot(
    title="Best of n",
    x_label="n",
    y_label="gold",
    series=(
        Series("proxy", (1, 2, 4, 64), (0.1, 0.2, 0.3, 0.2), (0.0, 0.1, 0.2, 0.1), (0.2, 0.3, 0.4, 0.3)),
        Series("oracle", (1, 2, 4, 64), (0.1, 0.3, 0.5, 0.9), dashed=True),
    ),
    log_x=True,
    note="95 % bands",
)


class Tags(HTMLParser):
    """Checks that tags close in order, and collects what a page refers to."""

    VOID = frozenset({"meta", "br", "path", "use", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def report(folder: Path) -> Report:
    """A report with a bit of everything."""
    return Report(
        method="align",
        folder=folder,
        results={
            "gold_dpo": 0.70694,
            "prompts": 1500,
            "gate": "passed " * 20,
            **{f"k{i}": i for i in range(9)},
        },
        sections=(
            Note("Good & well", "first line\nsecond <line>", "good"),
            Table("Stages", ("stage", "gold"), (("SFT", 0.4), ("<b>DPO</b>", 0.7)), "held-out prompts"),
            BON,
            Table("Samples", ("prompt", "response"), (("p", "long text\nin lines " * 60),)),
        ),
    )


def test_page_is_well_formed_self_contained_and_escaped(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('# postgrad align\npath = "<tiny>"\n')
    (tmp_path / "environment.json").write_text(json.dumps({"torch": "2.13", "device": {"kind": "cpu"}}))
    path = write_report(report(tmp_path), "A <title>")
    page = path.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in tags.seen and "link" not in tags.seen and "img" not in tags.seen
    assert all(link.startswith("#") for link in tags.links)
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "<b>DPO" not in page and "&lt;b&gt;DPO&lt;/b&gt;" in page
    assert "A &lt;title&gt;" in page and "second &lt;line&gt;" in page
    assert "path = &quot;&lt;tiny&gt;&quot;" in page and "device.kind" in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_page_has_every_part(tmp_path: Path) -> None:
    page = write_report(report(tmp_path), "Title").read_text(encoding="utf-8")
    assert '<dd class="figure">0.7069</dd>' in page and '<dd class="figure">1,500</dd>' in page
    assert 'class="note good"' in page
    assert '<th scope="col" class="figure">gold</th>' in page and '<td class="figure">0.7000</td>' in page
    assert page.count("<svg") == 1 and page.count("<details>") == 2  # the plot's values, the long response
    assert "proxy, low" in page and 'class="dashed"' in page
    assert "long text\nin lines" in page
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_same_report_same_bytes(tmp_path: Path) -> None:
    first = write_report(report(tmp_path), "Title").read_bytes()
    assert write_report(report(tmp_path), "Title").read_bytes() == first


def test_empty_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = Report("sft", tmp_path, {}, (Table("none", ("a",), ()), Plot("none", "x", "y", ())))
    tags = Tags()
    tags.feed(write_report(empty, "").read_text(encoding="utf-8"))
    assert tags.open == []
    print_report(empty)
    assert "postgrad sft" in capsys.readouterr().out


def test_plot_takes_its_colours_from_the_page() -> None:
    svg = draw(BON)
    assert svg.startswith("<svg") and svg.endswith("</svg>")
    assert "var(--series-0)" in svg and "var(--series-1)" in svg and "var(--line)" in svg
    assert "#0" not in svg.replace('"#m', "").replace("(#p", "") and "font-family" not in svg
    for label in (">1<", ">2<", ">4<", ">64<", ">gold<"):
        assert label in svg
    assert draw(BON) == svg


@pytest.mark.parametrize(
    "series",
    [
        Series("one point", (3,), (1.0,)),
        Series("nothing", (), ()),
        Series("not finite", (1, 2, 3), (1.0, math.nan, math.inf)),
        Series("band with a hole", (1, 2), (1.0, 2.0), (0.0, math.nan), (2.0, math.nan)),
        Series("flat", (0, 1), (0.0, 0.0)),
        Series("数 $x_1 & <y>", (1, 2), (1e-7, 2e-7)),
    ],
)
@pytest.mark.parametrize("log_x", [True, False])
def test_odd_series_can_be_drawn(series: Series, log_x: bool) -> None:
    tags = Tags()
    tags.feed(draw(Plot(series.name, "x $", series.name, (series,), log_x)))
    assert tags.open == []


def test_long_series_become_means_with_their_range() -> None:
    num = 2 * MAX_POINTS
    series = thin(Series("s", tuple(range(num)), tuple(float(i % 2) for i in range(num))))
    assert series.x[:2] == (0.5, 2.5) and len(series.x) == MAX_POINTS
    assert set(series.y) == {0.5} and set(series.low) == {0.0} and set(series.high) == {1.0}


def test_figures_are_easy_to_compare() -> None:
    assert format_column([0.5, 0.12345, 1]) == ["0.5000", "0.1235", "1"]
    assert format_column([12.5, 1234.567]) == ["12.5", "1,234.6"]
    assert format_column([1e-5, 0.1, -5e-7, 0.0]) == ["1e-5", "0.1", "−5e-7", "0"]
    assert format_column([1e-4, 2.5e-5, 0.0]) == ["1e-4", "2.5e-5", "0"]
    assert format_column([math.nan, 1.0, -math.inf]) == ["–", "1.000", "−∞"]
    assert [format_cell(c) for c in (7340032, -3, 3.17444, 5e-7, -0.00001, "a", True)] == [
        "7,340,032", "−3", "3.174", "5e-7", "−1e-5", "a", "True",
    ]  # fmt: skip


def test_metrics_come_back_without_a_half_line(tmp_path: Path) -> None:
    log_metrics(tmp_path, {"step": 1, "loss": 0.1, "eval": {"loss": math.nan}})
    log_metrics(tmp_path, {"step": 2, "loss": 1 / 3})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.1, "eval": {"loss": None}},
        {"step": 2, "loss": 1 / 3},
    ]
    assert read_metrics(tmp_path, "timing.jsonl") == []


def test_training_sections_put_train_beside_held_out(tmp_path: Path) -> None:
    for step in (1, 2, 2):  # step 2 was repeated after a resume
        log_metrics(tmp_path, {"step": step, "loss": 1.0 / step, "note": "text", "eval": {"accuracy": 0.5}})
        log_metrics(tmp_path, {"step": step, "tokens_per_second": 9.0, "seconds": 3.0}, "timing.jsonl")
    log_metrics(tmp_path, {"step": 2, "eval/loss": 0.7, "eval/once": 1.0})
    loss, accuracy, rate = training_sections(tmp_path)
    assert isinstance(loss, Plot) and isinstance(accuracy, Plot) and isinstance(rate, Plot)
    assert [s.name for s in loss.series] == ["loss", "eval/loss"]
    assert loss.series[0].x == (1.0, 2.0) and loss.series[0].y == (1.0, 0.5) and loss.series[1].dashed
    assert (accuracy.title, rate.title) == ("accuracy", "tokens per second")
    assert training_sections(tmp_path / "elsewhere") == ()


def test_logged_intervals_become_bands_and_small_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"accuracy": 0.8, "accuracy_low": 0.75, "accuracy_high": 0.85, "stray_low": 1.0}
    for step in (5, 10):
        log_metrics(tmp_path, {"step": step} | {f"eval/{key}": value for key, value in row.items()})
    accuracy, stray = training_sections(tmp_path)
    assert isinstance(accuracy, Plot) and isinstance(stray, Plot)
    assert accuracy.series == (Series("eval/accuracy", (5.0, 10.0), (0.8,) * 2, (0.75,) * 2, (0.85,) * 2, True),)
    assert stray.title == "stray low"
    result = Report("reward", tmp_path, row)
    page = write_report(result, "Title").read_text(encoding="utf-8")
    assert "0.8000<small>0.7500 to 0.8500</small>" in page
    assert "accuracy low" not in page and "stray low" in page
    print_report(result)
    assert "0.7500 to 0.8500" in capsys.readouterr().out


def test_terminal_shows_results_tables_and_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    many = Table("Ranks", ("rank [red]", "gold"), tuple((i, i / 7) for i in range(40)))
    print_report(Report("align", tmp_path, {"gold": 0.5}, (*report(tmp_path).sections, many)))
    out = capsys.readouterr().out
    for text in ("postgrad align", "0.5000", "Good & well", "<b>DPO</b>", "proxy", "▁", "rank [red]"):
        assert text in out
    assert "24 more rows in report.html" in out
    assert out.count("long text") < 15  # long cells are cut
