"""Packing: the layout by hand, bins that never overflow."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import random_trees

from postgrad.core.rows import Tree, first_fit, pack, tree_mask


def test_pack_by_hand():
    """Prompt 1 2, answers 3 4 and 5: positions 0 1 2 3 2; both answers start from the prompt's last place, 1."""
    rows = pack([Tree((1, 2), ((3, 4), (5,)))], [0], row_length=8, layout="tree", pad_id=0)
    assert rows.tokens.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 2, 0, 0, 0]]
    assert rows.branch.tolist() == [[0, 0, 1, 1, 2, 0, 0, 0]]
    assert rows.group.tolist() == [[0, 0, 0, 0, 0, -1, -1, -1]]
    assert rows.source.tolist() == [1, 2, 1]
    assert rows.target.tolist() == [3, 4, 5]
    assert rows.sequence.tolist() == [0, 0, 1]
    assert rows.ends.tolist() == [3, 4]
    assert rows.lengths.tolist() == [2, 1]
    assert rows.num_tokens == 5
    seen = tree_mask(rows.group, rows.branch)[0, 0]
    assert seen[4].tolist() == [True, True, False, False, True, False, False, False]
    assert seen.any(-1).all(), "an empty mask row makes NaN"


def test_first_token_of_a_conversation_is_never_a_target():
    rows = pack([Tree((1, 2, 3), (), (True, False, True))], [0], row_length=0, layout="tree", pad_id=0)
    assert rows.source.tolist() == [1]
    assert rows.target.tolist() == [3]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 60))
@settings(deadline=None, max_examples=50)
def test_first_fit_keeps_every_item_once_and_no_bin_overflows(lengths, width):
    bins = first_fit(lengths, width)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= width for members in bins)
    assert len(bins) <= 2 * -(-sum(lengths) // width), "first fit leaves at most one bin half empty"


def test_rows_move_together():
    rows = pack(random_trees(3), range(3), row_length=0, layout="tree", pad_id=0)
    moved = rows.to(torch.device("cpu"))
    assert replace(moved, index=()).tokens.equal(rows.tokens)
