"""Rows of two kinds in one step, whatever the micro-batches and ranks."""

from pathlib import Path

import pytest
from texts import PACKING, job, trees

from postgrad.core.batches import TreeBatches
from postgrad.core.config import TrainConfig
from postgrad.core.rows import Tree
from postgrad.forgetting.text_batches import BothBatches, Phase, both_batches, forget_steps, phases


def streams(trees: list[Tree], rank: int = 0, world: int = 1, micro_tokens: int = 64) -> BothBatches:
    def stream(part: list[Tree], size: int, seed: int) -> TreeBatches:
        return TreeBatches(part, 7, size, micro_tokens, 0, "tree", 256, seed, rank, world)

    return BothBatches(stream(trees[4:], 6, 1), stream(trees[:4], 3, 2))


def test_a_step_sees_both_kinds() -> None:
    """Six retained rows and three to forget, whatever the micro-batches and ranks; their shares add up to one."""
    rows = trees(15)
    for step in range(7):
        whole = streams(rows, micro_tokens=4096)[step]
        assert len(whole) == 1 and whole[0].share.part == 1
        index = sorted(whole[0].rows.index)
        assert sum(i >= 11 for i in index) == 3 == whole[0].share.rows and len(index) == 9
        both = streams(rows)
        assert whole[0].share.tokens == sum(sum(both.trees[i].supervised[1:]) for i in index if i < 11)
        parts = [part for rank in range(2) for part in streams(rows, rank, 2)[step]]
        assert len(parts) > 2 and sorted(i for part in parts for i in part.rows.index) == index
        assert sum(part.share.part for part in parts) == pytest.approx(1)
        assert {part.share[:2] for part in parts} == {whole[0].share[:2]}


def test_an_epoch_is_a_pass_over_the_rows_to_forget(tmp_path: Path) -> None:
    rows = trees(15)
    train = TrainConfig(epochs=3, batch_size=8)
    assert forget_steps(train, 4).batch_size == 4
    batches = both_batches((rows[4:], rows[:4]), 2, train, PACKING, job(tmp_path), Phase("rest", 3, False))
    assert len(batches) == 3 and batches.retain.batch_size == 8
    for step in range(3):
        (part,) = batches[step]
        assert sorted(i - 11 for i in part.rows.index if i >= 11) == [0, 1, 2, 3]


def test_phases() -> None:
    """A phase without steps is left out; max_steps counts both."""
    train = TrainConfig(epochs=10, batch_size=4)
    assert phases(train, 8, 0.3) == [Phase("sparse", 6, True), Phase("rest", 14, False)]
    assert phases(train, 8, 0.0) == [Phase("rest", 20, False)]
    assert phases(TrainConfig(max_steps=5), 8, 1.0) == [Phase("sparse", 5, True)]
