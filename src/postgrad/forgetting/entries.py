"""What a ledger holds: the body of each kind of entry, and the chain of hashes that holds the entries together.

An entry is {index, previous, time, kind, body, hash}; `hash` is the SHA-256 of the canonical JSON of all the rest and
`previous` the hash of the entry before. A body holds hashes, counts, figures and names of layers: no image, and no
name of a class, which may be a person's.
"""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from functools import cache
from typing import Any, Literal, NamedTuple, get_type_hints

from postgrad.core.config import nearest
from postgrad.errors import ArtefactError

GENESIS = "0" * 64
"""What the first entry has for a hash before it."""
HASH = re.compile(r"[0-9a-f]{64}")
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
METRIC = re.compile(r"[a-z][a-z0-9_]*")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
ENTRY_KEYS = ("index", "previous", "time", "kind", "body", "hash")


class Finding(NamedTuple):
    """Something that is not as it must be."""

    place: str
    field: str
    expected: str
    found: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        """Say it in one sentence."""
        return f"{self.place}: {self.field}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, kw_only=True)
class BaseBody:
    """The model that all requests start from."""

    name: str
    base_hash: str
    """Of the tensors' hashes by name."""
    record_hash: str
    """Of the bytes of base.json."""
    num_tensors: int
    num_classes: int
    code_version: str


@dataclass(frozen=True, kw_only=True)
class ApplyBody:
    """A request that was carried out."""

    request: str
    request_hash: str
    class_prints: tuple[str, ...]
    """Salted hashes of the names of forgotten classes."""
    num_samples: int
    """Images that the request names one by one."""
    num_forget: int
    num_retain: int
    manifest_hash: str
    """Of the sorted, salted hashes of the images to forget."""
    config_hash: str
    code_version: str
    seed: int
    hardware: str
    base_name: str
    base_hash: str
    num_blocks: int
    blocks: tuple[str, ...]
    """Those that were changed."""
    tensors: tuple[str, ...]
    """Those whose effect is changed."""
    num_identical: int
    identical_hash: str
    """Of the hashes by name of all tensors that are bit for bit those of the base."""
    adapter_files: dict[str, str]
    """Name -> SHA-256 of each file in the request's folder."""
    metrics: dict[str, float]
    """What was measured; `x_low` and `x_high` are the interval of `x`. What was not measured is left out."""
    policy: dict[str, float]
    """The limits in force."""


@dataclass(frozen=True, kw_only=True)
class VerifyBody:
    """A check of the whole service."""

    base_hash: str
    num_requests: int
    num_findings: int
    metrics: dict[str, float]
    code_version: str


@dataclass(frozen=True, kw_only=True)
class RevokeBody:
    """A request whose adapter is taken out of use."""

    request: str
    base_hash: str
    bit_exact: bool
    """Outputs equal, bit for bit, those of a model that never had the adapter."""
    metrics: dict[str, float]
    code_version: str


@dataclass(frozen=True, kw_only=True)
class BakeBody:
    """Requests whose adapters became part of a new base."""

    requests: tuple[str, ...]
    base_hash: str
    new_base_hash: str
    record_hash: str
    """Of the bytes of the new base.json."""
    num_tensors: int
    metrics: dict[str, float]
    code_version: str


@dataclass(frozen=True, kw_only=True)
class PurgeBody:
    """The data of a request, deleted."""

    request: str
    manifest_hash: str
    num_files: int
    code_version: str


Body = BaseBody | ApplyBody | VerifyBody | RevokeBody | BakeBody | PurgeBody
BODIES: dict[str, type[Body]] = {
    "base": BaseBody,
    "apply": ApplyBody,
    "verify": VerifyBody,
    "revoke": RevokeBody,
    "bake": BakeBody,
    "purge": PurgeBody,
}


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    index: int
    previous: str
    time: str
    body: Body
    hash: str

    @property
    def kind(self) -> str:
        """Name the body's kind."""
        return next(kind for kind, cls in BODIES.items() if isinstance(self.body, cls))


def canonical(value: object) -> bytes:
    """Write a JSON value in the one way that is hashed: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def digest(value: object) -> str:
    """Hash a JSON value: the SHA-256 of its canonical form, 64 hex digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


def make_entry(index: int, previous: str, time: str, body: Body) -> Entry:
    """Make an entry with its hash.

    Raises:  ArtefactError: the body cannot be recorded; with the field.
    """
    kind = next(kind for kind, cls in BODIES.items() if isinstance(body, cls))
    table = {"index": index, "previous": previous, "time": time, "kind": kind, "body": asdict(body)}
    if problem := _body_problem("new entry", kind, json.loads(json.dumps(table["body"]))):
        raise ArtefactError(f"{problem}. Mend what is recorded; nothing was written.")
    return Entry(index, previous, time, body, digest(table))


def entry_line(entry: Entry) -> bytes:
    """Write an entry as its line, without the newline."""
    return canonical({**vars(entry), "kind": entry.kind, "body": asdict(entry.body)})


