"""Revoke requests of a service that forgets: their adapters are taken out of use, and the model knows again.

Changes no weight: a revoked request's adapter is no longer summed. What is left must answer bit for bit as a model that
never had it, which is checked and entered in the ledger, with the accuracies of the classes concerned. A request that
was revoked is not applied again; ask for the same under another id.

Source:    none; GS-LoRA (arXiv 2403.11530) merges its adapters, and cannot undo a request.

    postgrad revoke --service runs/forget/service --requests request-2 --model.path runs/forget/base/model

Stopped or killed, the same command goes on where it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from postgrad.core.config import RuntimeConfig
from postgrad.core.distributed import first_rank
from postgrad.core.report import Cell, Note, Report, Section, Table
from postgrad.core.runtime import Job, finish, finished, progress, start, stop_on_signals, stop_requested
from postgrad.core.vision import ImagesConfig, ImageSet, check_images
from postgrad.core.vision_models import ClassifierConfig
from postgrad.errors import ArtefactError, ConfigError, GateError, Interrupted
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
    is_of_texts,
    load_base,
    seed_of,
    workplace,
)
from postgrad.forgetting.text_service import load_text_base, revoke_texts, text_service

LOSS = None
Plan = dict[str, str | int | float]


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
    """The images that the service was made with."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Where and how the run happens."""


def check(config: RevokeConfig) -> None:
    """Refuse settings that contradict each other."""
    check_service(config.service, config.model)
    check_images(config.data)
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
    entries, images = Ledger(folder).entries(), ServiceImages(config.data, folder, job)
    check_requests(config.requests, entries, done)
    with stop_on_signals(), progress(job, 1 + len(config.requests), "revoked") as bar:
        if is_of_texts(folder):
            _revoke_texts(config, folder, done, job, bar)
            return _report(config, folder, job)
        shown = {request: images.of(seed_of(entries, request)) for request in config.requests}
        classifier = load_base(config.model, folder, job, next(iter(shown.values())))
        bar.advance()
        with Service.open(folder, classifier, config.model.path) as service:
            for request in config.requests:
                _revoke(service, request, shown[request], done)
                bar.advance()
    return _report(config, folder, job)


def _revoke_texts(config: RevokeConfig, folder: Path, done: Sequence[str], job: Job, bar: progress) -> None:
    """Revoke requests to a language model."""
    model = load_text_base(config.model.path, job)
    bar.advance()
    with text_service(folder, model, config.model.path).open() as service:
        for request in config.requests:
            if stop_requested():
                raise Interrupted("Stopped; what was revoked is in the ledger.")
            if request not in done:
                revoke_texts(service, request)
            bar.advance()


def _report(config: RevokeConfig, folder: Path, job: Job) -> Report:
    """Report from the ledger."""
    entries = Ledger(folder).entries()
    found = [body for body in revocations(entries) if body.request in config.requests]
    results: dict[str, Cell] = {
        "revoked": len(found), "not_bit_exact": sum(not body.bit_exact for body in found),
        "requests_in_use": len(in_use(entries)),
    }  # fmt: skip
    return _judged(finish(job, Report("revoke", job.folder, results, sections(found, config.rehearse))))


def _revoke(service: Service, request: str, images: ImageSet, done: Sequence[str]) -> None:
    """Revoke one request unless an earlier part of this run did."""
    if stop_requested():
        raise Interrupted("Stopped; what was revoked is in the ledger.")
    if request not in done:
        service.revoke(request, images)


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
    rows = tuple(
        (body.request, *(body.metrics.get(name, "–") for name in ("acc_back", "acc_r", "acc_o"))) for body in found
    )
    columns = ("request", "of its classes", "of kept classes", "of classes still forgotten")
    return (*notes, Table("Accuracy after each revocation", columns, rows, "Per cent of test images."))


def _judged(report: Report) -> Report:
    """Let the command fail where a revocation left a trace."""
    if num := int(report.results["not_bit_exact"]):
        raise GateError(
            f"{num} revocations left other outputs than a model without the adapter has; {report.folder}/report.html "
            "and the ledger say which. Load the base anew before relying on it."
        )
    return report
