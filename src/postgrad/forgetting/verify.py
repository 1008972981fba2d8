"""Verify a service that forgets: derive again everything that its ledger claims, on this machine or another.

Changes nothing. Checks the ledger's chain, base.json, each adapter's files, each certificate, and that the model at
hand is the base on record, tensor by tensor. Then loads every adapter and, given the images, measures each request anew
with the adapters that were in use when it was applied, revoked ones included.

Source:    none; the audit trail is an addition to GS-LoRA (arXiv 2403.11530).

    postgrad verify --service runs/forget/service --model.path runs/forget/base/model --data.path digits

Ends with status 2 when anything is wrong; the report is written before.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from postgrad import __version__
from postgrad.core.adapters import unwrap
from postgrad.core.config import ModelConfig, RuntimeConfig
from postgrad.core.distributed import first_rank
from postgrad.core.files import remove, write_json
from postgrad.core.models import load_lm
from postgrad.core.report import Cell, Note, Report, Section, Table
from postgrad.core.runtime import Job, finish, finished, progress, start, stop_on_signals, stop_requested
from postgrad.core.vision import ImagesConfig, check_images
from postgrad.core.vision_models import ClassifierConfig
from postgrad.errors import ArtefactError, ConfigError, GateError, Interrupted
from postgrad.forgetting.anew import Examination, Expected, Subject, examine
from postgrad.forgetting.anew_boxes import BoxesAnew
from postgrad.forgetting.anew_classes import ClassesAnew
from postgrad.forgetting.anew_texts import RowsConfig, TextsAnew, check_rows
from postgrad.forgetting.base_record import hash_file, read_kind
from postgrad.forgetting.box_files import BoxesConfig, check_boxes
from postgrad.forgetting.boxes_service import ServiceBoxes, boxes_service, load_boxes_base
from postgrad.forgetting.entries import HASH, ApplyBody, Entry, Finding, VerifyBody, digest
from postgrad.forgetting.ledger import BASE, Ledger, current_base
from postgrad.forgetting.service import Service
from postgrad.forgetting.service_lock import LOCK, hold
from postgrad.forgetting.service_parts import enter
from postgrad.forgetting.service_runs import (
    BASE_MODEL,
    BEGUN,
    SERVICE,
    ServiceImages,
    check_service,
    entries_of_run,
    load_base,
)
from postgrad.forgetting.status import standing_lines, standing_table
from postgrad.forgetting.text_service import text_service
from postgrad.forgetting.verification import UNMEASURED, findings_section

LOSS = None
CHECKED = "checked.json"
Plan = dict[str, str | int | float]


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """A service, and what to hold it against."""

    service: str = SERVICE
    """Service folder."""
    public_key: str = ""
    """PEM file of an Ed25519 key; then the ledger's head and every certificate must be signed with it."""
    known: tuple[str, ...] = ()
    """Hashes of entries noted elsewhere, as on a printed certificate; each must be in the ledger."""
    tolerance: float = 1.0
    """Points that a figure in per cent may differ from the one on record, as another machine's may; a hundredth of it
    for figures that are no per cent."""
    record: bool = False
    """Enter the outcome in the service's ledger."""
    model: ClassifierConfig = ClassifierConfig(path=BASE_MODEL)
    """The service's base."""
    data: ImagesConfig = ImagesConfig(path="")
    """The images that a classifier's service was made with; path "" = no figure is measured anew."""
    boxes: BoxesConfig = BoxesConfig(path="")
    """The images and boxes that a detector's service was made with; path "" = no figure is measured anew."""
    rows: RowsConfig = RowsConfig()
    """The rows that a language model's request was made with."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Where and how the run happens."""


def check(config: VerifyConfig) -> None:
    """Refuse settings that contradict each other."""
    check_service(config.service, config.model)
    check_images(config.data)
    check_boxes(config.boxes)
    check_rows(config.rows)
    if not config.tolerance >= 0:
        raise ConfigError(f"tolerance: expected 0 points or more, found {config.tolerance}.")
    if wrong := [text for text in config.known if not HASH.fullmatch(text)]:
        raise ConfigError(f"known: expected hashes of 64 hex digits, found {wrong}.")


