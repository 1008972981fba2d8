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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from postgrad.core.config import RuntimeConfig
from postgrad.core.distributed import first_rank
from postgrad.core.report import Cell, Note, Report, Section, Table
from postgrad.core.runtime import Job, finish, finished, progress, start, stop_on_signals, stop_requested
from postgrad.core.vision import ImagesConfig, ImageSet, check_images
from postgrad.core.vision_models import Classifier, ClassifierConfig
from postgrad.errors import ArtefactError, ConfigError, Interrupted
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
    is_of_texts,
    load_base,
    seed_of,
    workplace,
)

LOSS = None
Plan = dict[str, str | int | float]


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
    """Images to compare the answers on; path "" = noise."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Where and how the run happens."""


def check(config: BakeConfig) -> None:
    """Refuse settings that contradict each other."""
    check_service(config.service, config.model)
    check_images(config.data)
    if is_of_texts(Path(config.service)):
        raise ConfigError(
            f"service: expected a classifier's, found a language model's in {config.service}. Its adapters are peft's: "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload() makes a new base."
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
    with stop_on_signals(), progress(job, 3, "baked") as bar:
        images = _images(config, folder, job)

        def load(path: Path) -> Classifier:
            return load_base(replace(config.model, path=str(path)), folder, job, images)

        classifier = load(path)
        bar.advance()
        with Service.open(folder, classifier, str(path)) as service:
            bar.advance()
            if stop_requested():
                raise Interrupted("Stopped; nothing was changed.")
            if not again:
                service.bake(made, load, images)
            bar.advance()
    body = next(entry.body for entry in entries_of_run(folder, job) if isinstance(entry.body, BakeBody))
    results: dict[str, Cell] = {"requests_baked": len(body.requests), **body.metrics}
    return finish(job, Report("bake", job.folder, results, sections(body, made, config.rehearse)))


def sections(body: BakeBody, made: Path, rehearsed: bool) -> tuple[Section, ...]:
    """Lay the report out: what to do from now on, and how far the answers are apart."""
    text = f"The service's base is now {made}: give it as model.path. The one before no longer fits."
    notes = [Note("A new base", text, "good")]
    if rehearsed:
        notes = [Note("A rehearsal", "A copy of the service was changed; the service and its base are as they were.")]
    requests = Table("Now in the weights", ("request",), tuple((name,) for name in body.requests))
    rows = tuple((name, value) for name, value in body.metrics.items())
    note = "Largest difference of a logit, images answered alike in per cent, and accuracies of the new base."
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
