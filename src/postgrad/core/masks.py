"""Attention masks of packed rows in the form a model takes: SDPA 4-D masks, FlexAttention block masks, 2-D padding.

Letters: R rows, T tokens of a row.
"""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PretrainedConfig

from postgrad.core import segments
from postgrad.core.rows import PADDING, Rows, tree_mask

Mask = Any
"""A tensor, a BlockMask, or one of them for each kind of layer."""


def attention_inputs(config: PretrainedConfig, rows: Rows) -> dict[str, Any]:
    """Build the arguments of a backbone that make it attend as these rows ask: a mask, or segments beside a stub.

    Flat rows take a plain padding mask. Tree rows take the tree mask, narrowed to the window for layers with sliding
    attention; or, where the model runs our own attention, the lengths of the trees.
    """
    if rows.layout == "flat":
        return {"attention_mask": (rows.group != PADDING).long()}  # [R, T]
    settings = config.get_text_config()
    if rows.segments is not None and settings._attn_implementation == segments.NAME:
        stub = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=rows.tokens.device)  # 4-D: models pass it on untouched
        kinds = set(settings.to_dict().get("layer_types") or ())
        mask = dict.fromkeys(kinds, stub) if "sliding_attention" in kinds else stub
        return {"attention_mask": mask, "segments": rows.segments}
    return {"attention_mask": _tree_masks(settings, rows)}


def _tree_masks(settings: PretrainedConfig, rows: Rows) -> Mask:
    known = settings.to_dict()
    window = int(known.get("sliding_window") or 0)
    kinds = set(known.get("layer_types") or ())
    implementation = settings._attn_implementation
    if "sliding_attention" in kinds:
        return {kind: _one_mask(rows, implementation, window if kind.startswith("sliding") else 0) for kind in kinds}
    windowed = not kinds and bool(known.get("use_sliding_window", True))
    return _one_mask(rows, implementation, window if windowed else 0)


def _one_mask(rows: Rows, implementation: str, window: int) -> Mask:
    if implementation == "flex_attention":
        return _block_mask(rows, window)
    allowed = tree_mask(rows.group, rows.branch)  # [R, 1, T, T]
    if window:
        allowed = allowed & within_window(rows.positions, window)
    if implementation in ("sdpa", segments.NAME):
        return allowed
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, torch.finfo(torch.float32).min)


def within_window(positions: Int[Tensor, "R T"], window: int) -> Bool[Tensor, "R 1 T T"]:
    """Say which tokens stand less than a window apart, by position and not by place in the row."""
    return ((positions[:, :, None] - positions[:, None, :]) < window)[:, None]


def _block_mask(rows: Rows, window: int) -> Mask:
    from torch.nn.attention.flex_attention import create_block_mask

    group, branch, positions = rows.group, rows.branch, rows.positions
    reach = window or rows.tokens.shape[1]
    allowed = lambda row, head, query, key: (  # noqa: E731, its bare arguments are what FlexAttention counts
        (query >= key)
        & (group[row, query] == group[row, key])
        & ((branch[row, key] == 0) | (branch[row, key] == branch[row, query]))
        & (positions[row, query] - positions[row, key] < reach)
    )
    num_rows, width = rows.tokens.shape
    return create_block_mask(allowed, num_rows, None, width, width, device=str(rows.tokens.device))
