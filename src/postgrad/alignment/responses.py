"""Many responses a prompt, drawn by a policy in process or on a server, into a store one shard at a time.

What a response says depends on the run's seed, its prompt and its number k. A shard holds the responses of a few
prompts of about one length and is written as soon as they are finished, so a run that is stopped goes on there.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.alignment.endpoint import Endpoint, EndpointConfig
from postgrad.alignment.exchange import Chat
from postgrad.core.config import ModelConfig
from postgrad.core.data import Message, Prompt
from postgrad.core.distributed import barrier, first_rank, on_every_rank
from postgrad.core.files import write_json
from postgrad.core.generate import context_length, generate
from postgrad.core.models import load_lm, model_hash
from postgrad.core.precision import autocast
from postgrad.core.report import TIMING, log_metrics
from postgrad.core.runtime import Job, progress, stage_seed, stop_on_signals, stop_requested
from postgrad.core.store import content_hash, has_shard, is_sealed, read_manifest, read_store, seal, write_shard
from postgrad.core.text import encode_prompts, stop_ids
from postgrad.errors import ArtefactError, ConfigError, DataError, Interrupted

Row = dict[str, Any]
TOO_LONG = "dropped: no room for a response"
REFUSED = "dropped: refused by the server"

RESPONSES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_messages", pa.string()),
        ("k", pa.int32()),
        ("response", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("logprob_sum", pa.float64()),
        ("n_tokens", pa.int32()),
        ("seed", pa.int64()),
        ("policy_hash", pa.string()),
    ]
)


@dataclass(frozen=True)
class Draw:
    """How responses are drawn."""

    n: int
    max_new_tokens: int
    temperature: float
    top_p: float


@dataclass(frozen=True)
class Answers:
    """The stored responses to one prompt, in the order of k."""

    id: str
    messages: tuple[Message, ...]
    rows: tuple[Row, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The responses."""
        return tuple(row["response"] for row in self.rows)


@runtime_checkable
class Policy(Protocol):
    """Whoever answers prompts."""

    @property
    def hash(self) -> str:
        """Names the weights, or the model on its server."""
        ...

    def arrange(self, prompts: Sequence[Prompt], draw: Draw) -> tuple[list[Prompt], dict[str, int]]:
        """Order prompts so that neighbours are alike, and drop those that cannot be answered; counts say why."""
        ...

    def answer(self, prompts: Sequence[Prompt], draw: Draw, seed: int) -> list[Row]:
        """Draw all responses to some prompts, as rows of the store."""
        ...


