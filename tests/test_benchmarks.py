"""The benchmarks run, and both sides take the same steps: losses of each step agree."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # benchmarks are not installed

from benchmarks.alignment import __main__ as command  # noqa: E402
from benchmarks.alignment import worker  # noqa: E402
from benchmarks.alignment.data import MAX_LENGTH, QUANTILES, STOP, load, real_tokens, save, saved  # noqa: E402
from benchmarks.alignment.setting import Measured, Setting  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("trl")]

DATA = {"dpo": "hh", "reward": "hh", "sft": "instructions"}


def tiny(task: str, system: str) -> Setting:
    """Two steps of three rows."""
    return Setting(system, task, DATA[task], num=6, batch=3, vocabulary=97, size="tiny")


def run(setting: Setting) -> Measured:
    """Run on drawn rows: the folder is not there."""
    trees, _ = load(setting.data, setting.num, setting.vocabulary, seed=0, folder=Path("nowhere"))
    return worker.run(setting, trees)


@pytest.mark.parametrize("task", DATA)
def test_losses_of_both_sides_agree(task: str) -> None:
    ours, theirs = (run(tiny(task, system)) for system in ("postgrad", "trl default"))
    assert len(ours.losses) == 2
    assert command.loss_gap(ours, theirs) < command.LOSS_BAR
    assert ours.tokens == theirs.tokens
    for found in (ours, theirs):
        assert found.wall > 0 and found.cpu > 0 and found.peak > found.base > 0


@pytest.mark.parametrize(("task", "system"), [("dpo", "trl best"), ("reward", "trl best"), ("sft", "trl packed")])
def test_best_settings_see_every_row(task: str, system: str) -> None:
    found = run(replace(tiny(task, system), peer_batch=1))
    assert found.losses
    assert found.wall > found.reference_wall
    assert (found.reference_wall > 0) == (task == "dpo")


@pytest.mark.parametrize("name", QUANTILES)
def test_drawn_rows_have_lengths_of_texts(name: str) -> None:
    trees, origin = load(name, 200, 97, seed=0, folder=Path("nowhere"))
    again, _ = load(name, 200, 97, seed=0, folder=Path("nowhere"))
    assert origin == "drawn lengths" and trees == again
    assert real_tokens(trees) == sum(len(t.prompt) + sum(map(len, t.answers)) for t in trees)
    for tree in trees:
        assert all(answer[-1] == STOP for answer in tree.answers)
        assert len(tree.prompt) + max(map(len, tree.answers), default=0) <= MAX_LENGTH


def test_texts_are_read(shared: Path) -> None:
    trees, origin = load("hh", 20, 97, seed=0, folder=shared / "data" / "llm")
    assert origin == "texts" and all(len(tree.answers) == 2 for tree in trees)


@pytest.mark.parametrize("name", ["hh", "instructions"])
def test_rows_survive_their_file(name: str, tmp_path: Path) -> None:
    trees, _ = load(name, 5, 97, seed=0, folder=Path("nowhere"))
    save(trees, tmp_path / "rows.json")
    assert saved(tmp_path / "rows.json") == trees


def test_table_shows_ratios_to_ours() -> None:
    case = command.CASES[0]
    ours = Measured({}, 100, wall=2.0, cpu=4.0, peak=1.5, base=0.5, losses=[1.0])
    theirs = Measured({}, 100, wall=6.0, cpu=16.0, peak=3.5, base=0.5, losses=[1.00001])
    shown = command.table(case, [{"postgrad": ours, "trl default": theirs}], "texts")
    cells = [list(column.cells)[1] for column in shown.columns]
    assert cells[:6] == ["trl default", "17", "6", "3.00", "4.00", "3.50"]
    assert cells[7] == "3.00"