def plan(config: VerifyConfig) -> Plan:
    """Say what a run would do."""
    check(config)
    applied = _applied(Ledger(Path(config.service)).entries())
    given = config.data.path or config.boxes.path or config.rows.forget or config.rows.data.path
    return {
        **standing_lines(Path(config.service)),
        "requests to load": len(applied),
        "requests to measure anew": len(applied) if given else 0,
        "entries to add to the ledger": int(config.record),
    }


def run(config: VerifyConfig) -> Report:
    """Examine the service and report what is not as recorded."""
    job = start(config, check, "verify")
    folder = Path(config.service)
    with ExitStack() as held:
        first_rank(lambda: _hold(folder, held))
        first_rank(lambda: _drop_stale(config, job))
        if report := finished(job):
            return _judged(config, report)
        found = _examine(config, job)
        entries = Ledger(folder).entries() if _readable(folder) else []
        if config.record:
            first_rank(lambda: _record(config, found, job))
        first_rank(lambda: write_json(job.folder / CHECKED, _fingerprint(config)))
        report = Report("verify", job.folder, _results(found, entries), tuple(_sections(config, found, entries)))
        return _judged(config, finish(job, report))


def _examine(config: VerifyConfig, job: Job) -> Examination:
    """Load the base, then check everything."""
    folder = Path(config.service)
    key = Path(config.public_key) if config.public_key else None
    applied = _applied(Ledger(folder).entries()) if _readable(folder) else {}
    with stop_on_signals(), progress(job, 2 + len(applied), "verified") as bar:

        def advance() -> None:
            bar.advance()
            if stop_requested():
                raise Interrupted("Stopped; nothing was changed.")

        subject = _subject(config, folder, job)
        advance()
        expected = Expected(public_key=key, known=config.known, tolerance=config.tolerance)
        return examine(folder, subject, expected, advance)


def _subject(config: VerifyConfig, folder: Path, job: Job) -> Subject | None:
    """Load the base and what it is measured on; None where ledger or base.json are not sound."""
    if not _readable(folder) or hash_file(folder / BASE) != current_base(Ledger(folder).entries()).record_hash:
        return None
    path = config.model.path
    match read_kind(folder):
        case "texts":
            model, tokenizer = load_lm(ModelConfig(path=path), job, frozen=True)
            return TextsAnew(text_service(folder, unwrap(model), path), tokenizer, path, config.rows, job)
        case "boxes":
            detector = load_boxes_base(path, job)
            boxes = ServiceBoxes(config.boxes, detector.classes) if config.boxes.path else None
            return BoxesAnew(boxes_service(folder, detector, path), detector, boxes)
    images = ServiceImages(config.data, folder, job) if config.data.path else None
    seeds = [body.seed for body in _applied(Ledger(folder).entries()).values()]
    shown = images.of(seeds[0]) if images and seeds else None
    return ClassesAnew(Service.read(folder, load_base(config.model, folder, job, shown), path), images)


def _hold(folder: Path, held: ExitStack) -> None:
    """Keep others from changing the service meanwhile; where nobody can write, nobody does."""
    if os.access(folder, os.W_OK):
        held.callback(hold(folder))


def _applied(entries: Sequence[Entry]) -> dict[str, ApplyBody]:
    """Give what was applied, by request."""
    return {entry.body.request: entry.body for entry in entries if isinstance(entry.body, ApplyBody)}


def _readable(folder: Path) -> bool:
    """Say whether the ledger is sound enough to be followed."""
    try:
        return bool(Ledger(folder).entries())
    except ArtefactError:
        return False


def _split(findings: Sequence[Finding]) -> tuple[list[Finding], list[Finding]]:
    """Separate what is wrong from figures that nobody measured again."""
    unmeasured = [each for each in findings if each.found == UNMEASURED]
    return [each for each in findings if each.found != UNMEASURED], unmeasured


