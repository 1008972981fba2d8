"""Revoke requests of a service that forgets: their adapters are taken out of use, and the model knows again.

Changes no weight: a revoked request's adapter is no longer summed. What is left must answer bit for bit as a model that
never had it, which is checked and entered in the ledger, with the accuracies of the classes concerned. A request that
was revoked is not applied again; ask for the same under another id.

Source:    none; GS-LoRA (arXiv 2403.11530) merges its adapters, and cannot undo a request.

    postgrad revoke --service runs/forget/service --requests request-2 --model.path runs/forget/base/model

Stopped or killed, the same command goes on where it was.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from postgrad.core.config import RuntimeConfig
from postgrad.core.distributed import first_rank
from postgrad.core.report import Cell, Note, Report, Section, Table
from postgrad.core.runtime import Job, finish, finished, progress, start, stop_on_signals, stop_requested
from postgrad.core.vision import ImagesConfig, check_images
from postgrad.core.vision_models import ClassifierConfig
from postgrad.errors import ArtefactError, ConfigError, GateError, Interrupted
from postgrad.forgetting.base_record import read_kind
from postgrad.forgetting.box_files import BoxesConfig, check_boxes
from postgrad.forgetting.boxes_service import ServiceBoxes, boxes_service, load_boxes_base, revoke_boxes
from postgrad.forgetting.entries import Entry, RevokeBody
from postgrad.forgetting.ledger import Ledger, states
from postgrad.forgetting.service import Service
from postgrad.forgetting.service_runs import (
    BASE_MODEL,
    SERVICE,
    ServiceImages,
    check_service,
    entries_of_run,
    in_use,
    load_base,
    seed_of,
    workplace,
)
from postgrad.forgetting.text_service import load_text_base, revoke_texts, text_service

LOSS = None
Plan = dict[str, str | int | float]
Revoke = Callable[[str], object]
SHOWN = (("of its classes", "back"), ("of kept classes", "r"), ("of classes still forgotten", "o"))
"""Columns of the report, and how the figures' names end."""


@dataclass(frozen=True, kw_only=True)
class RevokeConfig:
    """A service, and the requests to undo."""

    service: str = SERVICE
    """Service folder."""
    requests: tuple[str, ...] = ()
    """Ids of the requests to revoke."""
    rehearse: bool = False
    """Work on a copy of the service in the run folder; the service itself stays as it is."""
    model: ClassifierConfig = ClassifierConfig(path=BASE_MODEL)
    """The service's base."""
    data: ImagesConfig = ImagesConfig()
    """The images that a classifier's service was made with."""
    boxes: BoxesConfig = BoxesConfig(path="")
    """The images and boxes that a detector's service was made with; path "" = nothing is measured."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Where and how the run happens."""


def check(config: RevokeConfig) -> None:
    """Refuse settings that contradict each other."""
    check_service(config.service, config.model)
    check_images(config.data)
    check_boxes(config.boxes)
    if not config.requests or len(set(config.requests)) < len(config.requests):
        raise ConfigError(f"requests: expected one id or more, each once; found {list(config.requests)}.")


def plan(config: RevokeConfig) -> Plan:
    """Say what a run would do."""
    check(config)
    entries = Ledger(Path(config.service)).entries()
    check_requests(config.requests, entries, ())
    return {"requests to revoke": len(config.requests), "left in use": len(in_use(entries)) - len(config.requests)}


def check_requests(requests: Sequence[str], entries: Sequence[Entry], done: Sequence[str]) -> None:
    """Refuse a request that is neither in use nor revoked by this run.

    Raises: ArtefactError: with the state of each.
    """
    found, usable = states(entries), in_use(entries)
    wrong = [f"{name!r} is {found.get(name, 'unknown')}" for name in requests if name not in (*done, *usable)]
    if wrong:
        raise ArtefactError(f"requests: expected some of those in use, {usable}; {', '.join(wrong)}. None was revoked.")


