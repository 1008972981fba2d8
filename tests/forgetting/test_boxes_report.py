"""Figures of a detector's requests, worked out by hand."""

import pytest
import torch

from postgrad.forgetting.average_precision import Boxes
from postgrad.forgetting.boxes_report import Found, precisions
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
