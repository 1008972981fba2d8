"""The Face Transformer's size and shape, and both margin heads: hand values and the reference numbers."""

import json
import math

import pytest
import torch

from postgrad.errors import ModelError
from postgrad.forgetting.face import (
    ArcFaceHead,
    CosFaceHead,
    FaceTransformer,
    FaceTransformerConfig,
    from_official,
    patchify,
)

TINY = FaceTransformerConfig(image_size=8, patch_size=4, width=12, depth=2, heads=2, head_dim=4, ff_width=20)


@pytest.fixture(scope="module")
def case(shared):
    return json.loads((shared / "oracles/forget_metrics.json").read_text())


def filled(head, weight):
    head.weight.data.copy_(torch.tensor(weight))
    return head.eval()


@pytest.mark.parametrize(
    ("kind", "make", "key"),
    [("cosface", CosFaceHead, "logits_with_label_margin"), ("arcface", ArcFaceHead, "logits")],
)
def test_heads_equal_the_reference(case, kind, make, key):
    weight, embed = case["cosface"]["weight"], torch.tensor(case["cosface"]["embed"])
    labels = torch.tensor(case["cosface"]["labels"])
    want = torch.tensor(case[kind][key])
    head = filled(make(8, 5, margin_at_eval=True), weight)
    assert (head.scale, head.margin) == (case[kind]["s"], case[kind]["m"])
    torch.testing.assert_close(head(embed, labels).detach(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.train()(embed, labels).detach(), want, rtol=1e-5, atol=1e-5)
    plain = filled(make(8, 5), weight)
    cosine = torch.tensor(case["cosface"]["cosine"])
    for logits in (plain(embed), plain(embed, labels), head(embed)):
        torch.testing.assert_close(logits.detach() / 64, cosine, rtol=1e-5, atol=1e-6)


def test_the_margin_moves_loss_and_verdict_as_the_reference(case):
    want = case["cosface"]
    head = filled(CosFaceHead(8, 5, margin_at_eval=True), want["weight"])
    embed, labels = torch.tensor(want["embed"]), torch.tensor(want["labels"])
    assert torch.nn.functional.cross_entropy(head(embed, labels), labels).item() == pytest.approx(want["ce_mean"])
    assert head(embed, labels).argmax(1).tolist() == want["pred_margin"]
    assert head(embed).argmax(1).tolist() == want["pred_no_margin"]


@pytest.mark.parametrize("margin_at_eval", [True, False])
def test_the_margin_flips_a_right_answer_only_when_asked(case, margin_at_eval):
    want = case["margin_flip"]
    head = filled(CosFaceHead(3, 3, margin_at_eval=margin_at_eval), torch.eye(3).tolist())
    label = torch.tensor([want["label"]])
    logits = head(torch.tensor(want["embed"]), label)
    if margin_at_eval:
        torch.testing.assert_close(logits.detach(), torch.tensor(want["logits_with_margin"]), rtol=1e-5, atol=1e-5)
    right = want["correct_with_margin"] if margin_at_eval else want["correct_without_margin"]
    assert (logits.argmax(1) == label).item() == right


def test_arcface_past_a_half_turn_keeps_falling():
    """At angle pi, cos -1: not cos(pi + 0.5) = -0.878, which lies higher, but -1 - 0.5 sin 0.5."""
    head = filled(ArcFaceHead(2, 1), [[1.0, 0.0]]).train()
    got = head(torch.tensor([[-1.0, 0.0]]), torch.tensor([0])) / 64
    assert got.item() == pytest.approx(-1 - 0.5 * math.sin(0.5))


@pytest.mark.parametrize("make", [CosFaceHead, ArcFaceHead])
@pytest.mark.parametrize("angle", [0.0, math.pi])
def test_gradients_are_finite_along_a_direction(make, angle):
    head = filled(make(2, 1), [[1.0, 0.0]]).train()
    features = torch.tensor([[math.cos(angle), 0.0]], requires_grad=True)
    head(features, torch.tensor([0])).sum().backward()
    assert features.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_sizes_equal_the_reference(shared):
    want = json.loads((shared / "oracles/forget_schedule.json").read_text())["face_transformer"]
    with torch.device("meta"):
        network = FaceTransformer(FaceTransformerConfig(), CosFaceHead(512, 100))
    count = sum(param.numel() for param in network.parameters())
    head = network.head.weight.numel()
    lora = [8 * (part.in_features + part.out_features) for b in network.blocks for part in (b.mlp.fc1, b.mlp.fc2)]
    assert (count, head) == (want["base_params"], want["head_params"]) == (19_157_504, 51_200)
    assert network.position_embedding.shape[1] == want["tokens"]
    assert sum(lora[:2]) == want["lora_per_block"] and sum(lora) == want["lora_params"]
    assert 100 * sum(lora) / count == pytest.approx(want["ratio_percent"], rel=1e-9)
    assert 100 * (count - head) / count == pytest.approx(want["ratio_of_all_but_head_percent"], rel=1e-9)


def test_the_vit_of_the_published_runs_has_the_reference_size(shared):
    from transformers import ViTConfig, ViTForImageClassification

    want = json.loads((shared / "oracles/forget_schedule.json").read_text())["vit_b16_imagenet100"]
    with torch.device("meta"):
        network = ViTForImageClassification(ViTConfig(num_labels=100))
    count = sum(param.numel() for param in network.parameters())
    lora = 12 * 2 * 8 * (768 + 3072)
    assert (count, lora) == (want["base_params"], want["lora_params"])
    assert 100 * lora / count == pytest.approx(want["ratio_percent"], rel=1e-9)


def test_patches_run_by_row_and_hold_rows_columns_channels():
    """Of a 4x4 image with pixel value 10 row + column + 100 channel, the second 2x2 patch starts at row 0, column 2."""
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    image = torch.stack([10 * row + column, 100 + 10 * row + column])[None]
    cut = patchify(image, 2)
    assert cut.shape == (1, 4, 8)
    assert cut[0, 1].tolist() == [2, 102, 3, 103, 12, 112, 13, 113]
    assert cut[0, 2, 0] == 20


def test_forward_is_the_head_on_the_features():
    network = FaceTransformer(TINY, CosFaceHead(12, 3)).eval()
    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 2])
    read = []
    network.head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    logits = network(images, labels)
    features = network.features(images)
    torch.testing.assert_close(read[0], features)
    torch.testing.assert_close(logits, network.head(features))
    assert features.shape == (2, 12) and logits.shape == (2, 3)


