"""The ledger: what is written stays, any edit is found, and no writer's death or company harms it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from services import SALT, base_entry, make_service, revoke_entry, tick
from tampering import changed, keys, leaves, name, without

from postgrad.errors import ArtefactError
from postgrad.forgetting import ledger as module
from postgrad.forgetting.entries import GENESIS, canonical, digest
from postgrad.forgetting.ledger import BaseState, Ledger, current_base, states, write_base

FIRST = base_entry(BaseState(digest("base"), digest("record")))

with TemporaryDirectory() as _folder:
    LINES = [*make_service(Path(_folder)).path.read_bytes().splitlines()]
    HEAD = (Path(_folder) / "ledger.head").read_bytes()
ENTRIES = [json.loads(line) for line in LINES]
IN_ENTRIES = [(index, path) for index, entry in enumerate(ENTRIES) for path in leaves(entry)]
KEYS = [(index, path) for index, entry in enumerate(ENTRIES) for path in keys(entry)]


def place(value: tuple[int, Any]) -> str:
    return f"{value[0]}.{name(value[1])}"


def lay(folder: Path, lines: list[bytes], head: bytes | None = HEAD, end: bytes = b"\n") -> Ledger:
    """Write a ledger as it may be found."""
    (folder / "ledger.jsonl").write_bytes(b"\n".join(lines) + end)
    if head is not None:
        (folder / "ledger.head").write_bytes(head)
    return Ledger(folder)


def refused(ledger: Ledger) -> str:
    """Check that nothing accepts the ledger, and give the message."""
    (problem, *_) = ledger.problems()
    assert problem.severity == "error"
    before = ledger.path.read_bytes()
    with pytest.raises(ArtefactError) as caught:
        ledger.append(revoke_entry("2042", digest("base")))
    assert ledger.path.read_bytes() == before, "evidence stays"
    with pytest.raises(ArtefactError, match="altered or damaged"):
        Ledger.open(ledger.folder)
    assert str(problem) in str(caught.value)
    return str(problem)


def test_entries_come_back_in_order(tmp_path: Path) -> None:
    ledger = make_service(tmp_path)
    entries = Ledger.open(tmp_path).entries()
    assert [entry.kind for entry in entries] == ["base", "apply", "apply", "revoke", "purge", "verify"]
    assert [entry.index for entry in entries] == list(range(6)) and ledger.problems() == []
    assert [entry.previous for entry in entries] == [GENESIS, *(entry.hash for entry in entries[:-1])]
    assert entries[0].time == "2026-05-12T09:14:00Z" and entries[1].time == "2026-05-12T09:15:00Z"
    assert states(entries) == {"2041": "revoked", "2042": "active"}
    head = {"num_entries": 6, "hash": entries[-1].hash}
    assert (tmp_path / "ledger.head").read_bytes() == canonical(head) + b"\n"


def test_the_same_entries_at_the_same_times_are_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        make_service(tmp_path / folder)
    assert (tmp_path / "a/ledger.jsonl").read_bytes() == (tmp_path / "b/ledger.jsonl").read_bytes()


def test_it_tells_the_time(tmp_path: Path) -> None:
    assert Ledger.open(tmp_path).append(FIRST).time.startswith("20")


def test_no_name_of_a_class_or_person_is_in_it(tmp_path: Path) -> None:
    text = make_service(tmp_path).path.read_text()
    assert "consent" not in text and "GDPR" not in text and SALT not in text


def test_the_base_in_use(tmp_path: Path) -> None:
    base = write_base(tmp_path, "m", {"b": "2", "a": "1"}, ("x",))
    assert json.loads((tmp_path / "base.json").read_text())["classes"] == ["x"]
    assert base.base_hash == digest({"a": "1", "b": "2"})
    with pytest.raises(ArtefactError, match="the ledger is empty"):
        current_base(Ledger.open(tmp_path).entries())


@pytest.mark.parametrize("where", IN_ENTRIES, ids=place)
def test_any_value_changed_is_found(tmp_path: Path, where: tuple[int, Any]) -> None:
    index, path = where
    altered = changed(ENTRIES[index], path)
    assert altered != ENTRIES[index]
    message = refused(lay(tmp_path, [*LINES[:index], canonical(altered), *LINES[index + 1 :]]))
    assert f"entry {index}" in message


@pytest.mark.parametrize("where", [w for w in IN_ENTRIES if w[1] != ("hash",)], ids=place)
def test_any_value_changed_with_its_hash_is_found(tmp_path: Path, where: tuple[int, Any]) -> None:
    """The next entry, or the head, still holds the old hash."""
    index, path = where
    altered = changed(ENTRIES[index], path)
    altered["hash"] = digest({key: value for key, value in altered.items() if key != "hash"})
    refused(lay(tmp_path, [*LINES[:index], canonical(altered), *LINES[index + 1 :]]))


@pytest.mark.parametrize("where", KEYS, ids=place)
def test_any_key_taken_out_is_found(tmp_path: Path, where: tuple[int, Any]) -> None:
    index, path = where
    altered = canonical(without(ENTRIES[index], path))
    assert f"entry {index}" in refused(lay(tmp_path, [*LINES[:index], altered, *LINES[index + 1 :]]))


@pytest.mark.parametrize("index", range(len(LINES)))
def test_an_entry_deleted_doubled_or_moved_is_found(tmp_path: Path, index: int) -> None:
    refused(lay(tmp_path, LINES[:index] + LINES[index + 1 :]))
    refused(lay(tmp_path, [*LINES[: index + 1], *LINES[index:]]))
    moved = LINES[:index] + LINES[index + 1 :]
    for other in set(range(len(LINES))) - {index}:
        refused(lay(tmp_path, [*moved[:other], LINES[index], *moved[other:]]))


@pytest.mark.parametrize("num", range(len(LINES)))
def test_entries_taken_off_the_end_are_found(tmp_path: Path, num: int) -> None:
    message = refused(lay(tmp_path, LINES[:num], end=b"\n" if num else b""))
    assert message.startswith(f"ledger.head: num_entries: expected {num}")


@pytest.mark.parametrize("cut", [1, 2, 50, len(LINES[-1]), len(LINES[-1]) + 1])
def test_bytes_taken_off_the_end_are_found(tmp_path: Path, cut: int) -> None:
    data = b"\n".join(LINES) + b"\n"
    lay(tmp_path, LINES)
    (tmp_path / "ledger.jsonl").write_bytes(data[:-cut])
    refused(Ledger(tmp_path))


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"[]",
        b'{"num_entries":6}',
        HEAD.replace(b":6", b":7"),
        HEAD.replace(b":6", b":5"),
        HEAD.replace(b":6", b":1"),
        HEAD.replace(b":6", b":6.0"),
        HEAD.replace(b":6", b": 6"),
        HEAD.strip(),
        canonical({"num_entries": 6, "hash": digest("x")}) + b"\n",
        canonical({"num_entries": 3, "hash": ENTRIES[2]["hash"]}) + b"\n",
        canonical({"num_entries": -1, "hash": ENTRIES[-1]["hash"]}) + b"\n",
        None,
    ],
)
def test_a_head_that_is_another_is_found(tmp_path: Path, head: bytes | None) -> None:
    assert "ledger.head" in refused(lay(tmp_path, LINES, head))


def test_a_ledger_taken_away_is_found(tmp_path: Path) -> None:
    (tmp_path / "ledger.head").write_bytes(HEAD)
    with pytest.raises(ArtefactError, match=r"ledger.head: num_entries: expected 0"):
        Ledger.open(tmp_path)


def test_what_cannot_follow_is_not_written(tmp_path: Path) -> None:
    ledger = make_service(tmp_path)
    before = ledger.path.read_bytes(), (tmp_path / "ledger.head").read_bytes()
    base = current_base(ledger.entries()).base_hash
    for body, message in (
        (revoke_entry("2041", base), "'2041' is revoked already"),
        (revoke_entry("2043", base), r"no request '2043' was applied. Nearest is '204"),
        (revoke_entry("2042", digest("other")), "expected the base"),
        (FIRST, "the first entry, and no other"),
    ):
        with pytest.raises(ArtefactError, match=message):
            ledger.append(body)
    assert before == (ledger.path.read_bytes(), (tmp_path / "ledger.head").read_bytes())


def test_a_chain_that_is_whole_but_cannot_have_happened_is_refused(tmp_path: Path) -> None:
    """Somebody who recomputes every hash can still not revoke a request twice."""
    entry = {**ENTRIES[3], "index": 6, "previous": ENTRIES[5]["hash"]}
    entry["hash"] = digest({key: value for key, value in entry.items() if key != "hash"})
    head = canonical({"num_entries": 7, "hash": entry["hash"]}) + b"\n"
    with pytest.raises(ArtefactError, match=r"ledger.jsonl, entry 6 \(revoke\): request '2041' is revoked already"):
        Ledger.open(lay(tmp_path, [*LINES, canonical(entry)], head).folder)


def test_a_half_line_of_a_killed_writer_is_dropped(tmp_path: Path) -> None:
    ledger = lay(tmp_path, LINES, end=b'\n{"body":{"ba')
    (warning,) = ledger.problems()
    assert warning.severity == "warning" and "half a line of 12 bytes" in warning.found
    assert len(Ledger.open(tmp_path).entries()) == 6
    base = current_base(ledger.entries()).base_hash
    ledger.append(revoke_entry("2042", base))
    assert ledger.path.read_bytes().startswith(b"\n".join(LINES) + b"\n{") and ledger.problems() == []
    assert len(ledger.entries()) == 7


def test_a_head_of_a_killed_writer_is_one_behind_and_mended(tmp_path: Path) -> None:
    behind = canonical({"num_entries": 5, "hash": ENTRIES[4]["hash"]}) + b"\n"
    ledger = lay(tmp_path, LINES, behind)
    assert ledger.problems() == [] and len(ledger.entries()) == 6
    ledger.append(revoke_entry("2042", current_base(ledger.entries()).base_hash))
    assert json.loads((tmp_path / "ledger.head").read_text())["num_entries"] == 7 and len(ledger.entries()) == 7


SCRIPT = """
import os, signal, sys
from pathlib import Path
from postgrad.forgetting.entries import VerifyBody, digest
from postgrad.forgetting import ledger as module
ledger = module.Ledger(Path(sys.argv[1]))
body = VerifyBody(base_hash=sys.argv[2], num_requests=0, num_findings=0, metrics={}, code_version="1.0")
"""
DEATHS = {
    "half a line": """
