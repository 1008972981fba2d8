"""Tree attention that never looks at what a token may not see; registered with transformers as "postgrad_tree".

A dense mask costs the square of the row's width. On a CPU a row of many trees is attended segment by segment, one
call a prompt and one an answer: it costs the sum of their own squares, and the causal kernel skips half of that. On a
GPU, FlexAttention skips the blocks that a block mask (core/masks.py) leaves out. Called with neither (generation,
padded rows) it is transformers' own SDPA attention.

Letters: H heads, K key-value heads, T tokens of the row, S keys (T and those of a cache), P prompt tokens,
A answer tokens, E width of a head.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from postgrad.core.ops import matmul_dtype

NAME = "postgrad_tree"

Segment = tuple[int, tuple[int, ...]]
"""Length of a tree's prompt and of each of its answers; trees follow one another from the start of the row."""


def tree_attention(
    module: nn.Module,
    query: Float[Tensor, "R H T E"],
    key: Float[Tensor, "R K S E"],
    value: Float[Tensor, "R K S E"],
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within ``segments``, or the blocks of ``block_masks(window)``; [R, T, H, E] as transformers expects.

    Dropout, which FlexAttention has not, is left to the segments.
    """
    segments, block_masks = options.get("segments"), options.get("block_masks")
    window = options.get("sliding_window") or 0
    if block_masks is not None and not (dropout and segments):
        assert dropout == 0, "attention dropout needs all trees in one row: set data.row_length to 0"
        return _block_attention(query, key, value, block_masks(window), scaling, options.get("softcap")), None
    if segments is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=options.get("is_causal"),
            position_bias=options.get("position_bias"),
        )
        return plain
    assert query.shape[0] == 1, "segments describe one row"
    sizes = [size for num_prompt, answers in segments for size in (num_prompt, *answers)]
    sizes.append(query.shape[2] - sum(sizes))  # padding
    queries, keys, values = (torch.split(part, sizes, dim=2) for part in (query, key, value))
    pieces: list[Tensor] = []
    for _, answers in segments:
        at = len(pieces)
        pieces.append(_attend(queries[at], [keys[at]], [values[at]], window, scaling, dropout))
        for i in range(at + 1, at + 1 + len(answers)):
            seen = ([keys[at], keys[i]], [values[at], values[i]])
            pieces.append(_attend(queries[i], *seen, window, scaling, dropout))
    pieces.append(torch.zeros_like(queries[-1]))  # padding looks nowhere
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _block_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None, cap: float | None
) -> Tensor:
    """Attend in the blocks of a mask, in autocast's dtype; [R, T, H, E]."""
    dtype = matmul_dtype(value)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    capped = lambda score, *_: score if cap is None else cap * torch.tanh(score / cap)  # noqa: E731
    grouped = query.shape[1] != key.shape[1]
    attended: Tensor = _compiled_flex()(
        query, key, value, score_mod=capped if cap else None, block_mask=mask, scale=scaling, enable_gqa=grouped
    )
    return attended.transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., Any]:
    """Compile FlexAttention once; rows of other widths make it compile once more, then for every width."""
    return torch.compile(flex_attention)


def _attend(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    window: int,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Let queries, the last of the keys' places, look at every key up to their own; [1, H, A, E]."""
    key, value = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) for parts in (keys, values))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    offset = key.shape[2] - query.shape[2]
    narrow = bool(window) and window < key.shape[2]
    mask = _causal(query.shape[2], offset, window if narrow else 0, query.device) if offset or narrow else None
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )


def _causal(num: int, offset: int, window: int, device: torch.device) -> Bool[Tensor, "A PA"]:
    """Mask of queries at places offset.. over keys at places 0.."""
    places = torch.arange(offset, offset + num, device=device)[:, None]
    keys = torch.arange(offset + num, device=device)[None]
    seen = keys <= places
    return seen & (places - keys < window) if window else seen


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
