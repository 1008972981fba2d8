"""Short verifiable instructions: the data of the embedded default of `postgrad align`.

Every task is a line or two of plain letters with an answer that can be checked letter by letter. The
demonstrations are wrong on purpose, letter by letter, so that a policy trained on them knows the answer but
rarely gives it: what a judge, a reward model and 64 samples can then mend is measurable.

    copy lomak                      -> lomak
    reverse lomak                   -> kamol
    first of lomak 4 times          -> llll
    double mak                      -> mmaakk
    pick 5 from lomak               -> any five of its letters
    d and p in turn 5 times         -> dpdpd
    copy lomak / same again         -> lomak     (two turns; the first answer may be wrong)
    double mak / last 5 times       -> kkkkk
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from postgrad.core.files import atomic_path
from postgrad.errors import DataError

Message = dict[str, str]
Allowed = tuple[str, ...]  # the letters that are right at each position of the answer

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
CONSONANTS = "bdfghklmnprstvwz"
VOWELS = "aeiou"
SCHEMA = pa.schema([("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))])


@dataclass(frozen=True)
class Kind:
    """One kind of instruction: how to ask for it, how to recognise it, which letters are right."""

    name: str
    ask: Callable[[Random], tuple[str, ...]]
    """The user turns of a new task."""
    pattern: re.Pattern[str]
    """Matches the user turns joined by newlines."""
    allowed: Callable[[re.Match[str]], Allowed]
    """The letters allowed at each position of the answer."""


@dataclass(frozen=True, kw_only=True)
class TaskSizes:
    """Number of rows of each file written by `write_tasks`."""

    sft: int = 12000
    """Conversations with imperfect answers, for supervised finetuning."""
    candidates: int = 5000
    """Prompts whose answers the judge compares."""
    set: int = 1000
    """Prompts of the 64-response set."""
    held_out: int = 400
    """Prompts that no stage trains on."""


def word(rng: Random, length: int) -> str:
    """Return a pronounceable word: consonant and vowel in turn."""
    return "".join(rng.choice(VOWELS if i % 2 else CONSONANTS) for i in range(length))


def _kind(name: str, pattern: str, ask: Callable[[Random], tuple[str, ...]], allowed: Callable[..., Allowed]) -> Kind:
    """Build a kind whose `allowed` takes the groups of its pattern."""
    return Kind(name, ask, re.compile(pattern), lambda match: allowed(*match.groups()))


def _first_turn(rng: Random, operand: str) -> str:
    """Return an opening request about a word, for the kinds with two turns."""
    return f"{rng.choice(('copy', 'reverse'))} {operand}"


KINDS = (
    _kind("copy", r"copy ([a-z]+)", lambda r: (f"copy {word(r, r.randint(4, 6))}",), lambda w: tuple(w)),
    _kind("reverse", r"reverse ([a-z]+)", lambda r: (f"reverse {word(r, 5)}",), lambda w: tuple(w[::-1])),
    _kind(
        "repeat",
        r"first of ([a-z]+) ([4-8]) times",
        lambda r: (f"first of {word(r, 5)} {r.randint(4, 8)} times",),
        lambda w, n: (w[0],) * int(n),
    ),
    _kind(
        "double",
        r"double ([a-z]+)",
        lambda r: (f"double {word(r, r.randint(3, 4))}",),
        lambda w: tuple(letter for letter in w for _ in range(2)),
    ),
    _kind(
        "pick",
        r"pick ([4-8]) from ([a-z]+)",
        lambda r: (f"pick {r.randint(4, 8)} from {word(r, 5)}",),
        lambda n, w: (w,) * int(n),
    ),
    _kind(
        "turns",
        r"([a-z]) and ([a-z]) in turn ([4-8]) times",
        lambda r: (f"{' and '.join(r.sample(ALPHABET, 2))} in turn {r.randint(4, 8)} times",),
        lambda a, b, n: tuple((a, b)[i % 2] for i in range(int(n))),
    ),
    _kind(
        "again",
        r"(?:copy|reverse) ([a-z]+)\nsame again",
        lambda r: (_first_turn(r, word(r, 5)), "same again"),
        lambda w: tuple(w),
    ),
    _kind(
        "last",
        r"(?:copy|reverse) ([a-z]+)\nlast ([4-8]) times",
        lambda r: (_first_turn(r, word(r, 5)), f"last {r.randint(4, 8)} times"),
        lambda w, n: (w[-1],) * int(n),
    ),
)


def _find(messages: Sequence[Message]) -> tuple[Kind, Allowed]:
    """Return the kind of the last request and the letters allowed; a follow-up reads two turns."""
    turns = [message["content"] for message in messages if message["role"] == "user"]
    for text in (turns[-1:], turns[-2:]):
        for kind in KINDS:
            match = kind.pattern.fullmatch("\n".join(text))
            if match:
                return kind, kind.allowed(match)
    raise DataError(
        f"expected one of the built-in tasks ({', '.join(kind.name for kind in KINDS)}), found {turns[-1:]}; "
        "the rule judge scores only prompts made by write_tasks"
    )


def kind_of(messages: Sequence[Message]) -> str:
    """Return the name of the kind of task the conversation ends with."""
    return _find(messages)[0].name


def score(messages: Sequence[Message], response: str) -> float:
    """Return the share of right letters: right positions / max(length asked for, length given).

    Args:     messages: a conversation that ends with a user turn; its assistant turns do not matter.
    Returns:  a number in [0, 1]; 1 exactly when every letter is right and none is missing or too many.
    Raises:   DataError: the conversation is none of the built-in tasks.
    """
    allowed = _find(messages)[1]
    right = sum(letter in letters for letter, letters in zip(response, allowed, strict=False))
    return right / max(len(allowed), len(response))


def perfect_answer(messages: Sequence[Message], rng: Random) -> str:
    """Return an answer of score 1; where several letters are right, one at random."""
    return "".join(rng.choice(letters) for letters in _find(messages)[1])


def corrupt(messages: Sequence[Message], rng: Random, *, error: tuple[float, float], slip: float) -> str:
    """Return an answer in which each letter is wrong with a chance drawn once for the answer.

    Args:  error: lowest and highest chance of a wrong letter; a wrong letter is any of those not allowed.
           slip: chance of one letter too few or, as often, too many; so length says nothing.
    """
    allowed = _find(messages)[1]
    chance = rng.uniform(*error)
    letters = [
        rng.choice([c for c in ALPHABET if c not in right] if rng.random() < chance else right) for right in allowed
    ]
    if rng.random() < slip:
        letters = letters[:-1] if rng.random() < 0.5 else [*letters, rng.choice(ALPHABET)]
    return "".join(letters)


def make_prompt(rng: Random, *, error: tuple[float, float], slip: float) -> list[Message]:
    """Return a random task, ending with the user; earlier answers are as imperfect as the demonstrations."""
    messages: list[Message] = []
    for turn in rng.choice(KINDS).ask(rng):
        if messages:
            messages.append({"role": "assistant", "content": corrupt(messages, rng, error=error, slip=slip)})
        messages.append({"role": "user", "content": turn})
    return messages


def _key(messages: Sequence[Message]) -> tuple[str, ...]:
    """Return what makes two prompts the same task: the user's turns, whatever was answered between them."""
    return tuple(message["content"] for message in messages if message["role"] == "user")


