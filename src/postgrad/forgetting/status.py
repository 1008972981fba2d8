"""How things stand in a service: each request, who asked, when it was carried out, and what became of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from postgrad.core.sections import Table
from postgrad.errors import UserError
from postgrad.forgetting.entries import ApplyBody, BakeBody, Entry, PurgeBody, RevokeBody
from postgrad.forgetting.ledger import Ledger, states
from postgrad.forgetting.policy import SINGLE
from postgrad.forgetting.request import read_request

NUM_DIGITS = 8
"""Of a hash that stands for a person."""
NONE = "–"


class Standing(NamedTuple):
    """How things stand with one request."""

    request: str
    asked_by: str
    """First digits of the requester's hash, which is in the request's own file."""
    carried_out: str
    what: str
    state: str
    since: str
    """When the state began."""
    blocks: str
    purged: str
    """When its data were deleted."""


def standings(folder: Path) -> list[Standing]:
    """List the requests of a service in order of their application.

    Raises:  ArtefactError: the ledger is not sound.
    """
    entries = Ledger(folder).entries()
    since, purged = _times(entries)
    found = states(entries)
    return [
        Standing(
            request=entry.body.request,
            asked_by=_asked_by(folder, entry.body.request),
            carried_out=_minute(entry.time),
            what=_what(entry.body),
            state=found[entry.body.request],
            since=_minute(since[entry.body.request]),
            blocks=f"{len(entry.body.blocks)} of {entry.body.num_blocks}",
            purged=_minute(purged.get(entry.body.request, NONE)),
        )
        for entry in entries
        if isinstance(entry.body, ApplyBody)
    ]


def standing_table(folder: Path) -> Table:
    """Show the requests of a service."""
    columns = ("request", "asked by", "carried out", "what", "state", "since", "blocks changed", "data deleted")
    note = (
        "Active: in use, the last one. Frozen: in use, and others were learnt on top of it. Revoked: out of use. "
        "Baked: part of the base. Asked by: first digits of the requester's hash. Times in UTC."
    )
    return Table("Requests of the service", columns, tuple(standings(folder)), note)


def standing_lines(folder: Path) -> dict[str, str]:
    """Say the same in a line a request, for a plan."""
    return {
        f"service, {each.request}": f"{each.state} since {each.since}; {each.what}; blocks {each.blocks}; asked by "
        f"{each.asked_by}" + ("" if each.purged == NONE else f"; data deleted {each.purged}")
        for each in standings(folder)
    }


def _times(entries: list[Entry]) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Say when the state of each request began, and when its data were deleted."""
    since: dict[str, str] = {}
    purged: dict[str, str] = {}
    for entry in entries:
        match entry.body:
            case ApplyBody(request=request):
                before = states(entries[: entry.index])
                since |= {name: entry.time for name, state in before.items() if state == "active"}
                since[request] = entry.time
            case RevokeBody(request=request):
                since[request] = entry.time
            case BakeBody(requests=requests):
                since |= dict.fromkeys(requests, entry.time)
            case PurgeBody(request=request):
                purged[request] = entry.time
            case _:
                pass
    return since, purged


def _asked_by(folder: Path, request: str) -> str:
    """Read who asked from the request's own file; where it cannot be read, verification says why."""
    try:
        asked = read_request(folder / "adapters" / request / "request.json")
    except UserError:
        return "unreadable"
    return asked.requester_hash[:NUM_DIGITS] or NONE


def _minute(time: str) -> str:
    """Leave the seconds of a time out."""
    return time[:16].replace("T", " ")


def _what(body: ApplyBody) -> str:
    """Count what was forgotten."""
    num = len(body.class_prints)
    if num:
        return f"{num} {'class' if num == 1 else 'classes'}, {body.num_forget} images"
    kind = "single images" if SINGLE in body.metrics else "rows"
    return f"{body.num_forget} {kind}"
