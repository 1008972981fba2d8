"""Tiny networks of the common architectures, drawn from a seed: what forgetting must find its way around in."""

import torch
import transformers as hf
from torch import Tensor, nn

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
LANGUAGE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 2,
}
DETECTOR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_queries": 6,
    "num_labels": 4,
    "dropout": 0.0,
}
GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def backbone(stages: list[str]) -> hf.ResNetConfig:
    """Describe a ResNet of a few channels, the detectors' backbone."""
    return hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=stages)


def describe(name: str) -> tuple[type, hf.PretrainedConfig]:
    """Give the class and the config of an architecture."""
    match name:
        case "detr":
            return hf.DetrForObjectDetection, hf.DetrConfig(
                use_timm_backbone=False, backbone_config=backbone(["stage4"]), **DETECTOR
            )
        case "deformable_detr":
            stages = backbone(["stage2", "stage3", "stage4"])
            return hf.DeformableDetrForObjectDetection, hf.DeformableDetrConfig(
                use_timm_backbone=False, backbone_config=stages, num_feature_levels=3, auxiliary_loss=False, **DETECTOR
            )
        case "clip_classifier":
            return hf.CLIPForImageClassification, hf.CLIPConfig(vision_config=VISION, text_config=TEXT)
    return {
        "vit": (hf.ViTForImageClassification, hf.ViTConfig(num_labels=5, **VISION)),
        "deit": (hf.DeiTForImageClassification, hf.DeiTConfig(num_labels=5, **VISION)),
        "beit": (hf.BeitForImageClassification, hf.BeitConfig(num_labels=5, **VISION)),
        "dinov2": (hf.Dinov2ForImageClassification, hf.Dinov2Config(num_labels=5, **VISION)),
        "dinov2_gated": (hf.Dinov2Model, hf.Dinov2Config(use_swiglu_ffn=True, **VISION)),
        "dinov3": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**VISION)),
        "dinov3_gated": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig(use_gated_mlp=True, **VISION)),
        "swin": (hf.SwinForImageClassification, hf.SwinConfig(num_labels=5, **WINDOWS)),
        "swinv2": (hf.Swinv2ForImageClassification, hf.Swinv2Config(num_labels=5, **WINDOWS)),
        "clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig(**VISION)),
        "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig(**VISION)),
        "bert": (hf.BertModel, hf.BertConfig(**LANGUAGE)),
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**LANGUAGE)),
        "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**LANGUAGE)),
        "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(head_dim=8, **LANGUAGE)),
        "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**LANGUAGE)),
        "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2)),
    }[name]


def network(name: str, seed: int = 0) -> nn.Module:
    """Draw a network, in eval mode; its weights are large enough for every layer to matter."""
    kind, config = describe(name)
    torch.manual_seed(seed)
    drawn = kind(config).eval()
    with torch.no_grad():
        for parameter in drawn.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return drawn


def inputs(name: str, size: int = 4, seed: int = 1) -> Tensor:
    """Draw a batch the network takes: token ids or pixel values."""
    generator = torch.Generator().manual_seed(seed)
    if name in ("llama", "qwen2", "qwen3", "mistral", "gpt2", "bert"):
        return torch.randint(3, 40, (size, 7), generator=generator)
    side = {"swin": 16, "swinv2": 16, "detr": 64, "deformable_detr": 64}.get(name, 8)
    return torch.randn(size, 3, side, side, generator=generator)


def outputs(drawn: nn.Module, batch: Tensor) -> Tensor:
    """Run a network and give its logits, or its last hidden states."""
    result = drawn(batch)
    return result.logits if "logits" in result else result.last_hidden_state
