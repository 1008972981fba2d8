"""Where forgetting may act, in every architecture it says it knows; and how many numbers that is."""

import json

import pytest
import torch
import transformers as hf
from networks import describe, network
from torch import nn

from postgrad.core.layer_adapters import adapter_names, inject, pairs, prune
from postgrad.errors import ConfigError, ModelError
from postgrad.forgetting.blocks import Block, ffn_blocks, first_adapted

PLACES = {
    "vit": ("vit.layers.{}", "mlp.fc1 mlp.fc2"),
    "deit": ("deit.layers.{}", "mlp.fc1 mlp.fc2"),
    "beit": ("beit.layers.{}", "mlp.fc1 mlp.fc2"),
    "dinov2": ("dinov2.encoder.layer.{}", "mlp.fc1 mlp.fc2"),
    "dinov2_gated": ("encoder.layer.{}", "mlp.weights_in mlp.weights_out"),
    "dinov3": ("model.layer.{}", "mlp.up_proj mlp.down_proj"),
    "dinov3_gated": ("model.layer.{}", "mlp.gate_proj mlp.up_proj mlp.down_proj"),
    "clip": ("encoder.layers.{}", "mlp.fc1 mlp.fc2"),
    "clip_classifier": ("vision_model.encoder.layers.{}", "mlp.fc1 mlp.fc2"),
    "siglip": ("encoder.layers.{}", "mlp.fc1 mlp.fc2"),
    "bert": ("encoder.layer.{}", "intermediate.dense output.dense"),
    "llama": ("model.layers.{}", "mlp.gate_proj mlp.up_proj mlp.down_proj"),
    "qwen2": ("model.layers.{}", "mlp.gate_proj mlp.up_proj mlp.down_proj"),
    "qwen3": ("model.layers.{}", "mlp.gate_proj mlp.up_proj mlp.down_proj"),
    "mistral": ("model.layers.{}", "mlp.gate_proj mlp.up_proj mlp.down_proj"),
    "gpt2": ("transformer.h.{}", "mlp.c_fc mlp.c_proj"),
}
ATTENTION = {
    "vit": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
    "dinov2": ["attention.attention.query", "attention.attention.key", "attention.attention.value"],
    "gpt2": ["attn.c_attn"],
}


def empty(name):
    with torch.device("meta"):
        kind, config = describe(name)
        return kind(config)


def block(name, layers):
    return Block(name, tuple(f"{name}.{layer}" for layer in layers))


def trained(model, rank=8):
    """Count what an adapter on every block has to learn."""
    blocks = ffn_blocks(model)
    inject(model, "request", [layer for one in blocks for layer in one.linears], rank=rank, alpha=1)
    return blocks, sum(matrix.numel() for pair in pairs(model, "request").values() for matrix in pair)


@pytest.mark.parametrize("name", PLACES)
def test_the_feed_forward_layers_of_every_block_are_found(name):
    place, layers = PLACES[name]
    assert ffn_blocks(empty(name)) == [block(place.format(k), layers.split()) for k in range(3)]


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_windowed_stages_are_walked_in_order(name):
    layers = ["mlp.fc1", "mlp.fc2"] if name == "swin" else ["intermediate.dense", "output.dense"]
    expected = [block(f"{name}.encoder.layers.{s}.blocks.{k}", layers) for s in range(2) for k in range(2)]
    assert ffn_blocks(empty(name)) == expected


@pytest.mark.parametrize("name", ["detr", "deformable_detr"])
def test_detectors_have_encoder_blocks_then_decoder_blocks(name):
    expected = [
        block(f"model.{part}.layers.{k}", ["mlp.fc1", "mlp.fc2"]) for part in ("encoder", "decoder") for k in range(2)
    ]
    assert ffn_blocks(network(name)) == expected


@pytest.mark.parametrize("name", ATTENTION)
def test_the_attention_placement_takes_queries_keys_and_values(name):
    place = PLACES[name][0]
    found = ffn_blocks(empty(name), placement="attention")
    assert [sorted(one.linears) for one in found] == [
        sorted(block(place.format(k), ATTENTION[name]).linears) for k in range(3)
    ]


def test_the_layers_of_torchvision_are_found_by_structure():
    """torchvision's ViT: Sequential of encoder_layer_k, each with an MLP that is a Sequential itself."""
    layer = nn.TransformerEncoderLayer(8, 2, 16)  # stands in for its attention
    blocks = {
        f"encoder_layer_{k}": nn.ModuleDict(
            {"self_attention": layer.self_attn, "mlp": nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))}
        )
        for k in range(2)
    }
    model = nn.ModuleDict({"layers": nn.Sequential(), "head": nn.Linear(8, 3)})
    for key, value in blocks.items():
        model["layers"].add_module(key, value)
    assert ffn_blocks(model) == [block(f"layers.encoder_layer_{k}", ["mlp.0", "mlp.2"]) for k in range(2)]


def test_torchs_own_encoder_layers_have_no_feed_forward_module():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    assert ffn_blocks(model) == [block(f"layers.{k}", ["linear1", "linear2"]) for k in range(2)]


