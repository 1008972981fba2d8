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
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from postgrad import __version__
from postgrad.core.config import RuntimeConfig
from postgrad.core.distributed import first_rank
from postgrad.core.files import remove, write_json
from postgrad.core.layer_adapters import base_hashes
from postgrad.core.report import Cell, Note, Report, Section, Table
from postgrad.core.runtime import Job, finish, finished, progress, start, stop_on_signals, stop_requested
from postgrad.core.vision import ImagesConfig, ImageSet, check_images
from postgrad.core.vision_models import Classifier, ClassifierConfig, classifier_hash
from postgrad.errors import ArtefactError, ConfigError, GateError, Interrupted, ModelError
from postgrad.forgetting.entries import HASH, ApplyBody, Entry, Finding, VerifyBody, digest
from postgrad.forgetting.ledger import Ledger, current_base
from postgrad.forgetting.metrics import acc_table
from postgrad.forgetting.request import manifest_hash
from postgrad.forgetting.sample_audit import Scope, audit_samples, rows_of, unseen_rows
from postgrad.forgetting.schedules import TaskSplit
from postgrad.forgetting.service import Service
from postgrad.forgetting.service_lock import LOCK, hold
from postgrad.forgetting.service_parts import answers, enter
from postgrad.forgetting.service_runs import (
    BASE_MODEL,
    BEGUN,
    SERVICE,
    ServiceImages,
    check_service,
    entries_of_run,
    is_of_texts,
    load_base,
)
from postgrad.forgetting.status import standing_lines, standing_table
from postgrad.forgetting.text_service import load_text_base, loading_problems
from postgrad.forgetting.verification import findings_section, verify_service
from postgrad.forgetting.views import passes

LOSS = None
COMPARED = ("acc_r", "acc_f", "acc_h", "acc_o", "h", "acc_r_pretrained", "acc_f_pretrained", "acc_h_pretrained")
"""Figures that follow from the model and test images alone."""
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
    """Points that an accuracy measured anew may differ from the one on record, as another machine's may."""
    record: bool = False
    """Enter the outcome in the service's ledger."""
    model: ClassifierConfig = ClassifierConfig(path=BASE_MODEL)
    """The service's base."""
    data: ImagesConfig = ImagesConfig(path="")
    """The images that the service was made with; path "" = no figure is measured anew."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Where and how the run happens."""


def check(config: VerifyConfig) -> None:
    """Refuse settings that contradict each other."""
    check_service(config.service, config.model)
    check_images(config.data)
    if not config.tolerance >= 0:
        raise ConfigError(f"tolerance: expected 0 points or more, found {config.tolerance}.")
    if wrong := [text for text in config.known if not HASH.fullmatch(text)]:
        raise ConfigError(f"known: expected hashes of 64 hex digits, found {wrong}.")


def plan(config: VerifyConfig) -> Plan:
    """Say what a run would do."""
    check(config)
    applied = _applied(Ledger(Path(config.service)).entries())
    return {
        **standing_lines(Path(config.service)),
        "requests to load": len(applied),
        "requests to measure anew": len(applied) if config.data.path else 0,
        "entries to add to the ledger": int(config.record),
    }


@dataclass
class Examination:
    """What was found."""

    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, Mapping[str, float]] = field(default_factory=dict)
    """Request -> figures measured anew."""


def run(config: VerifyConfig) -> Report:
    """Examine the service and report what is not as recorded."""
    job = start(config, check, "verify")
    folder = Path(config.service)
    with ExitStack() as held:
        first_rank(lambda: _hold(folder, held))
        first_rank(lambda: _drop_stale(config, job))
        if report := finished(job):
            return _judged(config, report)
        found = examine(config, job)
        entries = Ledger(folder).entries() if _readable(folder) else []
        if config.record:
            first_rank(lambda: _record(config, found, job))
        first_rank(lambda: write_json(job.folder / CHECKED, _fingerprint(config)))
        report = Report("verify", job.folder, _results(found, entries), tuple(_sections(config, found, entries)))
        return _judged(config, finish(job, report))


def examine(config: VerifyConfig, job: Job) -> Examination:
    """Check the files and the base; where all is well, load each adapter and measure each request."""
    folder, found = Path(config.service), Examination()
    if _readable(folder) and _of_texts(folder):
        found.findings = _examine_texts(config, folder, job)
        return found
    key = Path(config.public_key) if config.public_key else None
    applied = _applied(Ledger(folder).entries()) if _readable(folder) else {}
    with stop_on_signals(), progress(job, 2 + len(applied), "verified") as bar:

        def advance() -> None:
            bar.advance()
            if stop_requested():
                raise Interrupted("Stopped; nothing was changed.")

        images, classifier = _base(config, folder, job)
        tensors = None if classifier is None else classifier_hash(classifier)
        advance()
        found.findings = verify_service(folder, tensors=tensors, public_key=key, known=config.known)
        advance()
        if classifier is None or any(finding.severity == "error" for finding in found.findings):
            return found
        service = Service.read(folder, classifier, config.model.path)
        again = Anew(service, images)

        def measure(entry: Entry) -> Mapping[str, float]:
            figures = again.figures(entry, found)
            advance()
            return figures

        more = verify_service(folder, measure=measure, tolerance=config.tolerance)
        found.findings += [finding for finding in more if finding not in found.findings]
    return found