class LocalPolicy:
    """A model in this process.

    Args: max_length: longest prompt plus response, in tokens; the model's own context if that is shorter.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job, max_length: int) -> None:
        self.hash = model_hash(model)
        self._model, self._tokenizer, self._job = model, tokenizer, job
        self._room = min(max_length, context_length(model))
        self._stops = stop_ids(tokenizer)
        self._tokens: dict[str, tuple[int, ...]] = {}

    def arrange(self, prompts: Sequence[Prompt], draw: Draw) -> tuple[list[Prompt], dict[str, int]]:
        """Sort by length: neighbours need little padding."""
        tokens = encode_prompts(self._tokenizer, [prompt.messages for prompt in prompts])
        fits = {
            prompt.id: prompt
            for prompt, own in zip(prompts, tokens, strict=True)
            if len(own) + draw.max_new_tokens <= self._room
        }
        self._tokens = {p.id: own for p, own in zip(prompts, tokens, strict=True) if p.id in fits}
        if not fits:
            shortest = min(map(len, tokens))
            raise ConfigError(
                f"max_new_tokens {draw.max_new_tokens} and the shortest prompt of {shortest} tokens do not fit "
                f"in {self._room}, the smaller of data.max_length and the model's context. Set max_new_tokens to "
                f"{max(1, self._room - shortest)} or less."
            )
        order = sorted(fits.values(), key=lambda prompt: (len(self._tokens[prompt.id]), prompt.id))
        return order, {TOO_LONG: len(prompts) - len(fits)} if len(fits) < len(prompts) else {}

    def answer(self, prompts: Sequence[Prompt], draw: Draw, seed: int) -> list[Row]:
        """Generate all responses of all prompts together."""
        seeds = [[response_seed(seed, prompt, k) for k in range(draw.n)] for prompt in prompts]
        with autocast(self._job):
            drawn = generate(
                self._model,
                [self._tokens[prompt.id] for prompt in prompts],
                seeds=seeds,
                max_new_tokens=draw.max_new_tokens,
                temperature=draw.temperature,
                top_p=draw.top_p,
                stop_ids=self._stops,
                pad_id=self._tokenizer.pad_token_id or 0,
            )
        rows = []
        for prompt, own_seeds, samples in zip(prompts, seeds, drawn, strict=True):
            spoken = [s.tokens[:-1] if s.finish == "stop" else s.tokens for s in samples]
            texts = self._tokenizer.batch_decode(spoken, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for k, (text, sample) in enumerate(zip(texts, samples, strict=True)):
                row = make_row(prompt, k, text, own_seeds[k], self.hash)
                row |= {"token_ids": list(sample.tokens), "n_tokens": len(sample.tokens)}
                rows.append(row | {"finish_reason": sample.finish, "logprob_sum": sample.logprob})
        return rows


class ServerPolicy:
    """A model behind an OpenAI-compatible server; its rows have no tokens and no log-probabilities."""

    def __init__(self, config: EndpointConfig) -> None:
        self.hash = content_hash([config.base_url, config.model])
        self._endpoint = Endpoint(config, stop_requested)

    def arrange(self, prompts: Sequence[Prompt], draw: Draw) -> tuple[list[Prompt], dict[str, int]]:
        """Sort by length in characters; the server says itself what does not fit."""
        return sorted(prompts, key=lambda p: (sum(len(m["content"]) for m in p.messages), p.id)), {}

    def answer(self, prompts: Sequence[Prompt], draw: Draw, seed: int) -> list[Row]:
        """Ask for every response under a seed of its own; a prompt the server refuses gets no rows."""
        asked = [(prompt, k, response_seed(seed, prompt, k)) for prompt in prompts for k in range(draw.n)]
        replies = self._endpoint.ask(
            [
                # 31 bits: what every server takes.
                Chat(p.messages, draw.max_new_tokens, draw.temperature, top_p=draw.top_p, seed=own % 2**31)
                for p, _, own in asked
            ]
        )
        refused = {p.id for (p, _, _), reply in zip(asked, replies, strict=True) if reply.problem}
        rows = []
        for (prompt, k, own), reply in zip(asked, replies, strict=True):
            if prompt.id not in refused:
                row = make_row(prompt, k, reply.text, own, self.hash)
                row |= {"token_ids": [], "n_tokens": reply.tokens_out, "logprob_sum": math.nan}
                rows.append(row | {"finish_reason": "length" if reply.finish == "length" else "stop"})
        return rows


def load_policy(config: ModelConfig, job: Job, max_length: int) -> LocalPolicy:
    """Load a policy to sample from in this process."""
    model, tokenizer = load_lm(config, job, frozen=True)
    return LocalPolicy(model, tokenizer, job, max_length)


def response_seed(seed: int, prompt: Prompt, k: int) -> int:
    """Key the noise of response k."""
    return stage_seed(seed, "response", prompt.id, k)


def make_row(prompt: Prompt, k: int, response: str, seed: int, policy_hash: str) -> Row:
    """Build the part of a row that every policy knows."""
    return {
        "prompt_id": prompt.id,
        "prompt_messages": json.dumps(list(prompt.messages), ensure_ascii=False),
        "k": k,
        "response": response,
        "seed": seed,
        "policy_hash": policy_hash,
    }


def sample_store(
    folder: Path, policy: Policy, prompts: Sequence[Prompt], draw: Draw, job: Job, *, chunk: int
) -> dict[str, int]:
    """Answer every prompt into a store, `chunk` prompts a shard; continue where an earlier call stopped.

    Returns: counts of prompts, responses, and prompts dropped for each reason.
    """
    arranged, dropped = policy.arrange(prompts, draw)
    settings = {**asdict(draw), "seed": job.seed, "chunk": chunk, "policy": policy.hash}
    settings["prompts"] = content_hash([prompt.id for prompt in arranged])
    first_rank(lambda: claim(folder, settings))
    chunks = [arranged[at : at + chunk] for at in range(0, len(arranged), chunk)]

    def work() -> None:
        mine = range(job.rank, len(chunks), job.world)
        done = sum(len(chunks[i]) for i in mine if has_shard(folder, i))
        with progress(job, sum(len(chunks[i]) for i in mine), "prompts answered", done) as bar:
            for index in mine:
                if not has_shard(folder, index):
                    rows = _timed(policy, chunks[index], draw, job, index)
                    write_shard(folder, index, rows, RESPONSES)
                    bar.advance(len(chunks[index]))
                if stop_requested():
                    raise Interrupted("Stopped; the responses drawn so far are stored.")

    if not is_sealed(folder):
        with stop_on_signals():
            on_every_rank(work)
        barrier()
        first_rank(lambda: _seal(folder, settings, len(arranged), dropped))
    return read_counts(folder)


def _timed(policy: Policy, prompts: Sequence[Prompt], draw: Draw, job: Job, index: int) -> list[Row]:
    began = time.perf_counter()
    rows = policy.answer(prompts, draw, job.seed)
    seconds = time.perf_counter() - began
    tokens = sum(row["n_tokens"] for row in rows)
    if job.rank == 0:
        rate = tokens / max(seconds, 1e-9)
        log_metrics(
            job.folder,
            {"step": index, "seconds": seconds, "tokens": tokens, "tokens_per_second": rate},
            TIMING,
        )
    return rows


def _seal(folder: Path, settings: Row, num_prompts: int, dropped: dict[str, int]) -> None:
    ids = shard_column(folder, "prompt_id")
    answered = len(set(ids))
    if not answered:
        raise DataError(
            f"The server refused all {num_prompts} prompts; are they and {settings['max_new_tokens']} new tokens "
            "too long for its model?"
        )
    counts = {"prompts": answered, "responses": len(ids), **dropped}
    if answered < num_prompts:
        counts[REFUSED] = num_prompts - answered
    seal(folder, stage="sample", settings=settings, parents={"policy": settings["policy"]}, counts=counts)


def shard_column(folder: Path, name: str) -> list[Any]:
    """Read one column of all shards of a store that need not be sealed yet."""
    files = sorted(folder.glob("part-*.parquet"))
    return [value for path in files for value in pq.read_table(path, columns=[name])[name].to_pylist()]


def read_counts(folder: Path) -> dict[str, int]:
    """Read what a sealed store counted."""
    return {name: int(number) for name, number in read_manifest(folder)["counts"].items()}


def claim(folder: Path, settings: Row) -> None:
    """Note for what a store is being written, or refuse a folder begun for something else.

    Raises: ArtefactError: the folder holds shards of other settings, another policy or other prompts.
    """
    place = folder / "settings.json"
    if not place.is_file():
        write_json(place, settings)
        return
    earlier = json.loads(place.read_text(encoding="utf-8"))
    changed = [name for name in settings if earlier.get(name) != settings[name]]
    if changed:
        raise ArtefactError(
            f"{folder} was begun with another {', '.join(changed)}: expected {[settings[n] for n in changed]}, found "
            f"{[earlier.get(n) for n in changed]}. Use another runtime.folder, or runtime.overwrite to begin anew."
        )


def read_answers(folder: Path) -> list[Answers]:
    """Read a sealed store of responses, grouped by prompt in the order of the store."""
    groups: dict[str, list[Row]] = {}
    for row in read_store(folder):
        groups.setdefault(row["prompt_id"], []).append(row)
    return [
        Answers(name, tuple(json.loads(rows[0]["prompt_messages"])), tuple(sorted(rows, key=lambda row: row["k"])))
        for name, rows in groups.items()
    ]
