"""Purge a request of a service that forgets: delete the files that held its data, and enter how many in the ledger.

Deletes the files that are named and nothing else, once `--delete` confirms it. Copies, backups, snapshots of a disk and
other models trained on the data are beyond this. Neither the base nor an adapter is touched; the model is not loaded.

Source:    none; the audit trail is an addition to GS-LoRA (arXiv 2403.11530).

    postgrad purge --service runs/forget/service --request 2041 --files faces/ada/*.png --delete

Stopped or killed, the same command goes on where it was.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from postgrad.core.config import RuntimeConfig
from postgrad.core.distributed import first_rank
from postgrad.core.report import Cell, Note, Report, Section, Table
from postgrad.core.runtime import Job, finish, finished, progress, start, stop_on_signals, stop_requested
from postgrad.errors import ConfigError, Interrupted
from postgrad.forgetting.deletion import check_purge, forget_note, purge_files, unlinked
from postgrad.forgetting.entries import PurgeBody
from postgrad.forgetting.ledger import Ledger, states
from postgrad.forgetting.service_lock import hold
from postgrad.forgetting.service_parts import enter
from postgrad.forgetting.service_runs import SERVICE, check_folder, entries_of_run, workplace

LOSS = None
Plan = dict[str, str | int | float]


@dataclass(frozen=True, kw_only=True)
class PurgeConfig:
    """A request whose data are to be deleted, and where they lie."""

    service: str = SERVICE
    """Service folder."""
    request: str = ""
    """Id of the request."""
    files: tuple[str, ...] = ()
    """Files that held its data, each by its name; folders are refused."""
    delete: bool = False
    """Confirms that the files are to be deleted for good; without it nothing is."""
    rehearse: bool = False
    """Work on a copy of the service in the run folder, and delete no file."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Where and how the run happens."""


def check(config: PurgeConfig) -> None:
    """Refuse settings that contradict each other."""
    check_folder(config.service)
    if not config.request or not config.files:
        raise ConfigError(
            f"request, files: expected the id of a request and the files that held its data; found "
            f"{config.request!r} and {len(config.files)} files."
        )
    if config.delete and config.rehearse:
        raise ConfigError("delete, rehearse: a rehearsal deletes nothing; expected one of the two, found both.")


def plan(config: PurgeConfig) -> Plan:
    """Say what a run would do."""
    check(config)
    folder, files = Path(config.service), _paths(config)
    entries = Ledger(folder).entries()
    check_purge(folder, entries, config.request, files)
    there = [path for path in files if path.is_file()]
    size = sum(path.stat().st_size for path in there)
    return {
        "request": f"{config.request}, {states(entries)[config.request]}", "files to delete": len(there),
        "bytes to delete": size, "deleted already": len(files) - len(there),
        "confirmed": "a rehearsal" if config.rehearse else "yes" if config.delete else "no: --delete is missing",
    }  # fmt: skip


def run(config: PurgeConfig) -> Report:
    """Delete what is not deleted yet, and report from the ledger."""
    check(config)
    if not config.delete and not config.rehearse:
        raise ConfigError(
            f"delete: {len(config.files)} files would be deleted for good and nothing was. Look at --dry-run, then "
            "give --delete."
        )
    job = start(config, check, "purge")
    if report := finished(job):
        return report
    folder = first_rank(lambda: workplace(config.service, config.rehearse, job))
    body = first_rank(lambda: _purge(config, folder, job))
    results: dict[str, Cell] = {"files_deleted": 0 if config.rehearse else body.num_files}
    return finish(job, Report("purge", job.folder, results, sections(body, config.rehearse)))


def _purge(config: PurgeConfig, folder: Path, job: Job) -> PurgeBody:
    """Delete and enter, unless an earlier part of this run did."""
    files, let_go = _paths(config), hold(folder)
    try:
        done = [entry.body for entry in entries_of_run(folder, job)]
        with stop_on_signals(), progress(job, 2 + len(files), "purged") as bar:
            entries = Ledger(folder).entries()
            forget_note(folder, entries)
            bar.advance()

            def unlink(path: Path) -> None:
                if stop_requested():
                    raise Interrupted("Stopped; what is left to delete is noted in the service.")
                if not config.rehearse:
                    unlinked(path)
                bar.advance()

            found = next((body for body in done if isinstance(body, PurgeBody)), None)
            if found is None:
                entry = purge_files(
                    folder, entries, config.request, files, lambda body: enter(Ledger(folder), body), unlink
                )
                assert isinstance(entry.body, PurgeBody), "a purge enters a purge"
                found = entry.body
            bar.advance()
    finally:
        let_go()
    return found


def sections(body: PurgeBody, rehearsed: bool) -> tuple[Section, ...]:
    """Lay the report out: what is gone, and what that does not mean."""
    limits = (
        "Only the files that were named. Copies, backups and snapshots of the disk may still hold the data; a deleted "
        "file can often be recovered from a disk that is not encrypted. The base was trained on them and stays."
    )
    first = Note("Deleted", f"The data of request {body.request} are gone from {body.num_files} files.", "good")
    if rehearsed:
        first = Note("A rehearsal", "A copy of the service was changed; the service and the files are as they were.")
    rows = (("request", body.request), ("files", body.num_files), ("fingerprint of its images", body.manifest_hash))
    return first, Table("In the ledger", ("", "value"), rows), Note("What this is not", limits, "warning")


def _paths(config: PurgeConfig) -> Sequence[Path]:
    """Give the files without resolving links, which are refused."""
    return [Path(os.path.abspath(file)) for file in config.files]