def _of_texts(folder: Path) -> bool:
    """Say whether a service is a language model's; where base.json cannot be read, the examination says so."""
    try:
        return is_of_texts(folder)
    except ArtefactError:
        return False


def _examine_texts(config: VerifyConfig, folder: Path, job: Job) -> list[Finding]:
    """Check a language model's service: files, base, and that each adapter can be loaded; no row is at hand."""
    key = Path(config.public_key) if config.public_key else None
    with progress(job, 2, "verified") as bar:
        model = load_text_base(config.model.path, job)
        bar.advance()
        findings = verify_service(folder, tensors=base_hashes(model), public_key=key, known=config.known)
        if not any(finding.severity == "error" for finding in findings):
            findings += loading_problems(folder, model, config.model.path)
        bar.advance()
    return findings


class Anew:
    """Loads and measures the requests of a service again."""

    def __init__(self, service: Service, images: ServiceImages | None) -> None:
        self._service, self._images = service, images

    @torch.no_grad()
    def figures(self, entry: Entry, found: Examination) -> Mapping[str, float]:
        """Measure a request as it was when it was applied; note an adapter that cannot be loaded.

        None are measured without images, on a base before the one at hand, or for single images that are gone.
        """
        assert isinstance(entry.body, ApplyBody), "only requests that were applied are measured"
        service, body = self._service, entry.body
        if body.base_hash != current_base(service.ledger.entries()).base_hash:
            return {}
        try:
            service.show(service.in_use_at(entry))
        except (ArtefactError, ModelError) as error:
            place = f"adapters/{body.request}"
            found.findings.append(Finding(place, "adapter", "one that can be loaded", str(error)))
            return {}
        if self._images is None:
            return {}
        split, (train, test) = service.split_at(entry), self._images.both(body.seed)
        row = self._of_classes(split, test) if split.forget else self._single(body, Scope(split), train, test)
        figures = {name: row[name] for name in COMPARED if name in row and name in body.metrics}
        if figures:
            found.measured[body.request] = figures
        return figures

    def _of_classes(self, split: TaskSplit, test: ImageSet) -> Mapping[str, float]:
        """Measure with the adapters at hand and without any."""
        after = answers(self._service.classifier, test).argmax(1)
        self._service.show(())
        before = answers(self._service.classifier, test).argmax(1)
        return acc_table(test.labels, after, split, pretrained=before, start=before).row()

    def _single(self, body: ApplyBody, scope: Scope, train: ImageSet, test: ImageSet) -> Mapping[str, float]:
        """Measure single images, if all of them are still there."""
        asked = self._service.request(body.request)
        forget = train.select(rows_of(asked.samples, train))
        if manifest_hash(asked.salt, forget.hashes) != body.manifest_hash:
            return {}
        unseen = unseen_rows(test, forget.labels.tolist())[1]
        after = passes(self._service.classifier, (forget, test))
        self._service.show(())
        before = passes(self._service.classifier, (forget, test))
        whole = replace(scope, rows=tuple(range(len(forget))), unseen=unseen)
        return audit_samples("", after, before, None, whole).figures()


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


def _base(config: VerifyConfig, folder: Path, job: Job) -> tuple[ServiceImages | None, Classifier | None]:
    """Load images and base; neither where the records cannot be read, which the examination finds, too."""
    if not _readable(folder):
        return None, None
    applied = _applied(Ledger(folder).entries())
    try:
        images = ServiceImages(config.data, folder, job) if config.data.path else None
        shown = images.of(next(iter(applied.values())).seed) if images and applied else None
        return images, load_base(config.model, folder, job, shown)
    except ArtefactError:
        return None, None


def _split(findings: Sequence[Finding]) -> tuple[list[Finding], list[Finding]]:
    """Separate what is wrong from figures that nobody measured again."""
    unmeasured = [each for each in findings if each.found == "no measurement"]
    return [each for each in findings if each.found != "no measurement"], unmeasured


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
        note = f"Per cent of test images. A difference of more than {config.tolerance:g} points is an error."
        sections.append(Table("Figures measured anew", columns, tuple(rows), note))
    if unmeasured:
        names = sorted({finding.field.rpartition(".")[2] for finding in unmeasured})
        text = (
            f"{', '.join(names)} of some requests. Accuracies need the images (data.path) and the base that a request "
            "was applied to; leakage figures need the training images and the model that never saw the data."
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
