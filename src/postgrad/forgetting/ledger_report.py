"""What a ledger says, as parts of a report: limits of the policy, revocations."""

from collections.abc import Sequence

from postgrad.core.report import Note, Section, Table
from postgrad.forgetting.entries import ApplyBody, Entry, RevokeBody
from postgrad.forgetting.policy import Verdict, judge, read_limits


def verdicts(entries: Sequence[Entry]) -> list[tuple[str, Verdict]]:
    """Hold every request against the limits that were in force."""
    bodies = [entry.body for entry in entries if isinstance(entry.body, ApplyBody)]
    return [(body.request, verdict) for body in bodies for verdict in judge(read_limits(body.policy), body.metrics)]


def limits_table(entries: Sequence[Entry], note: str = "") -> Table:
    """Show what the policy asks and what was found."""
    rows = tuple(
        (request, verdict.name, verdict.limit, "–" if verdict.found is None else verdict.found, verdict.outcome)
        for request, verdict in verdicts(entries)
    )
    return Table("Limits of the policy", ("request", "limit", "allowed", "found", "outcome"), rows, note)


def revocation_notes(entries: Sequence[Entry], what: str = "model") -> list[Section]:
    """Say of each request that was revoked whether nothing of it was left.

    Args: what: the network is.
    """
    never = f"those of a {what} that never had its adapter"
    return [
        Note(
            f"Request {body.request} was revoked",
            f"The outputs equal, bit for bit, {never}."
            if body.bit_exact
            else f"The outputs differ from {never}: do not rely on the revocation.",
            "good" if body.bit_exact else "warning",
        )
        for body in (entry.body for entry in entries)
        if isinstance(body, RevokeBody)
    ]
