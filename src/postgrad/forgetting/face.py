"""The Face Transformer, a plain vision transformer, and heads with an angular margin.

Source: the network that GS-LoRA (arXiv 2403.11530) forgets identities in; Zhong and Deng 2021 (arXiv 2103.14803);
        CosFace (arXiv 1801.09414), ArcFace (arXiv 1801.07698).
Differs: submodules have readable names; `from_official` translates the released ones. Attention scores are divided by
         the root of the model's width, as the released code does; `attention_scale="head"` takes a head's, as is usual.
         Margins are off when evaluating, because the paper's accuracies carry them and so are lower than what a user of
         the model sees; `margin_at_eval=True` is the paper's.

Letters: B batch, C channels, H height, W width, P patches, T tokens (P + 1), D width, K classes.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from postgrad.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class FaceTransformerConfig:
    """Size of the network; the default is the paper's P8S8 with 6 blocks."""

    image_size: int = 112
    """Height and width of the images, in pixels."""
    patch_size: int = 8
    """Height and width of a patch, in pixels."""
    channels: int = 3
    """Channels of the images."""
    width: int = 512
    """Width of a token."""
    depth: int = 6
    """Blocks."""
    heads: int = 8
    """Attention heads of a block."""
    head_dim: int = 64
    """Width of an attention head."""
    ff_width: int = 2048
    """Width between the two linear layers of a block."""
    dropout: float = 0.1
    """Share of values dropped in training: of the embedding, and after attention and both linear layers."""
    attention_scale: Literal["model", "head"] = "model"
    """Divide attention scores by the root of the model's width, or of a head's."""


class CosFaceHead(nn.Module):
    """Cosines to class directions, the true class's lowered by a margin, times a scale."""

    def __init__(
        self, width: int, num_classes: int, *, scale: float = 64.0, margin: float = 0.35, margin_at_eval: bool = False
    ) -> None:
        """Draw the class directions."""
        super().__init__()
        self.scale, self.margin, self.margin_at_eval = scale, margin, margin_at_eval
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_classes, width)))

    def forward(self, features: Float[Tensor, "B D"], labels: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B K"]:
        """Return s * (cos - m * [true class]); m counts where labels are given, in training or if `margin_at_eval`."""
        cosine = _cosine(features, self.weight)
        if labels is None or not (self.training or self.margin_at_eval):
            return self.scale * cosine
        true = F.one_hot(labels, cosine.shape[1]).to(cosine.dtype)
        return self.scale * (cosine - self.margin * true)


class ArcFaceHead(nn.Module):
    """Cosines to class directions, the true class's angle widened by a margin, times a scale."""

    def __init__(
        self, width: int, num_classes: int, *, scale: float = 64.0, margin: float = 0.5, margin_at_eval: bool = False
    ) -> None:
        """Draw the class directions."""
        super().__init__()
        self.scale, self.margin, self.margin_at_eval = scale, margin, margin_at_eval
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_classes, width)))

    def forward(self, features: Float[Tensor, "B D"], labels: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B K"]:
        """Return s * cos(angle + m [true class]); m counts where labels are given, in training or if `margin_at_eval`.

        Past angle + m = pi, where the cosine would rise again, it goes on as cos(angle) - m sin(m).
        """
        cosine = _cosine(features, self.weight)
        if labels is None or not (self.training or self.margin_at_eval):
            return self.scale * cosine
        # At an angle of 0 the root's slope is infinite; below the smallest number it is cut off.
        sine = (1 - cosine.square()).clamp(min=torch.finfo(cosine.dtype).tiny).sqrt()
        widened = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        beyond = cosine - self.margin * math.sin(self.margin)
        widened = torch.where(cosine > math.cos(math.pi - self.margin), widened, beyond)
        true = F.one_hot(labels, cosine.shape[1]).bool()
        return self.scale * torch.where(true, widened, cosine)


class Attention(nn.Module):
    """Multi-head attention; one linear layer without bias makes queries, keys and values."""

    def __init__(self, config: FaceTransformerConfig) -> None:
        """Build the two linear layers."""
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_dim
        self.scale = (config.width if config.attention_scale == "model" else config.head_dim) ** -0.5
        self.qkv = nn.Linear(config.width, 3 * inner, bias=False)
        self.output = nn.Linear(inner, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Mix the tokens."""
        split = self.qkv(tokens).unflatten(2, (3, self.heads, -1))  # [B, T, 3, heads, head_dim]
        queries, keys, values = split.permute(2, 0, 3, 1, 4)  # each [B, heads, T, head_dim]
        mixed = F.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
        out: Tensor = self.dropout(self.output(mixed.transpose(1, 2).flatten(2)))
        return out


class MLP(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, config: FaceTransformerConfig) -> None:
        """Build the two linear layers."""
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.ff_width)
        self.fc2 = nn.Linear(config.ff_width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Change each token by itself."""
        out: Tensor = self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(tokens)))))
        return out


