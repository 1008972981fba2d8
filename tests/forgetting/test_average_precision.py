"""Average precision by hand, by its properties, and read from a detector's outputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postgrad.forgetting.average_precision import (
    Boxes,
    average_precision,
    class_precision,
    corners,
    detections,
    iou,
    present,
    split_precision,
)


def found(*rows):
    """Make detections of (class, score, left, top, right, bottom)."""
    table = torch.tensor([row[2:] for row in rows], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([row[1] for row in rows], dtype=torch.float32)
    return Boxes(table, torch.tensor([row[0] for row in rows], dtype=torch.int64), scores)


def there(*rows):
    """Make boxes of (class, left, top, right, bottom)."""
    made = found(*((row[0], 1.0, *row[1:]) for row in rows))
    return made._replace(scores=None)


UNIT, FAR = (0.0, 0.0, 1.0, 1.0), (5.0, 5.0, 6.0, 6.0)


def test_hits_and_misses_by_hand():
    """Two boxes. Surest: a hit. Then a miss. Then a hit that overlaps 0.62, so up to 0.60 only.

    For 0.50, 0.55, 0.60: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1; recalls 0 to 0.50 (51 of 101) read 1, the other
    50 read 2/3: (51 + 50 x 2/3) / 101. For the other seven: 51 read 1, then nothing: 51/101.
    """
    truth = there((7, *UNIT), (7, *FAR))
    guess = found((7, 0.9, *UNIT), (7, 0.8, 2.0, 2.0, 3.0, 3.0), (7, 0.7, 5.0, 5.0, 5.62, 6.0))
    expected = (3 * (51 + 50 * 2 / 3) + 7 * 51) / 101 / 10
    assert class_precision([guess], [truth], 7) == pytest.approx(expected, abs=1e-12)


def test_a_miss_before_the_hit_halves_the_precision():
    guess = found((0, 0.9, *FAR), (0, 0.3, *UNIT))
    assert average_precision([guess], [there((0, *UNIT))], [0]) == pytest.approx(0.5)


def test_a_box_is_given_once():
    """The second detection of the same box is a miss; ranked last it costs nothing, ranked before a hit it does.

    By hand, in the second case: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1.
    """
    twice = found((0, 0.9, *UNIT), (0, 0.8, *UNIT))
    assert average_precision([twice], [there((0, *UNIT))], [0]) == 1.0
    both = found((0, 0.9, *UNIT), (0, 0.8, *UNIT), (0, 0.7, *FAR))
    assert average_precision([both], [there((0, *UNIT), (0, *FAR))], [0]) == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_a_detection_takes_the_free_box_it_overlaps_most():
    """The surer one takes the exact box and leaves the near one, with overlap 0.8, to the other."""
    near = (0.0, 0.0, 1.0, 0.8)
    truth = there((0, *near), (0, *UNIT))
    guess = found((0, 0.9, *UNIT), (0, 0.8, *UNIT))
    hits = (7 * 101 + 3 * 51) / 101 / 10  # both up to 0.80, one beyond
    assert class_precision([guess], [truth], 0) == pytest.approx(hits)


def test_images_are_ranked_together_and_matched_apart():
    """By hand: the surest of all is a miss on the second image, so precision is 0, 1/2, 2/3 at recall 0, 1/2, 1."""
    guesses = [found((0, 0.5, *UNIT)), found((0, 0.9, *FAR), (0, 0.1, *UNIT))]
    truths = [there((0, *UNIT)), there((0, *UNIT))]
    assert average_precision(guesses, truths, [0]) == pytest.approx(2 / 3)


def test_classes_are_averaged_and_absent_ones_left_out():
    guess = found((0, 0.9, *UNIT), (1, 0.9, *UNIT), (5, 0.9, *UNIT))
    truth = there((0, *UNIT), (1, *FAR))
    assert average_precision([guess], [truth], [0, 1, 2]) == 0.5
    assert average_precision([guess], [truth], [2]) is None and average_precision([], [], [0]) is None
    assert average_precision([found()], [truth], [0]) == 0.0


def test_groups_see_only_the_images_that_show_them():
    """On the image without class 0 its false detection costs nothing; over all images it would."""
    guesses = [found((0, 0.5, *UNIT)), found((0, 0.9, *UNIT), (1, 0.9, *UNIT))]
    truths = [there((0, *UNIT)), there((1, *UNIT))]
    groups = {"forgotten": [0], "remaining": [1], "old": [2]}
    assert split_precision(guesses, truths, groups) == {"forgotten": 1.0, "remaining": 1.0, "old": None}
    assert average_precision(guesses, truths, [0]) == 0.5


def test_only_the_surest_hundred_count():
    rows = [(0, 1.0 - i / 1000, *FAR) for i in range(100)]
    truth = [there((0, *UNIT))]
    assert average_precision([found(*rows[1:], (0, 0.1, *UNIT))], truth, [0]) == pytest.approx(0.01)
    assert average_precision([found(*rows, (0, 0.1, *UNIT))], truth, [0]) == 0.0


def test_overlap_by_hand():
    """Halves of a unit square overlap a third of their union; boxes that touch, or have no area, overlap nothing."""
    one = torch.tensor([[0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    other = torch.tensor([[0.5, 0.0, 1.5, 1.0], [1.0, 0.0, 2.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    torch.testing.assert_close(iou(one, other), torch.tensor([[1 / 3, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def test_deformable_outputs_are_read_pair_by_pair():
    logits = torch.tensor([[[2.0, -1.0], [0.0, 3.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.2, 0.3, 0.2, 0.2]]])
    (best,) = detections(logits, boxes, softmax=False, limit=3)
    assert best.labels.tolist() == [1, 0, 0]
    torch.testing.assert_close(best.scores, torch.tensor([3.0, 2.0, 0.0]).sigmoid())
    torch.testing.assert_close(best.corners[:2], torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 1.0, 1.0]]))


def test_detr_outputs_name_one_class_a_query_and_never_no_object():
    logits = torch.tensor([[[1.0, 0.0, 9.0], [0.0, 2.0, 0.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.2, 0.3, 0.2, 0.2]]])
    (best,) = detections(logits, boxes, softmax=True)
    assert best.labels.tolist() == [1, 0]
    torch.testing.assert_close(best.scores, logits.softmax(-1)[0, [1, 0], [1, 0]])


def test_what_a_target_shows_is_found_in_full():
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.3, 0.2, 0.5]])
    truth = present([{"boxes": boxes, "class_labels": torch.tensor([1, 3])}])
    assert torch.equal(truth[0].corners, corners(boxes))
    assert average_precision([truth[0]._replace(scores=torch.ones(2))], truth, range(5)) == 1.0


@given(st.integers(0, 2**16), st.integers(0, 4), st.integers(0, 6))
def test_precision_is_a_share_and_perfect_detections_have_it_all(seed, num, extra):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num + extra, 2, generator=generator)
    table = torch.cat([low, low + 0.1 + torch.rand(num + extra, 2, generator=generator)], dim=1)
    labels = torch.randint(0, 2, (num + extra,), generator=generator)
    truth = [Boxes(table[:num], labels[:num])]
    scores = torch.rand(num + extra, generator=generator)
    value = average_precision([Boxes(table, labels, scores)], truth, [0, 1])
    assert (value is None) == (num == 0) and (value is None or 0 <= value <= 1)
    if num:
        assert average_precision([Boxes(table[:num], labels[:num], scores[:num])], truth, [0, 1]) == 1.0
        surest = torch.cat([torch.ones(num), scores[num:] / 2])
        assert average_precision([Boxes(table, labels, surest)], truth, [0, 1]) == 1.0
