"""Once the adapters sit in late blocks only, what comes before them is computed once a image and kept.

The input of block k, the first with an adapter that trains, is the same in every step: it is stored for all images, and
each step starts there. Exact: same logits, same gradients; with k = 11 of 12 blocks a step costs a twelfth. Where the
head reads the first token alone, the last feed-forward part is computed for that token alone, which is exact, too.

Differs:   a cache is bound to its prefix by a hash over the weights and the active adapters there, because revoking an
           earlier request's adapter below block k makes it wrong. Dropout before block k is off.

Letters: N images, B batch, and the rest of a block's input as the network has it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from postgrad.core.layer_adapters import active_names, base_state, hash_tensors, pairs
from postgrad.errors import ArtefactError, ModelError
from postgrad.forgetting.blocks import Block, ffn_blocks

PROBED = 2
"""Images on which a network is asked whether it can be resumed."""
FIRST_TOKEN_ERROR = 1e-5
"""Share of the output's norm that rounding may change where other tokens are not computed."""


@dataclass(frozen=True)
class PrefixCache:
    """The inputs of block k for a set of images, or for some of them."""

    states: Float[Tensor, "N ..."]
    k: int
    key: str
    """Of the prefix they were computed with."""
    tuple_size: int
    """What a block returns: 0 for a tensor, else a tuple of so many with the tensor first."""
    first_only: str = ""
    """The last block's feed-forward part, if it need compute the first token alone; "" = all of them."""

    def rows(self, index: Int[Tensor, " B"]) -> "PrefixCache":
        """Take the images of a batch."""
        return replace(self, states=self.states[index.to(self.states.device)])

    def check(self, network: nn.Module, blocks: Sequence[Block]) -> None:
        """Refuse to go on with a network whose prefix is another by now.

        Raises: ArtefactError: the hash of the prefix differs.
        """
        key = prefix_key(network, blocks, self.k, active_names(network))
        if key != self.key:
            raise ArtefactError(
                f"the cache before {blocks[self.k].name} is stale: it belongs to prefix {self.key}, this network has "
                f"{key}. An adapter below it was revoked, added or changed, or weights were; cache again"
            )


def cacheable(network: nn.Module, blocks: Sequence[Block], k: int) -> bool:
    """Say whether block k can be entered directly: the blocks are the elements of one list, from its first to its last.

    Not so for windowed stages (each its own list) and for encoders with decoders.
    """
    parent = blocks[0].name.rpartition(".")[0] if blocks else ""
    try:
        elements = [
            f"{parent}.{child}" if parent else child for child, _ in network.get_submodule(parent).named_children()
        ]
    except AttributeError:
        return False
    return 0 <= k < len(blocks) and [block.name for block in blocks] == elements


def prefix_key(network: nn.Module, blocks: Sequence[Block], k: int, active_adapters: Sequence[str]) -> str:
    """Hash all that can reach the input of block k: every tensor outside blocks k and later, and adapters there.

    Tensors behind the blocks (the head) count too: a network does not say where they are used.
    """
    later = tuple(f"{block.name}." for block in blocks[k:])
    tensors = {name: tensor for name, tensor in base_state(network).items() if not name.startswith(later)}
    for place, name in enumerate(active_adapters):
        for layer, (a, b) in pairs(network, name).items():
            if not f"{layer}.".startswith(later):
                tensors |= {f"adapter {place} {layer} A": a, f"adapter {place} {layer} B": b}
    return hash_tensors(tensors, f"input of {blocks[k].name}")


