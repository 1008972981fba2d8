"""Where forgetting may act: the transformer blocks of a network and the linear layers of each one's feed-forward part.

A block is an element of a list of modules that has a feed-forward child; the layers are found by where they stand, not
by a list of their names, so gated feed-forwards (three layers) come out whole. Attention is never matched, and neither
is a pooling head that looks like a block but stands alone.

Source:    GS-LoRA (arXiv 2403.11530): pairs on both layers of every block's feed-forward part, one group a block.
Differs:   with placement "attention", a fused projection of queries, keys and values gets one pair, not three.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from postgrad.core.layer_adapters import linear_layers, listed, pairs
from postgrad.errors import ConfigError, ModelError

Placement = Literal["ffn", "attention"]
FEED_FORWARD = frozenset({"mlp", "ffn", "ff", "feed_forward", "feedforward"})
"""Names of a block's feed-forward child: transformers, timm, torchvision, ours."""
FLAT = re.compile(r"(intermediate|output)\.dense|fc[12]|linear[12]")
"""Layers of a feed-forward part that has no module of its own, below the block itself."""
PROJECTION = re.compile(
    r"qkv|[qkv]|(query|key|value)(_proj)?|[qkv]_proj|qkv_proj|c_attn|query_key_value|to_(qkv|kv|[qkv])"
)
"""What makes queries, keys and values, below a block's attention child."""
ATTENTION = re.compile("attn|attention")


@dataclass(frozen=True)
class Block:
    """A transformer block and the linear layers forgetting may adapt, by their full names, in order."""

    name: str
    linears: tuple[str, ...]


def ffn_blocks(network: nn.Module, pattern: str = "", placement: Placement = "ffn") -> list[Block]:
    """List the blocks of a network in its own order, encoder before decoder.

    Adapters that are already there change nothing. Of a model with two towers both are listed: pass the tower, or a
    pattern.

    Args:
        pattern: a regular expression for the whole name of a layer, which replaces the search; what its first group
            matches names the block, and without a group the innermost list element the layer is in does.
        placement: "ffn", or the queries, keys and values instead, as in the paper's ablation.

    Raises:
        ConfigError: the pattern is no regular expression.
        ModelError: nothing was found; says which linear layers there are.
    """
    linears = list(linear_layers(network))
    elements = set(_list_elements(network))
    if pattern:
        found = _by_pattern(linears, elements, pattern)
    else:
        found = _by_place(linears, elements, _feed_forward if placement == "ffn" else _projections)
    if not found:
        looked = f"match {pattern!r}" if pattern else f"look like {placement} layers of transformer blocks"
        raise ModelError(
            f"none of the linear layers of this {type(network).__name__} {looked}. It has {listed(linears)}. Give a "
            r"regular expression for whole names, such as '(encoder\.\d+)\.net\.[02]'"
        )
    return found


def first_adapted(network: nn.Module, blocks: Sequence[Block], name: str) -> int:
    """Give the index of the first block this adapter is on; the number of blocks when it is on none."""
    adapted = set(pairs(network, name))
    return next((k for k, block in enumerate(blocks) if not adapted.isdisjoint(block.linears)), len(blocks))


def _list_elements(network: nn.Module) -> Iterator[str]:
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            yield from (f"{name}.{child}" if name else child for child, _ in module.named_children())


def _by_place(linears: list[str], elements: set[str], choose: Callable[[list[str]], list[str]]) -> list[Block]:
    """Make a block of each list element that has the layers asked for; they are chosen by their names below it."""
    below: dict[str, list[str]] = {}
    for name in linears:
        for element in _enclosing(name, elements):
            below.setdefault(element, []).append(name.removeprefix(f"{element}."))
    chosen = {element: choose(names) for element, names in below.items() if not ATTENTION.search(element)}
    return [Block(key, tuple(f"{key}.{name}" for name in names)) for key, names in chosen.items() if names]


def _feed_forward(below: list[str]) -> list[str]:
    """Choose the layers of a block's feed-forward child, or those that do without one; a single layer is none."""
    inside = [name for name in below if name.split(".")[0] in FEED_FORWARD]
    if not inside and any(ATTENTION.search(name.split(".")[0]) for name in below):
        inside = [name for name in below if FLAT.fullmatch(name)]
    return inside if len(inside) > 1 else []


def _projections(below: list[str]) -> list[str]:
    """Choose the layers that make queries, keys and values."""
    split = [(name, name.split(".")) for name in below]
    return [name for name, parts in split if ATTENTION.search(parts[0]) and PROJECTION.fullmatch(parts[-1])]


def _by_pattern(linears: list[str], elements: set[str], pattern: str) -> list[Block]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    groups: dict[str, list[str]] = {}
    for name in linears:
        if found := compiled.fullmatch(name):
            inner = [name, *_enclosing(name, elements)][-1]
            groups.setdefault(found[1] if compiled.groups else inner, []).append(name)
    return [Block(name, tuple(found)) for name, found in groups.items()]


def _enclosing(name: str, elements: set[str]) -> list[str]:
    """List the list elements a layer is in, outermost first; not the layer itself."""
    parts = name.split(".")
    return [outer for k in range(1, len(parts)) if (outer := ".".join(parts[:k])) in elements]