def run(config: RevokeConfig) -> Report:
    """Revoke what is not revoked yet, and report from the ledger."""
    job = start(config, check, "revoke")
    if report := finished(job):
        return _judged(report)
    folder = first_rank(lambda: workplace(config.service, config.rehearse, job))
    done = [body.request for body in revocations(first_rank(lambda: entries_of_run(folder, job)))]
    check_requests(config.requests, Ledger(folder).entries(), done)
    undo = {"classes": _classes, "boxes": _boxes, "texts": _texts}[read_kind(folder)]
    frame = progress(job, 1 + len(config.requests), "revoked")
    with stop_on_signals(), frame as bar, undo(config, folder, job) as revoke:
        bar.advance()
        for request in config.requests:
            if stop_requested():
                raise Interrupted("Stopped; what was revoked is in the ledger.")
            if request not in done:
                revoke(request)
            bar.advance()
    return _report(config, folder, job)


@contextmanager
def _classes(config: RevokeConfig, folder: Path, job: Job) -> Iterator[Revoke]:
    """Hold a classifier's service."""
    entries, images = Ledger(folder).entries(), ServiceImages(config.data, folder, job)
    shown = {request: images.of(seed_of(entries, request)) for request in config.requests}
    classifier = load_base(config.model, folder, job, next(iter(shown.values())))
    with Service.open(folder, classifier, config.model.path) as service:
        yield lambda request: service.revoke(request, shown[request])


@contextmanager
def _boxes(config: RevokeConfig, folder: Path, job: Job) -> Iterator[Revoke]:
    """Hold a detector's service."""
    entries, detector = Ledger(folder).entries(), load_boxes_base(config.model.path, job)
    images = ServiceBoxes(config.boxes, detector.classes) if config.boxes.path else None
    shown = {request: images.of(seed_of(entries, request)) if images else None for request in config.requests}
    with boxes_service(folder, detector, config.model.path).open() as service:
        yield lambda request: revoke_boxes(service, request, detector, shown[request])


@contextmanager
def _texts(config: RevokeConfig, folder: Path, job: Job) -> Iterator[Revoke]:
    """Hold a language model's service; nothing is measured, since no row is at hand."""
    with text_service(folder, load_text_base(config.model.path, job), config.model.path).open() as service:
        yield lambda request: revoke_texts(service, request)


def _report(config: RevokeConfig, folder: Path, job: Job) -> Report:
    """Report from the ledger."""
    entries = Ledger(folder).entries()
    found = [body for body in revocations(entries) if body.request in config.requests]
    results: dict[str, Cell] = {
        "revoked": len(found), "not_bit_exact": sum(not body.bit_exact for body in found),
        "requests_in_use": len(in_use(entries)),
    }  # fmt: skip
    return _judged(finish(job, Report("revoke", job.folder, results, sections(found, config.rehearse))))


def revocations(entries: Sequence[Entry]) -> list[RevokeBody]:
    """List the revocations."""
    return [entry.body for entry in entries if isinstance(entry.body, RevokeBody)]


def sections(found: Sequence[RevokeBody], rehearsed: bool) -> tuple[Section, ...]:
    """Lay the report out: whether the outputs are as they should be, and what is known again."""
    notes = [
        Note(
            f"The outputs differ after {body.request}",
            "They are not those of a model that never had its adapter: do not rely on the revocation.",
            "warning",
        )
        for body in found
        if not body.bit_exact
    ] or [
        Note("Undone", "The outputs equal, bit for bit, those of a model that never had these adapters.", "good")
    ]  # fmt: skip
    if rehearsed:
        notes.append(Note("A rehearsal", "A copy of the service was changed; the service is as it was."))
    rows = tuple((body.request, *(_figure(body, end) for _, end in SHOWN)) for body in found)
    note = "On test images: accuracy in per cent, of detectors AP in points."
    return (*notes, Table("After each revocation", ("request", *(title for title, _ in SHOWN)), rows, note))


def _figure(body: RevokeBody, end: str) -> Cell:
    """Give an accuracy, or the AP that a detector has in its place."""
    return body.metrics.get(f"acc_{end}", body.metrics.get(f"ap_{end}", "–"))


def _judged(report: Report) -> Report:
    """Let the command fail where a revocation left a trace."""
    if num := int(report.results["not_bit_exact"]):
        raise GateError(
            f"{num} revocations left other outputs than a model without the adapter has; {report.folder}/report.html "
            "and the ledger say which. Load the base anew before relying on it."
        )
    return report
