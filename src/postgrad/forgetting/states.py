"""In what state each request is, as it follows from the ledger's entries.

base ─ apply ─> active ─ another apply ─> frozen          both in use; a frozen one trains no more
                active, frozen ─ revoke ─> revoked        the others stay; the id is not used again
                active, frozen ─ bake ───> baked          part of a new base, which cannot be undone
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from postgrad.core.config import nearest
from postgrad.errors import ArtefactError
from postgrad.forgetting.entries import ApplyBody, BakeBody, BaseBody, Entry, PurgeBody, RevokeBody, VerifyBody

State = Literal["active", "frozen", "revoked", "baked"]


@dataclass
class _Book:
    """What is known after some entries."""

    states: dict[str, State] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)
    purged: set[str] = field(default_factory=set)
    base: str = ""


def states(entries: Iterable[Entry]) -> dict[str, State]:
    """Follow the entries and give the state of each request, in order of application.

    Raises:  ArtefactError: an entry that cannot follow: a request applied twice, a request that is not there, one
             revoked or baked twice (its adapter would be merged twice), or work on another base.
    """
    book = _Book()
    for entry in entries:
        if problem := _follow(book, entry):
            raise ArtefactError(f"entry {entry.index} ({entry.kind}): {problem}")
    return book.states


def _follow(book: _Book, entry: Entry) -> str:
    """Enter one entry into the book, or say why it cannot follow."""
    body = entry.body
    if isinstance(body, BaseBody) != (entry.index == 0):
        return "the first entry, and no other, must be the base. Begin a new service folder for another base."
    if isinstance(body, BaseBody):
        book.base = body.base_hash
        return ""
    if not isinstance(body, PurgeBody) and body.base_hash != book.base:
        return f"expected the base {book.base[:16]}, found {body.base_hash[:16]}. Use the base the ledger names."
    match body:
        case ApplyBody():
            return _follow_apply(book, body)
        case RevokeBody():
            return _leave(book, body.request, "revoked")
        case BakeBody():
            book.base = body.new_base_hash
            problems = (_leave(book, name, "baked") for name in body.requests)
            return next(filter(None, problems), "") if body.requests else "expected requests to bake, found none."
        case PurgeBody():
            return _follow_purge(book, body)
        case VerifyBody():
            return ""


def _follow_apply(book: _Book, body: ApplyBody) -> str:
    if body.request in book.states:
        state = book.states[body.request]
        return f"request '{body.request}' was applied before and is {state}. Give the new request an id of its own."
    for name, state in book.states.items():
        book.states[name] = "frozen" if state == "active" else state
    book.states[body.request] = "active"
    book.manifests[body.request] = body.manifest_hash
    return ""


def _leave(book: _Book, name: str, to: State) -> str:
    """Take a request out of use."""
    state = book.states.get(name)
    if state is None:
        return _absent(book, name)
    if state == "baked":
        again = " A second merge would add its change twice." if to == "baked" else ""
        return f"request '{name}' is baked into the base and cannot be {to}.{again}"
    if state == "revoked":
        return f"request '{name}' is revoked already and cannot be {to}. Apply it anew under another id."
    book.states[name] = to
    return ""


def _follow_purge(book: _Book, body: PurgeBody) -> str:
    if body.request not in book.states:
        return _absent(book, body.request)
    if body.request in book.purged:
        return f"the data of request '{body.request}' were purged before."
    if body.manifest_hash != book.manifests[body.request]:
        return f"these are not the data of request '{body.request}': the manifest hash is another."
    book.purged.add(body.request)
    return ""


def _absent(book: _Book, name: str) -> str:
    guess = nearest(name, book.states)
    known = f" Nearest is '{guess}'." if guess else f" Known: {', '.join(book.states) or 'none'}."
    return f"no request '{name}' was applied.{known}"