def _results(found: Examination, entries: Sequence[Entry]) -> dict[str, Cell]:
    wrong, unmeasured = _split(found.findings)
    errors = sum(finding.severity == "error" for finding in wrong)
    results: dict[str, Cell] = {
        "errors": errors, "warnings": len(wrong) - errors, "requests": len(_applied(entries)),
        "requests_measured": len(found.measured), "figures_not_measured": len(unmeasured),
    }  # fmt: skip
    gaps = [gap for *_, gap in _rows(found, entries)]
    return {**results, "largest_difference": max(gaps)} if gaps else results


def _rows(found: Examination, entries: Sequence[Entry]) -> list[tuple[str, str, float, float, float]]:
    """List request, figure, value on record, value anew, and the difference without its sign."""
    bodies = _applied(entries)
    return [
        (request, name, bodies[request].metrics[name], value, abs(value - bodies[request].metrics[name]))
        for request, figures in found.measured.items()
        for name, value in figures.items()
    ]


def _sections(config: VerifyConfig, found: Examination, entries: Sequence[Entry]) -> list[Section]:
    wrong, unmeasured = _split(found.findings)
    sections: list[Section] = [findings_section(wrong)]
    if entries:
        sections.append(standing_table(Path(config.service)))
    if any(finding.severity == "error" for finding in wrong) and not found.measured:
        sections.append(Note("No figure was measured anew", "That waits until the rest is in order.", "warning"))
    if rows := _rows(found, entries):
        columns = ("request", "figure", "on record", "anew", "difference")
        note = (
            f"Accuracy in per cent, AP in points. A difference of more than {config.tolerance:g} is an error, of "
            f"{config.tolerance / 100:g} in figures that are no per cent."
        )
        sections.append(Table("Figures measured anew", columns, tuple(rows), note))
    if unmeasured:
        names = sorted({finding.field.rpartition(".")[2] for finding in unmeasured})
        text = (
            f"{', '.join(names)} of some requests. Accuracies need the base that a request was applied to, and the "
            "images (data.path), the images with boxes (boxes.path) or the rows it forgot and kept (rows); leakage "
            "figures need the training images and the model that never saw the data."
        )
        sections.append(Note("Not measured anew", text))
    return sections


def _record(config: VerifyConfig, found: Examination, job: Job) -> None:
    """Enter the outcome, once a run; a ledger that is not sound is left alone."""
    folder = Path(config.service)
    if not _readable(folder) or any(isinstance(entry.body, VerifyBody) for entry in entries_of_run(folder, job)):
        return
    entries = Ledger(folder).entries()
    wrong, _ = _split(found.findings)
    gaps = [gap for *_, gap in _rows(found, entries)]
    body = VerifyBody(
        base_hash=current_base(entries).base_hash, num_requests=len(_applied(entries)), num_findings=len(wrong),
        metrics={"largest_difference": max(gaps)} if gaps else {}, code_version=__version__,
    )  # fmt: skip
    enter(Ledger(folder), body)


def _fingerprint(config: VerifyConfig) -> dict[str, str]:
    """Hash what was looked at: with the same files and settings, a finished verification need not be repeated."""
    places = {"service": config.service, "model": config.model.path, "public_key": config.public_key}
    return {name: digest(_contents(Path(place))) for name, place in places.items() if place}


def _contents(place: Path) -> dict[str, str]:
    paths = [place] if place.is_file() else sorted(place.rglob("*"))
    files = [path for path in paths if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _drop_stale(config: VerifyConfig, job: Job) -> None:
    """Have a finished run begin again when service or base have changed since."""
    checked = job.folder / CHECKED
    if checked.is_file() and json.loads(checked.read_bytes()) != _fingerprint(config):
        for name in (BEGUN, "result.json", CHECKED):
            remove(job.folder / name)


def _judged(config: VerifyConfig, report: Report) -> Report:
    """Let the command fail where anything is wrong."""
    if errors := int(report.results["errors"]):
        raise GateError(
            f"{config.service}: {errors} findings, listed in {report.folder / 'report.html'}. Restore what was altered "
            "from a copy, and do not rely on the service until then."
        )
    return report
