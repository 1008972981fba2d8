"""Batches: every tree once a step, orders keyed by the seed, ranks and widths that change no result."""

import pytest
import torch
from trees import job, random_trees, tiny

from postgrad.core.batches import eval_batches, micro_batches, sequence_values, tree_batches
from postgrad.core.config import DataConfig, TrainConfig
from postgrad.core.models import sequence_logprobs, target_logprobs
from postgrad.core.rows import pack


def test_order_of_packing_does_not_matter():
    model, trees = tiny(), random_trees(12)
    batches = eval_batches(trees, row_length=0, micro_tokens=60, layout="tree", pad_id=0)
    assert len(batches) > 1
    with torch.no_grad():
        some = sequence_values(trees, batches, lambda rows: sequence_logprobs(model, rows))
        shuffled = [trees[i] for i in reversed(range(12))]
        one = [pack(shuffled, range(12), row_length=300, layout="tree", pad_id=0)]
        other = sequence_values(shuffled, one, lambda rows: sequence_logprobs(model, rows))[::-1]
    for a, b in zip(some, other, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("layout", ["tree", "flat"])
def test_micro_batches_hold_every_tree_once_under_the_budget(layout):
    trees = random_trees(30)
    batches = micro_batches(trees, range(30), row_length=0, micro_tokens=100, layout=layout, pad_id=0)
    assert sorted(i for rows in batches for i in rows.index) == list(range(30))
    assert all(rows.tokens.numel() <= 2 * 100 or len(rows.index) == 1 for rows in batches)
    assert sum(rows.num_sequences for rows in batches) == sum(t.num_sequences for t in trees)


def test_on_a_gpu_all_trees_of_a_micro_batch_stand_in_one_row():
    gpu = torch.device("cuda")
    trees = random_trees(30)
    batches = micro_batches(trees, range(30), row_length=0, micro_tokens=300, layout="tree", pad_id=0, device=gpu)
    assert len(batches) > 1
    for rows in batches:
        num_rows, width = rows.tokens.shape
        assert num_rows == 1 and width % 128 == 0 and width - rows.num_tokens < 128


def test_training_order_is_a_permutation_an_epoch_and_ranks_share_a_step():
    trees = random_trees(10)
    config = TrainConfig(batch_size=4, epochs=2)
    whole = tree_batches(trees, config, job(), data=DataConfig(), layout="tree", pad_id=0)
    assert len(whole) == 5
    stream = [i for step in range(5) for i in whole.items(step)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    halves = [tree_batches(trees, config, job(rank, 2), data=DataConfig(), layout="tree", pad_id=0) for rank in (0, 1)]
    for step in range(5):
        seen = sorted(i for half in halves for rows in half[step] for i in rows.index)
        assert seen == sorted(whole.items(step))


def test_a_batch_larger_than_the_data_wraps_around():
    trees = random_trees(3)
    batches = tree_batches(
        trees, TrainConfig(batch_size=8, max_steps=2), job(), data=DataConfig(), layout="tree", pad_id=0
    )
    assert sorted(batches.items(0)) == sorted([0, 1, 2] * 2 + batches.items(0)[6:])
    assert sum(len(rows.index) for rows in batches[1]) == 8


def test_one_rank_with_no_tree_has_no_micro_batch():
    batches = tree_batches(
        random_trees(1), TrainConfig(batch_size=1), job(1, 2), data=DataConfig(), layout="tree", pad_id=0
    )
    assert batches[0] == []


def test_micro_batch_size_does_not_change_the_gradient():
    model, trees = tiny(), random_trees(8)

    def gradient(micro_tokens: int) -> list[torch.Tensor]:
        model.zero_grad()
        for rows in micro_batches(trees, range(8), row_length=0, micro_tokens=micro_tokens, layout="tree", pad_id=0):
            target_logprobs(model, rows).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for a, b in zip(gradient(1), gradient(10_000), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