def write_tasks(
    folder: Path, seed: int, sizes: TaskSizes, *, error: tuple[float, float] = (0.1, 0.7), slip: float = 0.1
) -> dict[str, Path]:
    """Write sft, candidates, set and held_out parquet files; the same arguments give the same bytes.

    No prompt of one file is in another. Conversations of sft end with an imperfect answer, the other files
    with the user's turn, and hold a prompt once.

    Args:     error, slip: how imperfect the answers are, see `corrupt`.
    Returns:  the path of each file by its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[tuple[str, ...]] = set()
    paths = {}
    for name, size in (("held_out", sizes.held_out), ("set", sizes.set), ("candidates", sizes.candidates)):
        rng = Random(hashlib.sha256(f"{seed} {name}".encode()).digest())
        rows: list[list[Message]] = []
        while len(rows) < size:
            messages = make_prompt(rng, error=error, slip=slip)
            if _key(messages) not in taken:
                taken.add(_key(messages))
                rows.append(messages)
        paths[name] = _write(folder / f"{name}.parquet", rows)
    rng = Random(hashlib.sha256(f"{seed} sft".encode()).digest())
    rows = []
    while len(rows) < sizes.sft:
        messages = make_prompt(rng, error=error, slip=slip)
        if _key(messages) not in taken:
            answer = corrupt(messages, rng, error=error, slip=slip)
            rows.append([*messages, {"role": "assistant", "content": answer}])
    paths["sft"] = _write(folder / "sft.parquet", rows)
    return paths


def _write(path: Path, rows: list[list[Message]]) -> Path:
    """Write conversations as one parquet file."""
    with atomic_path(path) as temporary:
        pq.write_table(pa.table({"messages": rows}, schema=SCHEMA), temporary)
    return path
