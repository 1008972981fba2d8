"""One request and one reply of the OpenAI chat protocol, as plain data: building, reading, judging failures.

Nothing here touches the network; `endpoint` does.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from postgrad.core.items import Message

LONGEST_WAIT_S = 600.0
"""A server that asks for more patience than this is not waited for; the same command continues later."""


@dataclass(frozen=True)
class Chat:
    """A request: messages, a limit on the reply and how to sample it."""

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 0.0
    """Below 0 = not sent, for models that refuse the setting."""
    top_logprobs: int = 0
    """Number of candidates of each token whose log-probability is wanted."""
    top_p: float = 1.0
    """Share of probability to sample from; 1 = not sent."""
    seed: int = -1
    """Seed of the sampling; below 0 = not sent. Requests that differ in nothing else are different requests."""

    @property
    def tokens_in(self) -> int:
        """Tokens of the request, at four characters each."""
        return count_tokens(self.messages)


@dataclass(frozen=True)
class Reply:
    """What came back, and what it took."""

    text: str
    first_token: dict[str, float]
    """Log-probabilities of the candidates for the first token; empty when the server gave none."""
    finish: str
    tokens_in: int
    tokens_out: int
    latency_s: float
    problem: str = ""
    """Why the server refused this one request; empty when it answered."""
    estimated: bool = False
    """The server gave no token counts; these are estimates."""


@dataclass(frozen=True)
class Trouble:
    """A failed attempt: what was found, whether another attempt may help, how long the server wants quiet."""

    what: str
    detail: str
    retry: bool
    wait_s: float = 0.0
    todo: str = ""
    unreachable: bool = False


@dataclass
class Ledger:
    """What asking has cost so far."""

    requests: int = 0
    """Replies that came over the network."""
    cached: int = 0
    """Replies found on disk."""
    retries: int = 0
    nonsense: int = 0
    """Replies that were not of the protocol, and were asked for again."""
    refused: int = 0
    """Requests the server would not answer, such as a conversation that is too long for its model."""
    estimated: int = 0
    """Replies without a token count; theirs is estimated from the characters."""
    damaged: int = 0
    """Files of the cache that could not be read, and were asked for again."""
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    """Cost of every reply this run uses, whenever it was paid."""
    paid_now: float = 0.0
    """The part of it that this process paid."""


class TokenBucket:
    """At most `per_minute` requests a minute, with a second's worth at once; 0 = no limit."""

    def __init__(self, per_minute: float) -> None:
        self.spacing = 60.0 / per_minute if per_minute else 0.0
        self.burst = max(1.0, per_minute / 60.0)
        self._full_at = 0.0  # when the bucket is full again; each request moves it by one spacing

    def wait(self, now: float) -> float:
        """Take a token and return the seconds to wait before using it."""
        self._full_at = max(self._full_at, now) + self.spacing
        return max(0.0, self._full_at - self.burst * self.spacing - now)


def count_tokens(messages: Sequence[Message]) -> int:
    """Estimate tokens as characters / 4, plus 4 a message for its frame."""
    return sum(len(message["content"]) // 4 + 4 for message in messages)


def parse_reply(content: bytes, messages: Sequence[Message], latency_s: float) -> Reply | None:
    """Read a chat completion; None when it is none.

    A completion without text (a refusal, or thoughts that used up the limit) is a reply with empty text.
    """
    try:
        data = json.loads(content)
        choice = data["choices"][0]
        text = choice["message"].get("content") or ""
        usage = data.get("usage") or {}
        tokens_in, tokens_out = usage.get("prompt_tokens"), usage.get("completion_tokens")
        first = _first_token(choice.get("logprobs"))
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    if not isinstance(text, str):
        return None
    text = text.encode(errors="replace").decode()  # half a surrogate pair is valid JSON but no text
    finish, latency_s = str(choice.get("finish_reason") or ""), round(latency_s, 3)
    if isinstance(tokens_in, int) and isinstance(tokens_out, int) and min(tokens_in, tokens_out) >= 0:
        return Reply(text, first, finish, tokens_in, tokens_out, latency_s)
    guess_in, guess_out = count_tokens(messages), len(text) // 4 + 1
    return Reply(text, first, finish, guess_in, guess_out, latency_s, estimated=True)


def _first_token(logprobs: Any) -> dict[str, float]:
    if not logprobs or not logprobs.get("content"):
        return {}
    pairs = [(str(c["token"]), float(c["logprob"])) for c in logprobs["content"][0]["top_logprobs"]]
    return {token: min(value, 0.0) for token, value in pairs if math.isfinite(value)}


def classify(status: int, headers: Mapping[str, str], text: str) -> Trouble:
    """Say what a status other than 200 means: wait and ask again, or stop and tell the user."""
    what, detail = f"status {status}", " ".join(text.split())[:300]
    if status in (401, 403):
        # The body may repeat parts of the key.
        todo = "see that the environment variable {key_env} holds a key that this server accepts"
        return Trouble(what, "the key was not accepted", retry=False, todo=todo)
    if status == 402 or (status == 429 and "insufficient_quota" in text):
        return Trouble(what, detail, retry=False, todo="top up the account, then run the same command again")
    if status == 404:
        todo = "see that endpoint.base_url ends in its version (/v1) and that the server has this model"
        return Trouble(what, detail, retry=False, todo=todo)
    if status in (408, 425, 429) or status >= 500:
        wait = retry_after(headers.get("retry-after", ""), datetime.now(UTC))
        if wait > LONGEST_WAIT_S:
            todo = f"the server wants {wait:.0f} s of quiet; run the same command again after that"
            return Trouble(what, detail, retry=False, todo=todo)
        return Trouble(what, detail, retry=True, wait_s=wait)
    return Trouble(what, detail, retry=False, todo="see that endpoint.base_url serves chat completions")


def retry_after(value: str, now: datetime) -> float:
    """Read a Retry-After header, seconds or a date, as seconds from now; 0 when it says nothing readable."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds())


def retry_delay(trouble: Trouble, attempt: int, jitter: float) -> float:
    """Return seconds before the next attempt: what the server asked for, else 0.5, 1, 2, ... up to 60.

    Args:    jitter: uniform in [0, 1); spreads clients by up to a half, so that they do not return together.
    """
    if trouble.wait_s:
        return trouble.wait_s * (1 + 0.1 * jitter)
    return float(min(60.0, 0.5 * 2**attempt)) * (0.5 + jitter)
