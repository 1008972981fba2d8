"""Entering a network at a late block: the same logits and gradients, and no stale cache."""

from dataclasses import replace

import pytest
import torch
from networks import inputs, network, outputs
from torch import nn

from postgrad.core.layer_adapters import activate, drop, inject, pairs
from postgrad.errors import ArtefactError, ModelError
from postgrad.forgetting.blocks import Block, ffn_blocks
from postgrad.forgetting.prefix import PrefixCache, cache_prefix, cacheable, prefix_key, resumed, shortened

UNIFORM = ["vit", "deit", "beit", "dinov2", "dinov3", "clip", "clip_classifier", "siglip", "bert", "llama", "gpt2"]
STAGED = ["swin", "swinv2", "detr", "deformable_detr"]


def forgetting(name, k=2, earlier=False):
    """Draw a network with an adapter that trains from block k on, perhaps over an earlier request's in all blocks."""
    model = network(name)
    blocks = ffn_blocks(model)
    active = ["earlier"] if earlier else []
    for key, first in [(key, 0) for key in active] + [("request", k)]:
        inject(model, key, [layer for block in blocks[first:] for layer in block.linears], rank=2, alpha=1)
        generator = torch.Generator().manual_seed(first)
        with torch.no_grad():
            for _, b in pairs(model, key).values():
                b.copy_(torch.randn(b.shape, generator=generator) * 0.3)
    activate(model, [*active, "request"], trainable="request")
    return model, blocks


def learn(model, name, batch):
    """Give the outputs and the adapter's gradients of a step."""
    model.zero_grad()
    out = outputs(model, batch)
    out.square().sum().backward()
    return out.detach(), [matrix.grad.clone() for pair in pairs(model, "request").values() for matrix in pair]


