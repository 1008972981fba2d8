"""Llamas with drawn weights, made layer by layer: one that fits as codes never stands in float32 as a whole."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from postgrad.fp8.numerics import F16
from postgrad.fp8.scaled import ScaledTensor, scale_parameter_

DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, and the batch it is trained with: the same for all systems."""

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    narrow_heads: int
    vocabulary: int
    rows: int
    """Sequences a step."""
    length: int
    """Tokens a sequence."""
    recompute: bool
    """Whether activations of a layer are made anew in the backward pass."""


SHAPES = {
    "tiny": Shape("tiny", 64, 128, 2, 2, 2, 256, rows=2, length=16, recompute=True),
    "small": Shape("small", 256, 704, 4, 4, 4, 2048, rows=4, length=128, recompute=False),
    "1b": Shape("1b", 2048, 8192, 16, 32, 8, 32000, rows=4, length=2048, recompute=False),
    "7b": Shape("7b", 4096, 11008, 32, 32, 32, 32000, rows=4, length=2048, recompute=True),
    "13b": Shape("13b", 5120, 13824, 40, 40, 40, 32000, rows=1, length=2048, recompute=True),
}


def config_of(shape: Shape) -> LlamaConfig:
    """Return what transformers wants to know."""
    return LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.narrow_heads,
        tie_word_embeddings=False, max_position_embeddings=shape.length, use_cache=False,
    )  # fmt: skip


def build(shape: Shape, device: torch.device, finish: Callable[[nn.Module], object]) -> LlamaForCausalLM:
    """Draw a Llama's weights, the same for every system, and finish each layer before the next is made.

    Args: finish: of a layer in float32, and in the end of all that is in no layer: to codes, to BF16, or nothing.
    """
    config = config_of(shape)
    config.num_hidden_layers = 0
    with torch.device(device):
        model = LlamaForCausalLM(config)
    config.num_hidden_layers = shape.layers
    generator = torch.Generator(device).manual_seed(0)
    _draw(model, generator)
    for number in range(shape.layers):
        with torch.device(device):
            layer = LlamaDecoderLayer(config, number)
        _draw(layer, generator)
        finish(layer)
        model.model.layers.append(layer)
    finish(model)
    model.config.num_hidden_layers = shape.layers
    if shape.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _draw(module: nn.Module, generator: torch.Generator) -> None:
    """Draw the matrices."""
    with torch.no_grad():
        for param in module.parameters():
            if param.ndim >= 2:
                param.normal_(0, DEVIATION, generator=generator)


def keep(module: nn.Module) -> None:
    """Leave the weights in float32."""


def to_bf16(module: nn.Module) -> None:
    """Turn all weights into BF16; frequencies of positions stay float32, as they do in a loaded model."""
    for param in module.parameters():
        param.data = param.data.to(torch.bfloat16)


def to_codes(module: nn.Module) -> None:
    """Turn the weights of a layer's linear layers into scaled FP16 codes; embeddings and output stay float32."""
    if isinstance(module, LlamaDecoderLayer):
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                scale_parameter_(linear.weight, F16)


def count(model: nn.Module) -> int:
    """Count the parameters."""
    return sum(param.numel() for param in model.parameters())


def coded_share(params: list[Parameter]) -> float:
    """Return the share of parameters that are kept as codes."""
    coded = sum(param.numel() for param in params if isinstance(param, ScaledTensor))
    return coded / sum(param.numel() for param in params)


def tokens(shape: Shape, rows: int, device: torch.device) -> Tensor:
    """Draw a batch, the same for every system."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.vocabulary, (rows, shape.length), generator=generator).to(device)
