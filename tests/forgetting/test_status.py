"""How things stand: who, when, and what became of each request, from the ledger alone."""

from pathlib import Path

from forgotten import forgotten
from services import bake_entry, make_service, make_single, request

from postgrad.forgetting.ledger import current_base
from postgrad.forgetting.status import NONE, standing_lines, standing_table, standings

ASKED_BY = request("2041").requester_hash[:8]


def test_each_request_has_its_state_and_times(tmp_path: Path) -> None:
    """The clock goes a minute further with each entry: base 9:14, both requests, revocation, purge."""
    make_service(tmp_path)
    first, second = standings(tmp_path)
    assert first == (
        "2041", ASKED_BY, "2026-05-12 09:15", "2 classes, 284 images", "revoked", "2026-05-12 09:17", "2 of 4",
        "2026-05-12 09:18",
    )  # fmt: skip
    assert second[2:] == ("2026-05-12 09:16", "1 class, 284 images", "active", "2026-05-12 09:16", "1 of 4", NONE)
    table = standing_table(tmp_path)
    assert table.rows == (first, second) and len(table.columns) == len(first)
    assert standing_lines(tmp_path) == {
        "service, 2041": f"revoked since 2026-05-12 09:17; 2 classes, 284 images; blocks 2 of 4; asked by {ASKED_BY}; "
        "data deleted 2026-05-12 09:18",
        "service, 2042": f"active since 2026-05-12 09:16; 1 class, 284 images; blocks 1 of 4; asked by {ASKED_BY}",
    }


def test_baked_and_single_ones_are_named(tmp_path: Path) -> None:
    ledger = make_single(tmp_path)
    assert standings(tmp_path)[0].what == "24 single images"
    ledger.append(bake_entry(current_base(ledger.entries()).base_hash, "2043"))
    (only,) = standings(tmp_path)
    assert (only.state, only.since, only.carried_out) == ("baked", "2026-05-12 09:16", "2026-05-12 09:15")


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    service = forgotten(tmp_path).service
    (service / "adapters/first/request.json").write_text("{", encoding="utf-8")
    first, second = standings(service)
    assert first.asked_by == "unreadable" and second.asked_by == NONE and first.state == "frozen"
    assert first.since == second.since or first.since <= second.since