def cache_prefix(
    network: nn.Module,
    blocks: Sequence[Block],
    k: int,
    images: Shaped[Tensor, "N ..."],
    forward: Callable[[Tensor], object],
    *,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> PrefixCache:
    """Run the prefix over all images once, in eval mode, and keep the inputs of block k.

    Args:
        images: whatever `forward` takes, pixels or token ids, all of one shape.
        forward: runs the network, or a model around it, on a batch.
        dtype: float32 is exact; bfloat16 halves the memory and rounds.
        device: where to keep them; by default where they are computed.

    Raises: ModelError: the network cannot be entered at block k, or adapters that train lie before it.
    """
    _check_place(network, blocks, k)
    if len(images) == 0:
        raise ModelError("expected images to run the prefix on, found none; check the request's data")
    with torch.no_grad(), _evaluating(network):
        tuple_size = _tuple_size(network, blocks, forward, images[:PROBED])
        key = prefix_key(network, blocks, k, active_names(network))
        modules = [network.get_submodule(block.name) for block in blocks]
        with _passing(modules[k:], tuple_size):
            states = _inputs(modules[k], images, forward, batch_size, dtype, device)
        cache = PrefixCache(states, k, key, tuple_size)
        _check_exact(network, blocks, cache, forward, images[:PROBED])
    return cache


@contextmanager
def resumed(network: nn.Module, blocks: Sequence[Block], k: int, cached: PrefixCache) -> Iterator[None]:
    """Within this context a forward pass starts at block k, with the cached inputs in place of the computed ones.

    The embedding of the images still runs and is thrown away; where nothing but the tokens depends on the batch (vision
    transformers), one image in place of the batch is enough. Call `PrefixCache.check` once before a phase: it hashes.

    Raises: ModelError: the network cannot be entered at block k, or the cache is another batch's or block's.
    """
    _check_place(network, blocks, k)
    if cached.k != k:
        raise ModelError(f"expected the inputs of block {k}, found those of block {cached.k}; cache that block's")
    modules = [network.get_submodule(block.name) for block in blocks[: k + 1]]

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        found = _hidden(args, kwargs)
        own = cached.states.to(device=found.device, dtype=found.dtype)
        if own.shape[1:] != found.shape[1:] or found.shape[0] not in (1, own.shape[0]):
            raise ModelError(
                f"{blocks[k].name} was to get {tuple(found.shape)}, the cache has {tuple(own.shape)}: pass the images "
                "the cached rows belong to"
            )
        return ((own, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": own})

    with _passing(modules[:k], cached.tuple_size), ExitStack() as stack:
        stack.callback(modules[k].register_forward_pre_hook(enter, with_kwargs=True).remove)
        if cached.first_only:
            stack.enter_context(_first_token(network.get_submodule(cached.first_only)))
        yield


@torch.no_grad()
def shortened(
    network: nn.Module,
    blocks: Sequence[Block],
    cached: PrefixCache,
    forward: Callable[[Tensor], Float[Tensor, "B ..."]],
    images: Shaped[Tensor, "B ..."],
) -> PrefixCache:
    """Let passes from a cache compute the last feed-forward part for the first token alone, if nobody can tell.

    Args:    images: some of those the cache begins with.   forward: what a model makes of them, all that anyone reads.
    Returns: the cache as it was, where the output would be another, as with pooling over tokens.
    """
    last = [layer.split(".") for layer in blocks[-1].linears]
    shared = next((i for i, parts in enumerate(zip(*last, strict=False)) if len(set(parts)) > 1), 0)
    trial = replace(cached, first_only=".".join(last[0][:shared]))
    inside = trial.first_only.startswith(f"{blocks[-1].name}.")
    if cached.states.ndim != 3 or not inside or blocks[-1] != ffn_blocks(network)[-1]:  # attention asks all tokens
        return cached
    rows = replace(trial, states=trial.states[: len(images)])
    with _evaluating(network):
        whole = forward(images)
        with resumed(network, blocks, cached.k, rows):
            short = forward(images)
    same = (whole - short).norm() <= FIRST_TOKEN_ERROR * whole.norm()
    return trial if same else cached


@contextmanager
def _first_token(module: nn.Module) -> Iterator[None]:
    """Have a feed-forward part compute the first token alone, and give the others that token's output."""
    own, attributes = module.forward, vars(module)
    before = attributes.get("forward")

    def first(hidden: Tensor) -> Tensor:
        found: Tensor = own(hidden[:, :1])
        return found.expand(-1, hidden.shape[1], -1)

    try:
        attributes["forward"] = first
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before


def _check_place(network: nn.Module, blocks: Sequence[Block], k: int) -> None:
    if not cacheable(network, blocks, k):
        raise ModelError(
            f"{type(network).__name__} cannot be entered at block {k} of {len(blocks)}: its blocks must be all the "
            "elements of one list. Train without a cache"
        )
    for block in blocks[:k]:
        for name, parameter in network.get_submodule(block.name).named_parameters():
            if parameter.requires_grad:
                raise ModelError(
                    f"{block.name}.{name} trains but lies before {blocks[k].name}: prune the adapter there, or cache "
                    "an earlier block's input"
                )


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Find the tokens among what a block is called with."""
    found = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(found, Tensor):
        raise ModelError(
            f"expected a block called with its tokens first or as hidden_states, found {[type(arg) for arg in args]} "
            f"and {sorted(kwargs)}. Train without a cache"
        )
    return found


@contextmanager
def _passing(modules: Sequence[nn.Module], tuple_size: int) -> Iterator[None]:
    """Have modules hand on their tokens, as the one tensor or the first of the tuple that they usually return."""

    def passed(*args: Any, **kwargs: Any) -> Any:
        hidden = _hidden(args, kwargs)
        return (hidden, *[None] * (tuple_size - 1)) if tuple_size else hidden

    own = [(vars(module), vars(module).get("forward")) for module in modules]
    try:
        for attributes, _ in own:
            attributes["forward"] = passed
        yield
    finally:
        for attributes, before in own:
            if before is None:
                del attributes["forward"]
            else:
                attributes["forward"] = before


def _inputs(
    module: nn.Module,
    images: Tensor,
    forward: Callable[[Tensor], object],
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device | None,
) -> Tensor:
    """Collect the tokens a module is called with, for all images."""
    found: list[Tensor] = []
    states: Tensor | None = None
    with _seen(module, found):
        for start in range(0, len(images), batch_size):
            forward(images[start : start + batch_size])
            batch = found.pop()
            if states is None:
                states = torch.empty((len(images), *batch.shape[1:]), dtype=dtype, device=device or batch.device)
            states[start : start + len(batch)] = batch
    assert states is not None, "the caller saw that there are images"
    return states


@contextmanager
def _seen(module: nn.Module, kept: list[Tensor]) -> Iterator[None]:
    """Keep the tokens a module is called with."""

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(_hidden(args, kwargs).detach())

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _returned(module: nn.Module, kept: list[Any]) -> Iterator[None]:
    """Keep what a module returns."""
    handle = module.register_forward_hook(lambda _module, _args, output: kept.append(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Switch dropout off, and each module back to its own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _tuple_size(
    network: nn.Module, blocks: Sequence[Block], forward: Callable[[Tensor], object], images: Tensor
) -> int:
    """Ask what the blocks return."""
    outputs: list[Any] = []
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_returned(network.get_submodule(block.name), outputs))
        forward(images)
    sizes = {len(output) if isinstance(output, tuple) else 0 for output in outputs}
    if len(outputs) != len(blocks) or len(sizes) != 1:
        raise ModelError(
            f"expected {len(blocks)} blocks called once each with the same kind of output, found {len(outputs)} calls "
            f"and outputs of {sorted(sizes)} parts. Train without a cache"
        )
    return sizes.pop()


def _check_exact(
    network: nn.Module,
    blocks: Sequence[Block],
    cache: PrefixCache,
    forward: Callable[[Tensor], object],
    images: Tensor,
) -> None:
    """Compare the last block's output of a whole pass with that of a resumed one."""
    outputs: list[Any] = []
    with _returned(network.get_submodule(blocks[-1].name), outputs):
        forward(images)
        with resumed(network, blocks, cache.k, replace(cache, states=cache.states[: len(images)])):
            forward(images)
    whole, again = (output[0] if isinstance(output, tuple) else output for output in outputs)
    tolerance = 1e-4 if cache.states.dtype == torch.float32 else 0.1
    error = ((whole - again).norm() / whole.norm()).item()
    if not error <= tolerance:
        raise ModelError(
            f"entering {type(network).__name__} at block {cache.k} changes its last block's output by {error:.1e} of "
            "its norm: something else passes between its blocks. Train without a cache"
        )
