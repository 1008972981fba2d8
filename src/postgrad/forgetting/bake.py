"""Bake a service that forgets: write a new base with all requests in use in its weights, and go on from it.

Formula:   W' = W + sum_n (alpha_n / R_n) B_n A_n over the requests n in use.
Source:    GS-LoRA (arXiv 2403.11530) merges after every task.
Differs:   only here, and on purpose: it cannot be undone. The old base stays as it is. The ledger refuses to bake, to
           revoke or to apply a request again that is in the base, so that no change is made twice. Answers agree up to
           rounding with those of base and adapters, and how far is entered in the ledger.

    postgrad bake --service runs/forget/service --model.path runs/forget/base/model

The new base is in model/ of the run folder; give it as model.path from then on. Stopped or killed, the same command
goes on where it was.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from postgrad.core.config import RuntimeConfig
from postgrad.core.distributed import first_rank
from postgrad.core.report import Cell, Note, Report, Section, Table
from postgrad.core.runtime import Job, finish, finished, progress, start, stop_on_signals, stop_requested
from postgrad.core.vision import ImagesConfig, ImageSet, check_images
from postgrad.core.vision_models import Classifier, ClassifierConfig
from postgrad.errors import ArtefactError, ConfigError, Interrupted
from postgrad.forgetting.base_record import read_kind
from postgrad.forgetting.box_files import BoxesConfig, check_boxes
from postgrad.forgetting.boxes_service import ServiceBoxes, bake_boxes, boxes_service, load_boxes_base
from postgrad.forgetting.entries import BakeBody
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

LOSS = None
Plan = dict[str, str | int | float]
Bake = Callable[[Path], object]


@dataclass(frozen=True, kw_only=True)
class BakeConfig:
    """A service whose base is to be written anew."""

    service: str = SERVICE
    """Service folder."""
    rehearse: bool = False
    """Work on a copy of the service in the run folder; the service itself stays as it is."""
    model: ClassifierConfig = ClassifierConfig(path=BASE_MODEL)
    """The service's base."""
    data: ImagesConfig = ImagesConfig(path="")
    """Images to compare a classifier's answers on; path "" = noise."""
    boxes: BoxesConfig = BoxesConfig(path="")
    """Images and boxes to measure a detector on; answers are compared on noise in any case."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Where and how the run happens."""


def check(config: BakeConfig) -> None:
    """Refuse settings that contradict each other."""
    check_service(config.service, config.model)
    check_images(config.data)
    check_boxes(config.boxes)
    if read_kind(Path(config.service)) == "texts":
        raise ConfigError(
            f"service: expected a classifier's or a detector's, found a language model's in {config.service}. Its "
            "adapters are peft's: PeftModel.from_pretrained(base, adapter).merge_and_unload() makes a new base."
        )


def plan(config: BakeConfig) -> Plan:
    """Say what a run would do."""
    check(config)
    entries = Ledger(Path(config.service)).entries()
    return {"requests to bake": len(_some(in_use(entries))), "requests in all": len(states(entries))}


def run(config: BakeConfig) -> Report:
    """Bake unless an earlier part of this run did, and report from the ledger."""
    job = start(config, check, "bake")
    if report := finished(job):
        return report
    folder = first_rank(lambda: workplace(config.service, config.rehearse, job))
    made = job.folder / "model"
    again = any(isinstance(entry.body, BakeBody) for entry in first_rank(lambda: entries_of_run(folder, job)))
    if not again:
        _some(in_use(Ledger(folder).entries()))
    path = made if again else Path(config.model.path)
    hold = {"boxes": _boxes, "classes": _classes}[read_kind(folder)]
    with stop_on_signals(), progress(job, 3, "baked") as bar, hold(config, folder, path, job) as bake:
        bar.advance()
        if stop_requested():
            raise Interrupted("Stopped; nothing was changed.")
        if not again:
            bake(made)
        bar.advance()
        body = next(entry.body for entry in entries_of_run(folder, job) if isinstance(entry.body, BakeBody))
        bar.advance()
    results: dict[str, Cell] = {"requests_baked": len(body.requests), **body.metrics}
    return finish(job, Report("bake", job.folder, results, sections(body, made, config.rehearse)))


@contextmanager
def _classes(config: BakeConfig, folder: Path, path: Path, job: Job) -> Iterator[Bake]:
    """Hold a classifier's service. Args: path: of the base as it is now."""
    images = _images(config, folder, job)

    def load(path: Path) -> Classifier:
        return load_base(replace(config.model, path=str(path)), folder, job, images)

    with Service.open(folder, load(path), str(path)) as service:
        yield lambda made: service.bake(made, load, images)


@contextmanager
def _boxes(config: BakeConfig, folder: Path, path: Path, job: Job) -> Iterator[Bake]:
    """Hold a detector's service. Args: path: of the base as it is now."""
    detector, entries = load_boxes_base(str(path), job), Ledger(folder).entries()
    shown = None
    if config.boxes.path:
        shown = ServiceBoxes(config.boxes, detector.classes).of(seed_of(entries, list(states(entries))[-1]))
    with boxes_service(folder, detector, str(path)).open() as service:
        yield lambda made: bake_boxes(service, made, detector, shown, job)


def sections(body: BakeBody, made: Path, rehearsed: bool) -> tuple[Section, ...]:
    """Lay the report out: what to do from now on, and how far the answers are apart."""
    text = f"The service's base is now {made}: give it as model.path. The one before no longer fits."
    notes = [Note("A new base", text, "good")]
    if rehearsed:
        notes = [Note("A rehearsal", "A copy of the service was changed; the service and its base are as they were.")]
    requests = Table("Now in the weights", ("request",), tuple((name,) for name in body.requests))
    rows = tuple((name, value) for name, value in body.metrics.items())
    note = "Largest difference of an answer, images answered alike in per cent; accuracy or, of detectors, AP."
    return (*notes, requests, Table("Beside base and adapters", ("figure", "value"), rows, note))


def _some(requests: Sequence[str]) -> Sequence[str]:
    if not requests:
        raise ArtefactError("no request of the service is in use, so there is nothing to bake.")
    return requests


def _images(config: BakeConfig, folder: Path, job: Job) -> ImageSet | None:
    """Load the images that the last request was measured on, if any are given."""
    if not config.data.path:
        return None
    entries = Ledger(folder).entries()
    return ServiceImages(config.data, folder, job).of(seed_of(entries, list(states(entries))[-1]))
