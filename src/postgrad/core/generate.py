"""Sample many responses for many prompts at once, each from its own noise.

Letters: P distinct prompts, R responses in all, A responses still in the cache, W width of the padded prompts,
L tokens in the cache, V vocabulary.

A prompt is read once; its cache rows are then copied for its responses and all responses are decoded together.
Response k draws its uniforms up front from a generator seeded by its own seed, so what is said depends on the
prompt and that seed, never on the neighbours in the batch or on the number of new tokens allowed.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from postgrad.core import adapters, segments
from postgrad.errors import ConfigError

# Rows of logits are turned into tokens in tiles of at most this many numbers: bounds the memory at large V.
TILE = 1 << 25
# Finished responses leave the cache once they are this share of its rows: below it the copy costs more than it saves.
DROP_SHARE = 0.25
# Back ends that take a boolean mask [A, 1, 1, L].
TAKE_READY_MASK = ("sdpa", segments.NAME)


@dataclass(frozen=True)
class Sample:
    """One response: its tokens (stop token included), log pi(tokens | prompt) at temperature 1, and why it ended."""

    tokens: tuple[int, ...]
    logprob: float
    finish: Literal["stop", "length"]


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A cache layer with spare room: a new token is written in place, where DynamicLayer copies the whole layer."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start empty, with the dtype and device of the first keys."""
        super().lazy_initialization(key_states, value_states)
        self.key_room = key_states[..., :0, :]
        self.value_room = value_states[..., :0, :]

    def update(self, key_states: Tensor, value_states: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.key_room.shape[-2]:
            size = end + max(16, end // 8)  # not more: rows far apart in memory are slow to attend to
            self.key_room = _widen(self.key_room, key_states, size)
            self.value_room = _widen(self.value_room, value_states, size)
        self.key_room[..., start:end, :] = key_states
        self.value_room[..., start:end, :] = value_states
        self.keys, self.values = self.key_room[..., :end, :], self.value_room[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may be named many times."""
        end = self.get_seq_length()
        self.key_room = self.key_room.index_select(0, indices)
        self.value_room = self.value_room.index_select(0, indices)
        self.keys, self.values = self.key_room[..., :end, :], self.value_room[..., :end, :]


def _widen(room: Tensor, like: Tensor, size: int) -> Tensor:
    wider = like.new_empty((*like.shape[:-2], size, like.shape[-1]))
    if room.shape[-2]:
        wider[..., : room.shape[-2], :] = room
    return wider


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_ids: Sequence[int],
    pad_id: int,
) -> list[list[Sample]]:
    """Sample len(seeds[i]) responses for prompt i; response k of it has the noise of seeds[i][k].

    Args:
        model: any causal language model of transformers with a growing cache.
        temperature: divides the logits; 0 takes the likeliest token. Sample.logprob is at temperature 1 always.
        top_p: draw from the fewest tokens that hold this probability; 1 = all.
        stop_ids: a response ends with the first of these tokens.

    Raises:
        ConfigError: a prompt is empty, or prompt and response do not fit the model's context.
    """
    assert len(prompts) == len(seeds), f"{len(prompts)} prompts need as many lists of seeds, found {len(seeds)}"
    assert temperature >= 0 and 0 < top_p <= 1, f"temperature {temperature} or top_p {top_p} out of range"
    model = adapters.unwrap(model)
    check_context(context_length(model), prompts, max_new_tokens)
    distinct = {tuple(prompt): row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    row_of = [distinct[tuple(prompt)] for prompt, own in zip(prompts, seeds, strict=True) for _ in own]
    flat_seeds = [seed for own in seeds for seed in own]
    if not flat_seeds:
        return [[] for _ in prompts]
    with _answering(model), torch.inference_mode():
        decoder = _Decoder(model, list(distinct), row_of, pad_id)
        noise = _uniforms(flat_seeds, max_new_tokens if temperature > 0 else 0).to(model.device)
        flat = _decode(decoder, noise, max_new_tokens, temperature, top_p, tuple(stop_ids))
    answers = iter(flat)
    return [[next(answers) for _ in own] for own in seeds]


@contextmanager
def _answering(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def context_length(model: PreTrainedModel) -> int:
    """Return how many tokens the model was built for; a very large number where its config does not say."""
    settings = model.config.get_text_config().to_dict()
    return int(settings.get("max_position_embeddings") or settings.get("n_positions") or 1 << 40)


def check_context(context: int, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse prompts that are empty or leave too little room for the response.

    Raises: ConfigError.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError("Expected at least one token in each prompt to sample from, found an empty prompt.")
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest + max_new_tokens > context:
        raise ConfigError(
            f"The longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}: "
            f"{longest + max_new_tokens} in all, but the model was built for {context}. "
            f"Set max_new_tokens to {max(0, context - longest)} or less, or leave out the long prompts."
        )


def _uniforms(seeds: Sequence[int], num: int) -> Float[Tensor, "R T"]:
    """Draw num uniforms in [0, 1) a seed; the first ones do not depend on num."""
    generator = torch.Generator()
    noise = torch.empty(len(seeds), num, dtype=torch.float64)
    for row, seed in zip(noise, seeds, strict=True):
        generator.manual_seed(seed)
        torch.rand(num, generator=generator, dtype=torch.float64, out=row)
    return noise


class _Decoder:
    """The model, its cache, and the mask over left-padded prompts; logits holds the next-token logits of each row."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], rows: list[int], pad_id: int):
        width = max(map(len, prompts))
        tokens = torch.tensor([(pad_id,) * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)  # [P, W]
        accepted = inspect.signature(model.forward).parameters
        self.model = model
        self.takes_positions = "position_ids" in accepted
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers]
        plain = bool(self.cache.layers) and all(type(layer) is RoomyLayer for layer in self.cache.layers)
        # A ready 4-D mask spares transformers' own mask building each step; other back ends want their own form.
        self.ready_mask = plain and model.config._attn_implementation in TAKE_READY_MASK
        self.padded = min(map(len, prompts)) < width
        self.mask = mask
        self.position = mask.sum(1, keepdim=True) - 1  # [P, 1]
        self.keep = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.logits = self._forward(tokens, mask if self.padded else None, mask.cumsum(1).sub(1).clamp(min=0))
        self.select(torch.tensor(rows, device=model.device))

    def _forward(self, tokens: Tensor, mask: Tensor | None, positions: Tensor) -> Float[Tensor, "A V"]:
        place = {"position_ids": positions} if self.takes_positions else {}
        output = self.model(
            input_ids=tokens, attention_mask=mask, past_key_values=self.cache, use_cache=True, **place, **self.keep
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def select(self, rows: Int[Tensor, " A"]) -> None:
        """Keep these rows of the cache, in this order."""
        self.cache.batch_select_indices(rows)
        self.mask, self.position, self.logits = self.mask[rows], self.position[rows], self.logits[rows]

    def step(self, tokens: Int[Tensor, " A"]) -> None:
        """Append one token a row and compute the logits of the next."""
        self.position = self.position + 1
        mask = None
        if self.padded:
            self.mask = torch.cat((self.mask, torch.ones_like(self.mask[:, :1])), dim=1)  # [A, L]
            mask = self.mask[:, None, None].bool() if self.ready_mask else self.mask
        self.logits = self._forward(tokens[:, None], mask, self.position)


def _decode(
    decoder: _Decoder,
    noise: Float[Tensor, "R T"],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_ids: tuple[int, ...],
) -> list[Sample]:
    num, device = len(decoder.logits), decoder.logits.device
    stops = torch.tensor(stop_ids, device=device)
    written = torch.zeros(num, max_new_tokens, dtype=torch.long, device=device)
    logprob = torch.zeros(num, dtype=torch.float64, device=device)
    length = torch.zeros(num, dtype=torch.long, device=device)
    stopped = torch.zeros(num, dtype=torch.bool, device=device)
    rows = torch.arange(num, device=device)  # [A] the response each cache row belongs to
    for t in range(max_new_tokens):
        draw = noise[rows, t] if temperature > 0 else None
        tokens, logps = choose_tokens(decoder.logits, draw, temperature, top_p)
        alive = ~stopped[rows]
        written[rows, t] = tokens
        logprob[rows] += torch.where(alive, logps, 0.0)
        length[rows] += alive
        stopped[rows] |= (tokens[:, None] == stops).any(1)
        kept = (~stopped[rows]).nonzero()[:, 0]
        if len(kept) == 0 or t == max_new_tokens - 1:
            break
        if len(kept) <= (1 - DROP_SHARE) * len(rows):
            rows, tokens = rows[kept], tokens[kept]
            decoder.select(kept)
        decoder.step(tokens)
    return _samples(written, length, logprob, stopped)


def _samples(written: Tensor, length: Tensor, logprob: Tensor, stopped: Tensor) -> list[Sample]:
    columns = zip(written.tolist(), length.tolist(), logprob.tolist(), stopped.tolist(), strict=True)
    return [Sample(tuple(row[:n]), value, "stop" if done else "length") for row, n, value, done in columns]


def choose_tokens(
    logits: Float[Tensor, "A V"], uniform: Float[Tensor, " A"] | None, temperature: float, top_p: float
) -> tuple[Int[Tensor, " A"], Float[Tensor, " A"]]:
    """Pick the token of each row whose share of the line [0, 1) holds the row's uniform (inverse CDF).

    One uniform a token, where Gumbel noise would need V. uniform None = the likeliest token.

    Returns:
        the tokens, and log p(token) at temperature 1 without top_p, in float64.
    """
    size = max(1, TILE // logits.shape[1])
    tokens, logps = [], []
    for start in range(0, len(logits), size):
        tile = logits[start : start + size].float()
        logp = tile.log_softmax(-1)
        if uniform is None:
            token = tile.argmax(-1)
        else:
            probs = logp.exp() if temperature == 1 else (tile / temperature).softmax(-1)
            token = _invert_cdf(_nucleus(probs, top_p), uniform[start : start + size])
        tokens.append(token)
        logps.append(logp.gather(1, token[:, None])[:, 0].double())
    return torch.cat(tokens), torch.cat(logps)


def _nucleus(probs: Float[Tensor, "A V"], top_p: float) -> Float[Tensor, "A V"]:
    """Zero all but the fewest likeliest tokens that hold top_p."""
    if top_p >= 1:
        return probs
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept: Bool[Tensor, "A V"] = before < top_p
    return torch.zeros_like(probs).scatter(1, index, ordered * kept)


def _invert_cdf(probs: Float[Tensor, "A V"], uniform: Float[Tensor, " A"]) -> Int[Tensor, " A"]:
    cdf = probs.cumsum(-1, dtype=torch.float64)
    # right=True: a token of probability 0 is never hit, not even by a uniform of exactly 0.
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=probs.shape[1] - 1)
