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


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "gpt2", "sliding"])
def test_packed_on_a_gpu_equals_one_by_one(kind):
    """Rows of two widths, so that FlexAttention compiles for every width; values and gradients."""
    torch.backends.cuda.matmul.allow_tf32 = False
    cpu, gpu = tiny(kind), tiny(kind).cuda()
    gpu.set_attn_implementation(segments.NAME)
    for num in (9, 40, 120):
        trees = random_trees(num, seed=num)
        rows = pack(trees, range(num), row_length=10_000, layout="tree", pad_id=0, multiple=128)
        assert rows.tokens.shape[0] == 1
        theirs = torch.cat([one_by_one(cpu, tree) for tree in trees])
        ours = sequence_logprobs(gpu, rows.to(torch.device("cuda")))
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=1e-4)
        slope = torch.linspace(-1, 1, num_sequences := len(theirs))
        assert num_sequences == rows.num_sequences
        got = torch.autograd.grad(ours, list(gpu.parameters()), slope.cuda())
        want = torch.autograd.grad(theirs, list(cpu.parameters()), slope)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.cpu(), b, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_dropout_on_a_gpu_goes_through_the_segments():
    """FlexAttention has no dropout; what is dropped changes from call to call, its mean does not."""
    model = tiny("llama").cuda()
    model.set_attn_implementation(segments.NAME)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    rows = pack(random_trees(9), range(9), row_length=10_000, layout="tree", pad_id=0, multiple=128).to(
        torch.device("cuda")
    )
    plain = sequence_logprobs(model, rows)
    dropped = sequence_logprobs(model.train(), rows)
    assert torch.isfinite(dropped).all() and not torch.allclose(plain, dropped)


def test_without_segments_it_is_plain_attention():
    """Generation and padded rows go through transformers' own attention."""
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, 7))
    plain, ours = tiny(), tiny()
    ours.set_attn_implementation(segments.NAME)
    torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