def assert_same_step(one, other):
    assert torch.equal(one[0], other[0])
    assert len(one[1]) == len(other[1]) > 0 and all(grad.any() for grad in one[1])
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("name", UNIFORM)
def test_a_resumed_step_is_the_whole_step(name, k):
    model, blocks = forgetting(name, k)
    images = inputs(name, 6)
    cache = cache_prefix(model, blocks, k, images, model, batch_size=6)
    whole = learn(model, name, images)
    with resumed(model, blocks, k, cache):
        again = learn(model, name, images)
    assert_same_step(again, whole)
    assert_same_step(learn(model, name, images), whole)  # the network is as it was


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_batches_and_earlier_requests_change_nothing(name):
    model, blocks = forgetting(name, earlier=True)
    images = inputs(name, 7)
    cache = cache_prefix(model, blocks, 2, images, model, batch_size=3)
    cache.check(model, blocks)
    index = torch.tensor([5, 0, 6])
    whole = learn(model, name, images[index])
    with resumed(model, blocks, 2, cache.rows(index)):
        again = learn(model, name, images[index])
    for mine, theirs in zip([again[0], *again[1]], [whole[0], *whole[1]], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_earlier_blocks_are_not_run():
    model, blocks = forgetting("vit")
    cache = cache_prefix(model, blocks, 2, inputs("vit"), model)
    ran = []
    for block in blocks:
        layer = model.get_submodule(block.linears[0])
        layer.register_forward_hook(lambda *_, name=block.name: ran.append(name))
    with resumed(model, blocks, 2, cache):
        model(inputs("vit"))
    assert ran == [blocks[2].name]


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_one_image_is_enough_for_the_embedding(name):
    model, blocks = forgetting(name)
    images = inputs(name)
    cache = cache_prefix(model, blocks, 2, images, model)
    whole = learn(model, name, images)
    with resumed(model, blocks, 2, cache):
        assert_same_step(learn(model, name, images[:1]), whole)


def read(model, head):
    """Give a function of images that reads the last block's tokens as a head would."""

    def see(images):
        last = ffn_blocks(model)[-1].name
        kept = []
        handle = model.get_submodule(last).register_forward_hook(lambda *args: kept.append(args[-1]))
        model(images)
        handle.remove()
        return head(kept[0][0] if isinstance(kept[0], tuple) else kept[0])

    return see


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", ["vit", "clip", "dinov2"])
def test_a_head_that_reads_the_first_token_lets_the_others_be(name, k):
    model, blocks = forgetting(name, k)
    images = inputs(name)
    see = read(model, lambda tokens: tokens[:, 0])
    cache = cache_prefix(model, blocks, k, images, model)
    short = shortened(model, blocks, cache, see, images[:2])
    assert short.first_only and blocks[-1].linears[0].startswith(short.first_only)
    rows, grads = [], []
    layer = model.get_submodule(short.first_only)
    for used in (cache, short):
        with resumed(model, blocks, k, used), torch.enable_grad():
            handle = model.get_submodule(blocks[-1].linears[0]).register_forward_pre_hook(
                lambda _, args: rows.append(args[0].shape[1])
            )
            trained = [p for p in model.parameters() if p.requires_grad]
            grads.append(torch.autograd.grad(see(images).square().sum(), trained))
            handle.remove()
    assert rows[0] > rows[1] == 1 and "forward" not in vars(layer)
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_head_that_reads_all_tokens_gets_them():
    model, blocks = forgetting("vit")
    images = inputs("vit")
    cache = cache_prefix(model, blocks, 1, images, model)
    assert shortened(model, blocks, cache, read(model, lambda tokens: tokens.mean(1)), images[:2]) is cache


def test_half_precision_takes_half_the_memory_and_rounds():
    model, blocks = forgetting("vit")
    images = inputs("vit")
    exact = cache_prefix(model, blocks, 2, images, model)
    rounded = cache_prefix(model, blocks, 2, images, model, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert rounded.states.nbytes * 2 == exact.states.nbytes
    with resumed(model, blocks, 2, rounded):
        out = outputs(model, images)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, outputs(model, images), rtol=0.1, atol=0.1)


class Wrapped(nn.Module):
    """A stack of blocks that return tuples, with dropout in each."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "drop": nn.Dropout(0.5)})
            for _ in range(3)
        )
        for block in self.blocks:
            block.forward = self.run(block)

    @staticmethod
    def run(block):
        return lambda x: (x + block["drop"](block["mlp"](x)), "attention")

    def forward(self, x):
        for block in self.blocks:
            x = block(x)[0]
        return {"logits": x}


class Shortcut(Wrapped):
    """Something besides the tokens passes from one block to the next."""

    def forward(self, x):
        first = self.blocks[0](x)[0]
        second = self.blocks[1](first)[0]
        return {"logits": self.blocks[2](second + first)[0] + first}


def test_blocks_that_return_tuples_and_drop_out():
    torch.manual_seed(0)
    model = Wrapped().train()
    model.blocks[1].eval()
    own = [vars(block)["forward"] for block in model.blocks]
    blocks = ffn_blocks(model)
    model.requires_grad_(False)
    images = torch.randn(5, 3, 4)
    cache = cache_prefix(model, blocks, 2, images, lambda batch: model(batch)["logits"])
    assert cache.tuple_size == 2
    assert [block.training for block in model.blocks] == [True, False, True] and model.training
    with resumed(model, blocks, 2, cache):
        torch.manual_seed(1)
        one = model(images)["logits"]
    torch.manual_seed(1)
    assert torch.equal(one, model.blocks[2](cache.states)[0])  # dropout stays on after the prefix
    assert [vars(block)["forward"] for block in model.blocks] == own


def test_what_passes_beside_the_tokens_is_noticed_when_it_matters():
    """The last block's input is kept whole, so entering there is right; entering before the sum is not."""
    torch.manual_seed(0)
    model = Shortcut().eval().requires_grad_(False)
    blocks, images = ffn_blocks(model), torch.randn(4, 3, 4)
    cache_prefix(model, blocks, 2, images, model)
    with pytest.raises(ModelError, match="something else passes"):
        cache_prefix(model, blocks, 1, images, model)


@pytest.mark.parametrize("name", STAGED)
def test_stages_and_decoders_are_not_cacheable(name):
    model = network(name)
    blocks = ffn_blocks(model)
    assert not any(cacheable(model, blocks, k) for k in range(len(blocks)))
    with pytest.raises(ModelError, match="elements of one list"):
        cache_prefix(model, blocks, 1, inputs(name), model)
    cache = PrefixCache(torch.zeros(4, 1), 1, "", 0)
    with pytest.raises(ModelError, match="elements of one list"), resumed(model, blocks, 1, cache):
        pass


def test_where_a_network_can_be_entered():
    model = network("vit")
    blocks = ffn_blocks(model)
    assert [cacheable(model, blocks, k) for k in (-1, 0, 2, 3)] == [False, True, True, False]
    assert not cacheable(model, blocks[1:], 1) and not cacheable(model, [], 0)
    assert not cacheable(model, [Block("nowhere.0", ())], 0)


def test_a_stale_cache_is_refused():
    model, blocks = forgetting("vit", earlier=True)
    cache = cache_prefix(model, blocks, 2, inputs("vit"), model)
    cache.check(model, blocks)
    with torch.no_grad():
        for matrix in pairs(model, "request")[blocks[2].linears[0]]:
            matrix.add_(1.0)  # what trains does not matter
    inject(model, "idle", blocks[0].linears, rank=2, alpha=1)  # nor does an adapter that is not active
    cache.check(model, blocks)
    activate(model, ["earlier", "idle", "request"], trainable="request")
    with pytest.raises(ArtefactError, match="stale"):
        cache.check(model, blocks)
    activate(model, ["earlier", "request"], trainable="request")
    cache.check(model, blocks)
    drop(model, "earlier")
    with pytest.raises(ArtefactError, match="stale"):
        cache.check(model, blocks)


def test_the_key_hangs_on_the_weights_before_the_block():
    model = network("vit")
    blocks = ffn_blocks(model)
    key = prefix_key(model, blocks, 1, [])
    assert prefix_key(network("vit"), blocks, 1, []) == key != prefix_key(model, blocks, 2, [])
    with torch.no_grad():
        model.get_submodule(blocks[1].linears[0]).bias.add_(1.0)
    assert prefix_key(model, blocks, 1, []) == key
    with torch.no_grad():
        model.get_submodule(blocks[0].linears[0]).bias.add_(1.0)
    assert prefix_key(model, blocks, 1, []) != key


def test_what_trains_must_not_be_skipped():
    model, blocks = forgetting("vit", k=1)
    with pytest.raises(ModelError, match="trains but lies before"):
        cache_prefix(model, blocks, 2, inputs("vit"), model)


def test_a_cache_of_something_else_is_refused():
    model, blocks = forgetting("vit")
    images = inputs("vit")
    cache = cache_prefix(model, blocks, 2, images, model)
    with pytest.raises(ModelError, match="block 1"), resumed(model, blocks, 2, replace(cache, k=1)):
        pass
    with pytest.raises(ModelError, match="rows belong"), resumed(model, blocks, 2, cache.rows(torch.tensor([0, 1]))):
        model(images)
    assert torch.equal(outputs(model, images), outputs(model, images))
    with pytest.raises(ModelError, match="found none"):
        cache_prefix(model, blocks, 2, images[:0], model)


def test_blocks_must_be_called_with_their_tokens():
    torch.manual_seed(0)
    model = Wrapped().requires_grad_(False)
    for blocks, message in ((list(model.blocks[:2]), "found 2 calls"), (list(model.blocks), "tokens first")):
        model.forward = lambda x, blocks=blocks: [block(x=x) for block in blocks]
        with pytest.raises(ModelError, match=message):
            cache_prefix(model, ffn_blocks(model), 2, torch.randn(4, 3, 4), model)


def assert_resumes(model, images):
    blocks = ffn_blocks(model)
    inject(model, "request", blocks[-1].linears, rank=2, alpha=1)
    with torch.no_grad():
        for _, b in pairs(model, "request").values():
            b.fill_(0.1)
    activate(model, ["request"], trainable="request")
    k = len(blocks) - 1
    cache = cache_prefix(model, blocks, k, images, model)

    def step():
        model.zero_grad()
        out = model(images)
        out.square().sum().backward()
        return out.detach(), [matrix.grad.clone() for pair in pairs(model, "request").values() for matrix in pair]

    whole = step()
    with resumed(model, blocks, k, cache):
        assert_same_step(step(), whole)


def test_the_face_transformer_is_resumed():
    face = pytest.importorskip("postgrad.forgetting.face")
    torch.manual_seed(0)
    config = face.FaceTransformerConfig(
        image_size=16, patch_size=4, width=16, depth=3, heads=2, head_dim=8, ff_width=24, dropout=0.0
    )
    assert_resumes(face.FaceTransformer(config, face.CosFaceHead(16, 5)), torch.randn(4, 3, 16, 16))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "eva02_tiny_patch14_224"])
def test_timms_networks_are_resumed(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=28 if "14" in name else 32, depth=3, embed_dim=24, num_heads=2)
    assert_resumes(model.eval(), torch.randn(4, 3, 28 if "14" in name else 32, 28 if "14" in name else 32))
