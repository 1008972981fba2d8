"""Sets of images with boxes: chosen, drawn, held out, renamed; and the shapes that are drawn here."""

import pytest
import torch

from postgrad.errors import DataError
from postgrad.forgetting.average_precision import corners
from postgrad.forgetting.boxes import BoxSet, InMemory, few_of_each, held_out
from postgrad.forgetting.shapes import COLOURS, SHAPES, SIDE, shapes

CLASSES = ("cat", "dog", "cow")


def target(*labels):
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4]] * len(labels)).reshape(-1, 4)
    return {"class_labels": torch.tensor(labels, dtype=torch.int64), "boxes": boxes}


def boxes(*targets):
    images = torch.arange(len(targets), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 6)
    return BoxSet(InMemory(images), tuple(range(len(targets))), tuple(targets), CLASSES)


def test_images_are_chosen_with_the_boxes_of_the_classes_asked_for():
    shown = boxes(target(0, 1), target(1), target(2, 0, 0)).showing([0])
    assert shown.rows == (0, 2) and [t["class_labels"].tolist() for t in shown.targets] == [[0], [0, 0]]
    assert shown.counts == {0: 3} and int(shown.picture(1)[0, 0, 0]) == 2
    assert len(boxes(target(1)).showing([2])) == 0


def test_labels_are_counted_over_a_detectors_classes():
    renamed = boxes(target(0, 2)).renamed(("N/A", "cow", "cat"))
    assert renamed.targets[0]["class_labels"].tolist() == [2, 1] and renamed.classes == ("N/A", "cow", "cat")
    with pytest.raises(DataError, match=r"boxes of 'dog'.*nearest is 'dogs'"):
        boxes(target(1)).renamed(("cat", "dogs", "cow"))
    assert boxes(target(0)).renamed(("cat",)).counts == {0: 1}, "a class without boxes may be unknown"


def test_hashes_tell_images_apart():
    first, second = boxes(target(0), target(0)).hashes
    assert first != second and len(first) == 16


def test_a_share_is_held_out_and_every_class_stays_in_training():
    every = boxes(*[target(i % 3) for i in range(30)])
    train, test = held_out(every, 0.2, 0)
    assert len(test) == 6 and sorted(train.rows + test.rows) == list(range(30))
    assert held_out(every, 0.2, 0)[1].rows == test.rows != held_out(every, 0.2, 1)[1].rows
    with pytest.raises(DataError, match="lower test_share"):
        held_out(boxes(target(0), target(1)), 0.5, 0)


def test_few_images_of_each_class():
    every = boxes(*[target(i % 3) for i in range(30)])
    one, two = few_of_each(every, 1, 0), few_of_each(every, 2, 0)
    assert one.counts == {0: 1, 1: 1, 2: 1} and set(one.rows) < set(two.rows)


def test_shapes_are_always_the_same_and_fill_their_boxes():
    made = shapes(12, "train")
    assert torch.equal(made.picture(3), shapes(4, "train").picture(3))
    assert not torch.equal(made.picture(0), shapes(1, "test").picture(0))
    assert set(shapes(40, "train").counts) == set(range(len(SHAPES)))
    for item, each in enumerate(made.targets):
        assert 1 <= len(each["boxes"]) <= 3
        for label, box in zip(each["class_labels"].tolist(), corners(each["boxes"]), strict=True):
            left, top, right, bottom = (round(float(edge) * SIDE) for edge in box)
            assert 0 <= left < right <= SIDE and 0 <= top < bottom <= SIDE
            if SHAPES[label] == "square":
                colour = made.picture(item)[:, top:bottom, left:right].float().mean((1, 2))
                assert (colour - torch.tensor(COLOURS[label])).abs().max() < 60
