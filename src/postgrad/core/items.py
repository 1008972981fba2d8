"""What every loader hands on: conversations, prompts, preference pairs, response sets."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""
ROLES = ("system", "user", "assistant")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """A conversation to imitate; it ends with the assistant."""

    id: str
    messages: tuple[Message, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer; it ends with the user."""

    id: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt and which is better."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    p: float = 1.0
    """Probability that chosen is the better one."""
    margin: float = 0.0
    turn: int = 1
    """Which answer of the conversation this is, from 1."""


@dataclass(frozen=True)
class ResponseSet:
    """Many answers to one prompt, with their scores if there are any (as many as answers, or none)."""

    id: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Loaded(Generic[Item]):
    """Items and where the others went: counts of rows read, kept, and dropped for each reason."""

    items: list[Item]
    counts: dict[str, int]

    def __iter__(self) -> Iterator[Any]:
        """Unpack as ``items, counts``."""
        return iter((self.items, self.counts))


def content_hash(value: object) -> str:
    """Hash a JSON value: 16 hex digits, the same in every process and for any order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def prompt_id(messages: Sequence[Message]) -> str:
    """Name a prompt by the hash of its messages."""
    return content_hash(list(messages))


def prompt_problem(messages: Sequence[Message]) -> str:
    """Say why messages cannot be a prompt: "" when they can."""
    return _problem(messages) or ("" if messages[-1]["role"] == "user" else "ends with the assistant")


def conversation_problem(messages: Sequence[Message]) -> str:
    """Say why messages cannot be learnt from: "" when they can."""
    return _problem(messages) or ("" if messages[-1]["role"] == "assistant" else "ends with the user")


def _problem(messages: Sequence[Message]) -> str:
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        return "no messages"
    for number, message in enumerate(turns):
        if message["role"] not in ROLES:
            return f"unknown role {message['role']!r}"
        if message["role"] != ("user", "assistant")[number % 2]:
            return "turns do not alternate user, assistant"
        if not message["content"].strip():
            return "empty response" if message["role"] == "assistant" else "empty message"
    return ""