write = os.write
def die(handle, data):
    write(handle, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
module.os.write = die
ledger.append(body)
""",
    "before the head": """
calls = []
def die(path, text):
    os.kill(os.getpid(), signal.SIGKILL)
module.write_text = die
ledger.append(body)
""",
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_writer_killed_at_work_leaves_a_sound_ledger(tmp_path: Path, death: str) -> None:
    ledger = make_service(tmp_path)
    base = current_base(ledger.entries()).base_hash
    command = [sys.executable, "-c", SCRIPT + DEATHS[death], str(tmp_path), base]
    assert subprocess.run(command, env={**os.environ}, check=False).returncode == -signal.SIGKILL
    num = 6 if death == "half a line" else 7
    assert len(Ledger.open(tmp_path).entries()) == num
    ledger.append(revoke_entry("2042", base))
    assert len(ledger.entries()) == num + 1 and ledger.problems() == []


def test_writers_take_turns(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path)
    ledger.append(FIRST)
    code = SCRIPT + "for _ in range(8): ledger.append(body)"
    command = [sys.executable, "-c", code, str(tmp_path), FIRST.base_hash]
    writers = [subprocess.Popen(command, env={**os.environ}) for _ in range(3)]
    while any(writer.poll() is None for writer in writers):
        ledger.check()  # a reader among them never sees half a line as damage
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert len(ledger.entries()) == 1 + 3 * 8 and ledger.problems() == []


def test_a_lock_held_for_long_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    ledger = make_service(tmp_path)
    monkeypatch.setattr(module, "LOCK_WAIT_S", 0.05)
    with ledger.path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ArtefactError, match=r"another process has held it for 0.05 s"):
            ledger.entries()


def failing(kept: int) -> Callable[[int, bytes], int]:
    write = os.write
    return lambda handle, data: write(handle, data[:kept])


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = make_service(tmp_path)
    before = ledger.path.read_bytes()
    monkeypatch.setattr(module.os, "write", failing(40))
    with pytest.raises(ArtefactError, match=r"could not be written: only 40 of \d+ bytes .*nothing was added"):
        ledger.append(revoke_entry("2042", current_base(ledger.entries()).base_hash))
    assert ledger.path.read_bytes() == before and ledger.problems() == []


def test_a_copy_is_as_good(tmp_path: Path) -> None:
    make_service(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert Ledger.open(tmp_path / "b", tick()).entries() == Ledger.open(tmp_path / "a").entries()
