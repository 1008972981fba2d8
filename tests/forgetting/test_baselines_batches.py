"""Order and split of baselines' steps, and random labels."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postgrad.core.loop import Batches
from postgrad.errors import DataError
from postgrad.forgetting.baselines_batches import Deal, alternating, relabelled, together


def places(batches, side):
    return [place for batch in batches for place in vars(batch)[side].tolist()]


def test_an_epoch_passes_over_the_retained_images_and_wraps_the_others():
    batches = together(10, 3, 4, 2, seed=0, deal=Deal())
    assert isinstance(batches, Batches) and len(batches) == 6
    for epoch in range(2):
        steps = [batches[epoch * 3 + place] for place in range(3)]
        assert sorted(place for step in steps for place in places(step, "retain")) == list(range(10))
        assert all(sorted(places(step, "forget")) == [0, 1, 2] for step in steps)
    (first,) = batches[0]
    assert (first.num_retain, first.num_forget, len(first), first.share) == (4, 3, 7, 1.0)
    assert places(batches[0], "retain") != places(batches[3], "retain")


def test_methods_that_only_retain_see_nothing_else():
    batches = together(10, 0, 4, 1, seed=0, deal=Deal(), with_forget=False)
    assert not any(places(batches[step], "forget") for step in range(len(batches)))


@given(world=st.integers(1, 4), micro=st.integers(0, 5), step=st.integers(0, 5))
def test_however_a_step_is_split_its_images_are_the_same(world, micro, step):
    whole = together(10, 3, 4, 2, seed=1, deal=Deal())[step]
    parts = [
        batch for rank in range(world) for batch in together(10, 3, 4, 2, seed=1, deal=Deal(rank, world, micro))[step]
    ]
    for side in ("retain", "forget"):
        assert Counter(places(parts, side)) == Counter(places(whole, side))
    assert sum(len(batch) for batch in parts) == len(whole[0])
    assert {(batch.num_retain, batch.num_forget) for batch in parts} == {(whole[0].num_retain, whole[0].num_forget)}
    assert all(len(batch) <= micro for batch in parts) or micro == 0


def test_passes_alternate_and_the_last_epochs_only_retain():
    batches = alternating(6, 5, 2, 3, seed=0, deal=Deal())
    kinds = "".join("f" if places(batches[step], "forget") else "r" for step in range(len(batches)))
    assert kinds == "fffrrr" * 2 + "rrr"
    for first in (3, 9, 12):
        retained = [place for step in range(first, first + 3) for place in places(batches[step], "retain")]
        assert sorted(retained) == list(range(6))
    for first in (0, 6):
        assert sorted(place for step in range(first, first + 3) for place in places(batches[step], "forget")) == list(
            range(5)
        )
    assert batches[0][0].num_retain == 0 and batches[3][0].num_forget == 0


def test_labels_are_other_ones_and_all_allowed_ones_alike():
    labels = torch.tensor([0, 1, 2, 9]).repeat(3000)
    drawn = relabelled(labels, [2, 0, 1], 5)
    assert (drawn != labels).all()
    for own, others in ((0, {1, 2}), (1, {0, 2}), (2, {0, 1}), (9, {0, 1, 2})):
        counts = Counter(drawn[labels == own].tolist())
        assert set(counts) == others
        assert all(abs(num / 3000 - 1 / len(others)) < 0.04 for num in counts.values())
    assert torch.equal(drawn, relabelled(labels, [0, 1, 2], 5))
    assert not torch.equal(drawn, relabelled(labels, [0, 1, 2], 6))


def test_no_other_label_is_an_error():
    assert relabelled(torch.tensor([1]), [0], 0).tolist() == [0]
    with pytest.raises(DataError, match=r"found only \[0\]"):
        relabelled(torch.tensor([0]), [0], 0)
    assert len(relabelled(torch.tensor([], dtype=torch.int64), [0], 0)) == 0