def read_entry(line: bytes) -> Entry:
    """Read a line in which `entry_problem` found nothing wrong."""
    table = json.loads(line)
    cls = BODIES[table.pop("kind")]
    body: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in table.pop("body").items()
    }
    return Entry(body=cls(**body), **table)


def entry_problem(line: bytes, index: int, previous: str, file: str) -> Finding | None:
    """Say what is wrong with a line in its place; None if nothing is.

    Args:  previous: the hash of the entry before.  file: its name, for the finding.
    """
    place = f"{file}, entry {index}"
    try:
        table = json.loads(line)
    except ValueError as error:
        return Finding(place, "line", "one JSON object", f"{line[:60]!r} ({error})")
    if not isinstance(table, dict) or set(table) != set(ENTRY_KEYS):
        found = ", ".join(table) if isinstance(table, dict) else type(table).__name__
        return Finding(place, "line", f"an object of {', '.join(ENTRY_KEYS)}", found)
    kind = str(table["kind"])
    place = f"{place} ({kind})"
    if type(table["index"]) is not int or table["index"] != index:
        return Finding(place, "index", f"{index}, its place in the file", repr(table["index"]))
    if table["previous"] != previous:
        return Finding(place, "previous", f"{previous}, the hash of the entry before", str(table["previous"]))
    if not is_time(table["time"]):
        return Finding(place, "time", "a time such as 2026-05-12T09:14:00Z", repr(table["time"]))
    if kind not in BODIES:
        return Finding(place, "kind", f"one of {', '.join(BODIES)}", repr(table["kind"]))
    return _body_problem(place, kind, table["body"]) or _hash_problem(place, line, table)


def _hash_problem(place: str, line: bytes, table: dict[str, Any]) -> Finding | None:
    """Compare the hash with the content, and the line with its canonical form."""
    actual = digest({key: value for key, value in table.items() if key != "hash"})
    if table["hash"] != actual:
        return Finding(place, "hash", f"{actual}, that of time, kind and body as they stand", str(table["hash"]))
    if canonical(table) != line:
        return Finding(place, "line", "JSON in canonical form", "other spaces, order or a key that stands twice")
    return None


def _body_problem(place: str, kind: str, body: object) -> Finding | None:
    """Say which field of a body has no such name, is missing or holds what it may not."""
    hints = _hints(kind)
    if not isinstance(body, dict):
        return Finding(place, "body", "an object", type(body).__name__)
    for name in body:
        if name not in hints:
            guess = nearest(name, hints)
            return Finding(place, f"body.{name}", f"'{guess}'" if guess else ", ".join(hints), "an unknown field")
    for field in fields(BODIES[kind]):
        if field.name not in body:
            return Finding(place, f"body.{field.name}", "a value", "none")
        if expected := _misfit(field.name, body[field.name], hints[field.name]):
            return Finding(place, f"body.{field.name}", expected, repr(body[field.name])[:120])
    return None


@cache
def _hints(kind: str) -> dict[str, Any]:
    """Look the types of a body's fields up, once: it is slow."""
    return get_type_hints(BODIES[kind])


def _misfit(name: str, value: object, hint: object) -> str:
    """Say what was expected of a field; "" if its value fits."""
    if hint == tuple[str, ...]:
        rule = {"requests": REQUEST_ID, "class_prints": HASH}.get(name)
        fits = isinstance(value, list) and all(isinstance(item, str) and _matches(rule, item) for item in value)
        return "" if fits else f"a list of {_NOUNS.get(rule, 'texts')}"
    if hint == dict[str, str]:
        fits = isinstance(value, dict) and all(isinstance(v, str) and HASH.fullmatch(v) for v in value.values())
        return "" if fits else "a SHA-256 for each name"
    if hint == dict[str, float]:
        fits = isinstance(value, dict) and all(METRIC.fullmatch(k) and _is_finite(v) for k, v in value.items())
        return "" if fits else "finite numbers under lower-case names (leave out what was not measured)"
    rule = REQUEST_ID if name == "request" else HASH if name.endswith("_hash") else None
    if type(value) is not hint or (isinstance(value, str) and not _matches(rule, value)):
        return _NOUNS.get(rule) or {int: "a whole number", bool: "true or false", str: "text"}[hint]  # type: ignore[index]
    negative = type(value) is int and value < 0 and name != "seed"
    return "a count" if negative else ""


_NOUNS: dict[re.Pattern[str] | None, str] = {HASH: "SHA-256 in hex digits", REQUEST_ID: "ids of requests"}


def _matches(rule: re.Pattern[str] | None, text: str) -> bool:
    return rule is None or rule.fullmatch(text) is not None


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_time(text: object) -> bool:
    """Tell whether a text is a time of the ledger: UTC, to the second."""
    if not isinstance(text, str) or not TIME.fullmatch(text):
        return False
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