class Block(nn.Module):
    """Attention, then the two linear layers, each normalised before and added after."""

    def __init__(self, config: FaceTransformerConfig) -> None:
        """Build the parts."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Run the block."""
        tokens = tokens + self.attention(self.attention_norm(tokens))
        out: Tensor = tokens + self.mlp(self.mlp_norm(tokens))
        return out


class FaceTransformer(nn.Module):
    """Patches and a class token through pre-norm blocks; the class token, normalised, is what the head reads."""

    def __init__(self, config: FaceTransformerConfig, head: nn.Module) -> None:
        """Build the network around a head, which is called as head(features, labels).

        Raises: ModelError: the image does not divide into patches.
        """
        super().__init__()
        if config.image_size % config.patch_size:
            raise ModelError(
                f"image_size must be a multiple of patch_size, found {config.image_size} and {config.patch_size}; "
                "change one of them"
            )
        self.patch_size = config.patch_size
        num_tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.patch_embedding = nn.Linear(config.channels * config.patch_size**2, config.width)
        self.class_token = nn.Parameter(torch.randn(1, 1, config.width))
        self.position_embedding = nn.Parameter(torch.randn(1, num_tokens, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = head

    def features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """Return the embedding of images."""
        tokens = self.patch_embedding(patchify(images, self.patch_size))  # [B, P, D]
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), tokens], dim=1)  # [B, T, D]
        tokens = self.dropout(tokens + self.position_embedding)
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.norm(tokens[:, 0])  # [B, D]
        return out

    def forward(
        self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B K"]:
        """Return the logits of images; labels are for the head's margin."""
        logits: Tensor = self.head(self.features(images), labels)
        return logits


def patchify(images: Float[Tensor, "B C H W"], size: int) -> Float[Tensor, "B P patch"]:
    """Cut images into square patches row by row; within a patch rows, columns, then channels."""
    num, channels, height, width = images.shape
    cut = images.reshape(num, channels, height // size, size, width // size, size)  # rows by size, columns by size
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


_OFFICIAL = (
    (r"pos_embedding", r"position_embedding"),
    (r"cls_token", r"class_token"),
    (r"patch_to_embedding\.(\w+)", r"patch_embedding.\1"),
    (r"transformer\.layers\.(\d+)\.0\.fn\.norm\.(\w+)", r"blocks.\1.attention_norm.\2"),
    (r"transformer\.layers\.(\d+)\.0\.fn\.fn\.to_qkv\.(\w+)", r"blocks.\1.attention.qkv.\2"),
    (r"transformer\.layers\.(\d+)\.0\.fn\.fn\.to_out\.0\.(\w+)", r"blocks.\1.attention.output.\2"),
    (r"transformer\.layers\.(\d+)\.1\.fn\.norm\.(\w+)", r"blocks.\1.mlp_norm.\2"),
    (r"transformer\.layers\.(\d+)\.1\.fn\.fn\.net\.0\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"transformer\.layers\.(\d+)\.1\.fn\.fn\.net\.3\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"mlp_head\.0\.(\w+)", r"norm.\1"),
    (r"loss\.(\w+)", r"head.\1"),
)


def from_official(name: str) -> str:
    """Translate a tensor's name in the released checkpoints into its name here.

    Raises: ModelError: no tensor of the released network is called so.
    """
    for theirs, ours in _OFFICIAL:
        if match := re.fullmatch(theirs, name):
            return match.expand(ours)
    raise ModelError(
        f"expected a tensor of the released Face Transformer, such as pos_embedding, found {name!r}; "
        "leave out what is not part of the network"
    )


def _cosine(features: Float[Tensor, "B D"], weight: Float[Tensor, "K D"]) -> Float[Tensor, "B K"]:
    """Cosine of each feature vector to each class direction."""
    return F.linear(F.normalize(features), F.normalize(weight))
