"""Attention masks: FlexAttention's block masks equal the tree mask; windows go by position."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from trees import random_trees, tiny

from postgrad.core.masks import BLOCK, attention_inputs, block_mask, within_window
from postgrad.core.models import sequence_logprobs
from postgrad.core.rows import PADDING, Rows, Tree, pack, tree_mask
from postgrad.core.segments import NAME


def long_trees(num: int) -> list[Tree]:
    """Prompts and answers of up to several blocks."""
    sizes = torch.Generator().manual_seed(3)

    def tokens(high: int) -> tuple[int, ...]:
        return (1,) * int(torch.randint(1, high, (1,), generator=sizes))

    return [Tree(tokens(500), tuple(tokens(400) for _ in range(i % 4))) for i in range(num)]


def packed(trees: list[Tree], row_length: int = 0) -> Rows:
    return pack(trees, range(len(trees)), row_length=row_length, layout="tree", pad_id=0, multiple=BLOCK)


@pytest.mark.parametrize("window", [0, 150])
@pytest.mark.parametrize("row_length", [3000, 100_000])
def test_block_masks_hold_just_the_blocks_of_the_tree_mask(row_length: int, window: int) -> None:
    """Every visible pair of tokens is in a block; a block without any is left out; full blocks are full."""
    rows = packed(long_trees(24), row_length)
    allowed = tree_mask(rows.group, rows.branch)[:, 0]  # [R, T, T]
    allowed[rows.group == PADDING] = False
    if window:
        allowed &= within_window(rows.positions, window)[:, 0]
    num_rows, width = rows.tokens.shape
    blocks = allowed.reshape(num_rows, width // BLOCK, BLOCK, width // BLOCK, BLOCK).transpose(2, 3)
    some, every = blocks.flatten(3).any(-1), blocks.flatten(3).all(-1)
    found = block_mask(rows, window)
    listed = found.to_dense()[:, 0].bool()
    assert not (some & ~listed).any()
    diagonal = torch.eye(width // BLOCK, dtype=torch.bool)
    if not window:
        assert ((listed & ~some) <= diagonal).all()  # a block of padding sees itself
        whole = found.full_kv_num_blocks[:, 0].sum()
        assert whole == every.sum() > 0
    else:
        assert found.full_kv_num_blocks.sum() == 0


def test_block_masks_decide_as_the_tree_mask() -> None:
    rows = packed(long_trees(6), 100_000)
    num_rows, width = rows.tokens.shape
    ours = block_mask(rows)
    theirs = create_block_mask(ours.mask_mod, num_rows, None, width, width, device="cpu")
    assert (theirs.to_dense() >= ours.to_dense()).all()
    real = torch.arange(width // BLOCK) < rows.num_tokens // BLOCK
    torch.testing.assert_close(theirs.to_dense()[:, :, real], ours.to_dense()[:, :, real])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "sliding"])
def test_attention_by_blocks_equals_sdpa(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, trees = tiny(kind), random_trees(6)
    rows = packed(trees)
    want = sequence_logprobs(model, rows)
    model.set_attn_implementation(NAME)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert attention_inputs(model.config, rows)["block_masks"] is not None
        got = sequence_logprobs(model, rows)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_window_goes_by_position_by_hand():
    """Positions 0 1 2 1 (an answer restarts at 1), window 2: the last sees 0, 1 and itself, and 2 sees 1 but not 0."""
    seen = within_window(torch.tensor([[0, 1, 2, 1]]), 2)[0, 0]
    assert seen[2].tolist() == [False, True, True, True]
    assert seen[3].tolist() == [True, True, True, True]


def test_flat_rows_take_a_padding_mask():
    rows = pack(random_trees(3), range(3), row_length=0, layout="flat", pad_id=0)
    mask = attention_inputs(tiny().config, rows)["attention_mask"]
    assert mask.shape == rows.tokens.shape
    assert mask.sum() == rows.num_tokens
