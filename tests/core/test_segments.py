"""Trees packed in any way equal sequences computed one by one, in value and gradient."""

import pytest
import torch
from trees import VOCABULARY, one_by_one, random_trees, tiny

from postgrad.core import segments
from postgrad.core.models import sequence_logprobs
from postgrad.core.rows import pack


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


def test_without_segments_it_is_plain_attention():
    """Generation and padded rows go through transformers' own attention."""
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, 7))
    plain, ours = tiny(), tiny()
    ours.set_attn_implementation(segments.NAME)
    torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
