"""Attention masks: FlexAttention's equal SDPA's; windows go by position."""

import pytest
import torch
from trees import random_trees, tiny

from postgrad.core.masks import attention_inputs, within_window
from postgrad.core.models import sequence_logprobs
from postgrad.core.rows import pack


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_masks_equal_sdpa():
    model, trees = tiny(), random_trees(6)
    rows = pack(trees, range(6), row_length=128, layout="tree", pad_id=0)
    want = sequence_logprobs(model, rows)
    model.set_attn_implementation("flex_attention")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
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
