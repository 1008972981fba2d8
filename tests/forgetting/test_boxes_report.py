"""Figures of a detector's requests, worked out by hand."""

from dataclasses import replace

import pytest
import torch
from services import apply_entry, request

from postgrad.forgetting.average_precision import Boxes
from postgrad.forgetting.boxes_report import NO_GOLD, Found, leak_note, leak_table, precisions
from postgrad.forgetting.schedules import TaskSplit

BOX = torch.tensor([[0.1, 0.1, 0.5, 0.5]])
ELSEWHERE = torch.tensor([[0.6, 0.6, 0.9, 0.9]])


def there(label):
    return Boxes(BOX, torch.tensor([label]))


def found(label, place=BOX):
    return Boxes(place, torch.tensor([label]), torch.tensor([0.9]))


THERE = [there(0), there(1), there(2)]
BASE = Found([found(0), found(1), found(2)], THERE)


def test_groups_are_measured_on_the_images_that_show_them():
    after = Found([found(0), found(1, ELSEWHERE), found(0)], THERE)
    split = TaskSplit(remain=(0,), forget=(1,), old=(2,))
    # the second 0 is wrong, but on an image without a 0
    assert precisions(BASE, after, split) == {
        "ap_r": 100.0, "ap_f": 0.0, "ap_o": 0.0, "ap_r_pretrained": 100.0, "ap_f_pretrained": 100.0, "h": 100.0,
    }  # fmt: skip
    # on all images it is as sure as the right one and comes after it, once every box is found
    assert after.of_classes == pytest.approx({0: 100.0, 1: 0.0, 2: 0.0})


def test_h_is_the_harmonic_mean_of_what_is_kept_and_what_was_lost():
    after = Found([found(0, ELSEWHERE), found(1, ELSEWHERE), found(2)], THERE)
    figures = precisions(BASE, after, TaskSplit(remain=(0, 2), forget=(1,)))
    assert figures["ap_r"] == 50.0 and figures["h"] == pytest.approx(2 * 50 * 100 / 150) and "ap_o" not in figures


def test_a_group_that_no_image_shows_is_left_out():
    assert precisions(BASE, BASE, TaskSplit(remain=(0, 1, 2), forget=(7,))) == {"ap_r": 100.0, "ap_r_pretrained": 100.0}


def test_gold_stands_beside_when_there_is_one():
    gold = Found([found(0), found(1, ELSEWHERE), found(2)], THERE)
    split = TaskSplit(remain=(0,), forget=(1,))
    figures = precisions(BASE, BASE, split, gold)
    assert (figures["ap_f"], figures["ap_f_gold"], figures["ap_f_excess"], figures["ap_r_gold"]) == (100, 0, 100, 100)
    assert "ap_f_excess" not in precisions(BASE, BASE, split)


LEAK = {"ap_f": 0.5, "ap_f_pretrained": 60.0, "knn_found": 40.0, "knn_pretrained": 90.0}
GOLD = {
    "ap_f_gold": 0.0, "ap_f_excess": 0.5, "knn_gold": 30.0, "knn_excess": 10.0, "knn_excess_low": 2.0,
    "knn_excess_high": 18.0,
}  # fmt: skip


def body(**metrics):
    return replace(apply_entry(request("one", "a"), "0" * 64, {}, 1), metrics=metrics)


def test_what_leaks_is_said_beside_gold_only():
    alone, beside = body(**LEAK), body(**LEAK, **GOLD)
    rows = leak_table([alone, beside]).rows
    assert rows[0] == ("one", "AP", 0.5, 60.0, NO_GOLD, NO_GOLD)
    assert rows[1] == ("one", "neighbours", 40.0, 90.0, NO_GOLD, NO_GOLD)
    assert rows[2:] == (
        ("one", "AP", 0.5, 60.0, 0.0, "0.5"),
        ("one", "neighbours", 40.0, 90.0, 30.0, "10.0 (2.0 to 18.0)"),
    )
    leaks = leak_note([beside])
    assert leaks.kind == "warning" and "neighbours finds 10.0 points more after one" in leaks.text
    assert leak_note([alone]).title == "Leaks cannot be judged without gold"
    assert leak_note([body(**{**LEAK, **GOLD, "knn_excess_low": -1.0})]).title == "No leak found"