def test_dropout_acts_in_training_only():
    network = FaceTransformer(TINY, CosFaceHead(12, 3))
    images = torch.rand(2, 3, 8, 8)
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))


def test_attention_can_scale_by_the_head():
    """With width 16 and heads of 4 the usual scores are twice the released code's."""
    shape = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "head_dim": 4, "ff_width": 8}
    heads = [
        FaceTransformer(FaceTransformerConfig(**shape, attention_scale=scale), CosFaceHead(16, 2)).eval()
        for scale in ("model", "head")
    ]
    assert [network.blocks[0].attention.scale for network in heads] == [0.25, 0.5]
    heads[1].load_state_dict(heads[0].state_dict())
    heads[0].blocks[0].attention.qkv.weight.data[:8] *= 2  # queries
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(heads[0](images), heads[1](images))


def test_an_image_must_divide_into_patches():
    with pytest.raises(ModelError, match="multiple of patch_size, found 10 and 4"):
        FaceTransformer(FaceTransformerConfig(image_size=10, patch_size=4), CosFaceHead(512, 2))


def test_released_names_cover_the_network(shared):
    trajectory = json.loads((shared / "oracles/forget_trajectory_single.json").read_text())
    network = FaceTransformer(
        FaceTransformerConfig(image_size=20, patch_size=4, width=16, depth=2, heads=2, head_dim=8, ff_width=32),
        CosFaceHead(16, 6),
    )
    released = {p["name"]: p["shape"] for p in trajectory["params"] if "lora" not in p["name"]}
    ours = {from_official(name): shape for name, shape in released.items()}
    assert ours == {name: list(param.shape) for name, param in network.named_parameters()}
    with pytest.raises(ModelError, match="found 'conv1'"):
        from_official("conv1")