@pytest.mark.parametrize(
    ("name", "place", "layers"),
    [
        ("vit_tiny_patch16_224", "blocks.{}", ["mlp.fc1", "mlp.fc2"]),
        ("deit3_small_patch16_224", "blocks.{}", ["mlp.fc1", "mlp.fc2"]),
        ("eva02_base_patch14_224", "blocks.{}", ["mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"]),
        ("swin_tiny_patch4_window7_224", "layers.3.blocks.{}", ["mlp.fc1", "mlp.fc2"]),
    ],
)
def test_timm_has_its_own_names(name, place, layers):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    with torch.device("meta"):
        found = ffn_blocks(timm.create_model(name))
    last = 1 if "swin" in name else 11
    assert len(found) == 12 and found[-1] == block(place.format(last), layers)


def test_adapters_that_are_there_change_nothing():
    model = network("vit")
    before = ffn_blocks(model)
    inject(model, "first", before[1].linears, rank=2, alpha=1)
    assert ffn_blocks(model) == before


def test_a_pattern_replaces_the_search():
    model = empty("vit")
    grouped = ffn_blocks(model, r"(vit\.layers\.[02])\.mlp\.fc2")
    assert grouped == [block(f"vit.layers.{k}", ["mlp.fc2"]) for k in (0, 2)]
    assert ffn_blocks(model, r".*\.mlp\.fc.") == ffn_blocks(model)
    assert ffn_blocks(model, "classifier") == [Block("classifier", ("classifier",))]


def test_what_cannot_be_found_is_explained():
    with pytest.raises(ModelError, match=r"vit\.layers\.N\.mlp\.fcN, classifier"):
        ffn_blocks(empty("vit"), r"output\.dense")
    with pytest.raises(ModelError, match="fcN"):
        ffn_blocks(nn.ModuleDict({"fc1": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)}))
    with pytest.raises(ModelError, match="It has none"):
        ffn_blocks(nn.Conv2d(1, 1, 1))
    with pytest.raises(ConfigError, match="regular expression"):
        ffn_blocks(empty("vit"), "(")


def test_the_first_adapted_block_moves_as_layers_are_pruned():
    model = network("vit")
    blocks = ffn_blocks(model)
    inject(model, "request", [layer for one in blocks for layer in one.linears], rank=2, alpha=1)
    assert first_adapted(model, blocks, "request") == 0
    prune(model, "request", [*blocks[0].linears, blocks[1].linears[0]])
    assert first_adapted(model, blocks, "request") == 1
    prune(model, "request", [blocks[1].linears[1], *blocks[2].linears])
    assert first_adapted(model, blocks, "request") == 3 and adapter_names(model) == ("request",)


def test_vit_base_trains_less_than_one_percent():
    """Published: 737,280 of 85,875,556 for ViT-B/16 with 100 classes. By hand: 12 x 2 x 8 x (768 + 3072) = 737,280."""
    with torch.device("meta"):
        model = hf.ViTForImageClassification(hf.ViTConfig(num_labels=100))
    total = sum(parameter.numel() for parameter in model.parameters())
    blocks, lora = trained(model)
    assert (total, len(blocks), lora) == (85_875_556, 12, 737_280)
    assert round(100 * lora / total, 4) == 0.8585


def test_deformable_detr_trains_as_much_as_published(shared):
    """Published: 245,760 of 39,847,265, without the backbone's stem and first stage, which are never trained.

    By hand: 12 blocks x 2 x 8 x (256 + 1024) = 245,760.
    """
    published = json.loads((shared / "oracles" / "forget_schedule.json").read_text())["deformable_detr"]
    resnet50 = hf.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = hf.DeformableDetrConfig(num_labels=91, use_timm_backbone=False, backbone_config=resnet50)
    with torch.device("meta"):
        model = hf.DeformableDetrForObjectDetection(config)
    never = ("backbone.model.embedder.", "backbone.model.encoder.stages.0.")
    total = sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in never))
    blocks, lora = trained(model)
    assert (total, len(blocks), lora) == (published["base_params"], 12, 245_760)
    assert 100 * lora / total == pytest.approx(published["ratio_percent"], rel=1e-9)


def test_the_face_transformer_trains_as_much_as_published():
    """Published: 245,760 of 19,157,504. By hand: 6 blocks x 2 x 8 x (512 + 2048) = 245,760."""
    face = pytest.importorskip("postgrad.forgetting.face")
    with torch.device("meta"):
        model = face.FaceTransformer(face.FaceTransformerConfig(), face.CosFaceHead(512, 100))
    total = sum(parameter.numel() for parameter in model.parameters())
    blocks, lora = trained(model)
    assert (total, len(blocks), lora) == (19_157_504, 6, 245_760)
    assert round(100 * lora / total, 4) == 1.2828
    assert blocks[0] == block("blocks.0", ["mlp.fc1", "mlp.fc2"])
    assert ffn_blocks(model, placement="attention")[5] == block("blocks.5", ["attention.qkv"])
