"""Attention masks of packed rows in the form a model takes: SDPA 4-D masks, FlexAttention block masks, 2-D padding.

Letters: R rows, T tokens of a row.
"""

from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PretrainedConfig

from postgrad.core import segments
from postgrad.core.rows import GPU_MULTIPLE, PADDING, Rows, tree_mask

BLOCK = GPU_MULTIPLE
"""Tokens a side of a block; FlexAttention's default."""

Mask = Any
"""A tensor, a BlockMask, or one of them for each kind of layer."""


def attention_inputs(config: PretrainedConfig, rows: Rows) -> dict[str, Any]:
    """Build the arguments of a backbone that make it attend as these rows ask.

    Flat rows take a plain padding mask. Tree rows take the tree mask, narrowed to the window for layers with sliding
    attention. Our own attention (core/segments.py) takes the lengths of the trees instead, and on a GPU a function
    that gives the block mask of a window; models, which would stumble over both, see a stub.
    """
    if rows.layout == "flat":
        return {"attention_mask": (rows.group != PADDING).long()}  # [R, T]
    settings = config.get_text_config()
    on_gpu = rows.tokens.is_cuda
    if settings._attn_implementation != segments.NAME or not (rows.segments or on_gpu):
        return {"attention_mask": _tree_masks(settings, rows)}
    stub = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=rows.tokens.device)  # 4-D: models pass it on untouched
    kinds = set(settings.to_dict().get("layer_types") or ())
    mask = dict.fromkeys(kinds, stub) if "sliding_attention" in kinds else stub
    block_masks = cache(partial(block_mask, rows)) if on_gpu else None
    return {"attention_mask": mask, "segments": rows.segments, "block_masks": block_masks}


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
    allowed = tree_mask(rows.group, rows.branch)  # [R, 1, T, T]
    if window:
        allowed = allowed & within_window(rows.positions, window)
    if implementation in ("sdpa", segments.NAME):
        return allowed
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, torch.finfo(torch.float32).min)


def within_window(positions: Int[Tensor, "R T"], window: int) -> Bool[Tensor, "R 1 T T"]:
    """Say which tokens stand less than a window apart, by position and not by place in the row."""
    return ((positions[:, :, None] - positions[:, None, :]) < window)[:, None]


def block_mask(rows: Rows, window: int = 0) -> BlockMask:
    """Build the FlexAttention mask of rows whose width is a multiple of BLOCK, from blocks alone.

    No [T, T] mask is ever made: trees and branches stand in order, so the ends of two blocks tell whether a token of
    one may see any token, or every token, of the other. Padding sees itself only.
    """
    group, branch, positions = rows.group.int(), rows.branch.int(), rows.positions.int()

    # Lambdas, for FlexAttention counts their bare arguments and traces them.
    in_tree = lambda row, head, query, key: (  # noqa: E731
        (query >= key)
        & (group[row, query] == group[row, key])
        & ((branch[row, key] == 0) | (branch[row, key] == branch[row, query]))
    )
    in_window = lambda row, head, query, key: (  # noqa: E731
        in_tree(row, head, query, key) & (positions[row, query] - positions[row, key] < window)  # type: ignore[no-untyped-call]
    )
    some, every = _visible_blocks(group, branch)
    if window:
        every = torch.zeros_like(every)
    partly = _ordered(some & ~every)
    wholly = _ordered(every)
    width = rows.tokens.shape[1]
    return BlockMask.from_kv_blocks(
        *partly, *wholly, BLOCK, in_window if window else in_tree, seq_lengths=(width, width)
    )


def _visible_blocks(
    group: Int[Tensor, "R T"], branch: Int[Tensor, "R T"]
) -> tuple[Bool[Tensor, "R B B"], Bool[Tensor, "R B B"]]:
    """Say of blocks of queries (second last axis) and of keys whether some, and whether every, pair is seen."""
    num_rows, width = group.shape
    blocks = (num_rows, width // BLOCK, BLOCK)
    group, branch = group.reshape(blocks), branch.reshape(blocks)  # [R, B, BLOCK]
    first, last = group[..., 0], group[..., -1]  # [R, B]
    of_last = torch.where(group == last[..., None], branch, torch.iinfo(branch.dtype).max).amin(-1)
    newest, oldest = branch[..., -1], branch[..., 0]  # of the last token, of the first
    before = torch.ones(blocks[1], blocks[1], dtype=torch.bool, device=group.device).tril(-1)
    own_tree = before & (last[:, None, :] == first[:, :, None]) & (last != PADDING)[:, None, :]  # [R, B, B]
    open_branch = (of_last == 0)[:, None, :] | (newest[:, None, :] == oldest[:, :, None])
    some = own_tree & open_branch
    single = first == last  # one tree in the block
    only_prompt = (newest == 0)[:, None, :]
    first_answer = torch.where(branch == 0, torch.iinfo(branch.dtype).max, branch).amin(-1)
    one_answer = (first_answer == newest)[:, None, :] & (newest[:, None, :] == oldest[:, :, None])
    one_answer &= (oldest == newest)[:, :, None]  # and the keys may hold the end of its prompt
    every = some & single[:, None, :] & single[:, :, None] & (only_prompt | one_answer)
    return some | torch.eye(blocks[1], dtype=torch.bool, device=group.device), every


def _ordered(seen: Bool[Tensor, "R B B"]) -> tuple[Int[Tensor, "R 1 B"], Int[Tensor, "R 1 B B"]]:
    """Count the blocks seen and list them, in order, before the others."""
    order = torch.argsort((~seen).to(torch.int8), dim=-1, stable=True)
    return seen.sum(-1).to(torch.int32)[:, None], order.to(torch.int32)[:, None]
