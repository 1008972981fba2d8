"""Packing: layout by hand, equality with one-by-one rows in value and gradient, order does not matter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from postgrad.core import segments
from postgrad.core.batches import eval_batches, micro_batches, sequence_values, tree_batches
from postgrad.core.config import DataConfig, TrainConfig
from postgrad.core.models import sequence_logprobs, target_logprobs
from postgrad.core.rows import Tree, first_fit, pack, tree_mask
from postgrad.core.runtime import Job

VOCABULARY = 61


def job(rank: int = 0, world: int = 1, seed: int = 0) -> Job:
    return Job("sft", Path("unused"), seed, torch.device("cpu"), torch.float32, rank, world, True)


def tiny(kind: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=128)
        ).eval()
    if kind == "sliding":
        return Qwen3ForCausalLM(
            Qwen3Config(**shape, num_key_value_heads=1, head_dim=16, sliding_window=5, use_sliding_window=True,
                        layer_types=["full_attention", "sliding_attention"])
        ).eval()  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1)).eval()


def random_trees(num: int, seed: int = 0) -> list[Tree]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(VOCABULARY, (size,), generator=generator).tolist())

    trees = []
    for i in range(num):
        if i % 3 == 2:
            prompt = tokens(4, 14)
            trees.append(Tree(prompt, (), tuple(k % 2 == 0 for k in range(len(prompt)))))
        else:
            trees.append(Tree(tokens(1, 9), tuple(tokens(1, 8) for _ in range(1 + i % 4))))
    return trees


def one_by_one(model: torch.nn.Module, tree: Tree) -> torch.Tensor:
    """Log-probability of each sequence through the model's own logits, no packing, no mask of ours."""
    sums = []
    for answer in tree.answers or ((),):
        ids = torch.tensor([tree.prompt + answer])
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        if tree.answers:
            sums.append(logprobs[len(tree.prompt) - 1 :].sum())
        else:
            sums.append(logprobs[torch.tensor(tree.supervised[1:])].sum())
    return torch.stack(sums)


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


@pytest.mark.parametrize("layout", ["tree", "one row", "flat"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "sliding"])
def test_packed_equals_one_by_one(kind, layout):
    model, trees = tiny(kind), random_trees(9)
    if layout == "one row":
        model.set_attn_implementation(segments.NAME)
        rows = pack(trees, range(9), row_length=10_000, layout="tree", pad_id=0)
        assert rows.segments is not None
    else:
        rows = pack(trees, range(9), row_length=64, layout=layout, pad_id=0)
    ours = sequence_logprobs(model, rows)
    theirs = torch.cat([one_by_one(model, tree) for tree in trees])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    slope = torch.linspace(-1, 1, len(theirs))
    parameters = list(model.parameters())
    got = torch.autograd.grad(ours, parameters, slope)
    want = torch.autograd.grad(theirs, parameters, slope)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_masks_equal_sdpa():
    model, trees = tiny(), random_trees(6)
    rows = pack(trees, range(6), row_length=128, layout="tree", pad_id=0)
    want = sequence_logprobs(model, rows)
    model.set_attn_implementation("flex_attention")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        got = sequence_logprobs(model, rows)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


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


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 60))
@settings(deadline=None, max_examples=50)
def test_first_fit_keeps_every_item_once_and_no_bin_overflows(lengths, width):
    bins = first_fit(lengths, width)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= width for members in bins)
    assert len(bins) <= 2 * -(-sum(lengths) // width), "first fit leaves at most one bin half empty"


@pytest.mark.parametrize("layout", ["tree", "flat"])
def test_micro_batches_hold_every_tree_once_under_the_budget(layout):
    trees = random_trees(30)
    batches = micro_batches(trees, range(30), row_length=0, micro_tokens=100, layout=layout, pad_id=0)
    assert sorted(i for rows in batches for i in rows.index) == list(range(30))
    assert all(rows.tokens.numel() <= 2 * 100 or len(rows.index) == 1 for rows in batches)
    assert sum(rows.num_sequences for rows in batches) == sum(t.num_sequences for t in trees)


def test_gpu_rows_have_one_shape():
    """FlexAttention compiles a kernel for every shape, so all micro-batches but oversized ones are alike."""
    gpu = torch.device("cuda")
    batches = micro_batches(
        random_trees(30), range(30), row_length=0, micro_tokens=100, layout="tree", pad_id=0, device=gpu
    )
    assert {rows.tokens.shape for rows in batches} == {(1, 128)}


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


def test_rows_move_together():
    rows = pack(random_trees(3), range(3), row_length=0, layout="tree", pad_id=0)
    moved = rows.to(torch.device("cpu"))
    assert replace(moved, index=()).tokens.equal(rows.tokens)
