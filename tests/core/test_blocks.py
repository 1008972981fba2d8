"""Blocks: cut by hand, each target once, the same steps however they are split."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postgrad.core.blocks import BlockBatches, Stream, block_batches, cut, require_blocks, spread_blocks
from postgrad.core.config import TrainConfig
from postgrad.core.runtime import Job
from postgrad.errors import DataError


def stream(num: int) -> Stream:
    """Tokens 0, 1, 2, ..."""
    return Stream(np.arange(num, dtype=np.uint16), 1, num)


def batches(num: int, **more: object) -> BlockBatches:
    """Steps of four blocks of three targets."""
    usual = BlockBatches(
        stream=stream(num), length=3, steps=10, batch_size=4, micro_rows=2, seed=1, rank=0, world=1
    )  # fmt: skip
    return replace(usual, **more)


def test_blocks_by_hand() -> None:
    """Seven tokens make two blocks of three targets; the last of one is the first input of the next."""
    seven = stream(7)
    assert seven.num_blocks(3) == 2 and stream(6).num_blocks(3) == 1 and stream(0).num_blocks(3) == 0
    found = seven.blocks([1, 0], 3)
    assert found.tolist() == [[3, 4, 5, 6], [0, 1, 2, 3]] and found.dtype == torch.int64


@given(st.integers(0, 200), st.integers(1, 20))
def test_every_target_is_in_one_block(num: int, length: int) -> None:
    """All tokens but the first are targets once, up to the last whole block."""
    one = stream(num)
    count = one.num_blocks(length)
    targets = one.blocks(range(count), length)[:, 1:].flatten().tolist() if count else []
    assert targets == list(range(1, count * length + 1)) and num - 1 - len(targets) < length


def test_an_epoch_is_a_permutation_that_the_seed_decides() -> None:
    """61 tokens are 20 blocks: five steps of four see each once; the next epoch has another order."""
    found = batches(61)
    first = [i for step in range(5) for i in found.items(step)]
    second = [i for step in range(5, 10) for i in found.items(step)]
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert batches(61, seed=2).items(0) != found.items(0)
    assert len(found) == 10


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_rows", [1, 3, 8])
def test_ranks_and_micro_batches_share_out_a_step(world: int, micro_rows: int) -> None:
    """Together they have the very blocks of one rank's single micro-batch."""
    whole = batches(61, micro_rows=4)[3]
    assert len(whole) == 1
    parts = [part for rank in range(world) for part in batches(61, micro_rows=micro_rows, rank=rank, world=world)[3]]
    assert all(len(part) <= micro_rows for part in parts)
    together = torch.cat(parts)
    assert sorted(together.tolist()) == sorted(whole[0].tolist())


def test_settings_become_batches(tmp_path: Path) -> None:
    job = Job("pretrain", tmp_path, 7, torch.device("cpu"), torch.float32, 1, 2, True)
    found = block_batches(stream(61), 3, TrainConfig(epochs=2.0, batch_size=4, micro_tokens=8), job)
    assert (found.steps, found.micro_rows, found.seed, found.rank, found.world) == (10, 2, 7, 1, 2)
    assert block_batches(stream(61), 3, TrainConfig(micro_tokens=2), job).micro_rows == 1
    with pytest.raises(DataError, match=r"at least 4 tokens .* found 3\. Give more text, or lower data.max_length"):
        block_batches(stream(3), 3, TrainConfig(), job)
    assert require_blocks(stream(4), 3) == 1


def test_blocks_are_chosen_evenly() -> None:
    """20 blocks: all of them, or every fourth."""
    assert spread_blocks(stream(61), 3, 0) == spread_blocks(stream(61), 3, 99) == list(range(20))
    assert spread_blocks(stream(61), 3, 5) == [0, 4, 8, 12, 16]
    assert spread_blocks(stream(2), 3, 5) == []
    assert cut([1, 2, 3], 2) == [[1, 2], [3]]
