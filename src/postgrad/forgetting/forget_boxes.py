"""Forget objects on request: a trained detector loses classes of objects, one request after another.

Formula:   2 C + 5 L1 + 2 GIoU on kept boxes + beta [relu(BND - 2 C) + 5 L1 + 2 GIoU] on those to forget
           + alpha sum_g ||g||_2 + prototype terms (forgetting/detection.py), trained by low-rank pairs on the
           feed-forward layers of encoder and decoder; C is the focal loss, or DETR's cross entropy.
Source:    GS-LoRA (arXiv 2403.11530), GS-LoRA++ (arXiv 2501.09705): Deformable DETR on COCO.
Differs:   one revocable adapter a request, on few blocks, that ends early (preset safe); a ledger and certificates;
           preset paper keeps to the released scripts (forgetting/erase_boxes.py).

    postgrad forget_boxes --model.path my-detr --data.path images/ --data.annotations boxes.json --requests r.json

Without arguments: a small Deformable DETR learns coloured shapes and serves two requests of a class each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from postgrad.core.batches import num_steps
from postgrad.core.config import RuntimeConfig, nearest
from postgrad.core.distributed import first_rank
from postgrad.core.report import Report
from postgrad.core.runtime import Job, finish, finished, start
from postgrad.errors import ConfigError, DataError, GateError
from postgrad.forgetting.anew import Expected, examine
from postgrad.forgetting.anew_boxes import BoxesAnew
from postgrad.forgetting.box_files import SHAPES, BoxesConfig, check_boxes, load_boxes
from postgrad.forgetting.boxes import BoxSet
from postgrad.forgetting.boxes_bench import Bench, Settings, left
from postgrad.forgetting.boxes_leakage import BoxAuditConfig, check_box_audit, see
from postgrad.forgetting.boxes_report import boxes_sections, look, summary
from postgrad.forgetting.boxes_service import ServiceBoxes, boxes_service, revoke_boxes
from postgrad.forgetting.detector import (
    TINY,
    Detector,
    DetectorBaseConfig,
    DetectorConfig,
    load_detector,
    save_detector,
    train_detector,
)
from postgrad.forgetting.entries import RevokeBody
from postgrad.forgetting.erase_boxes import PRESETS, EraseBoxesConfig, check_erase_boxes
from postgrad.forgetting.erase_config import check_preset, preset_of
from postgrad.forgetting.policy import check_policy, read_policy
from postgrad.forgetting.request import ForgetRequest, read_requests, with_salt
from postgrad.forgetting.schedules import TaskSplit
from postgrad.forgetting.service_runs import entries_of_run
from postgrad.forgetting.verification import UNMEASURED

LOSS = None
"""Each request has a curve of its own, in requests/<request>/."""
MADE = ("ring", "square")
"""What the built-in requests forget."""
Plan = dict[str, str | int | float]


@dataclass(frozen=True, kw_only=True)
class ForgetBoxesConfig:
    """A detector, requests, and how they are erased."""

    requests: tuple[str, ...] = ()
    """Request files, in order; none = two made ones for the built-in shapes, and with a service it is checked anew."""
    shots: int = 0
    """Images of each class to work with, forgotten and kept ones; 0 = all that show it."""
    preset: Literal["safe", "paper", "own"] = "safe"
    """How requests are erased; own = as the settings under erase say."""
    gold: bool = True
    """Train detectors that never saw the forgotten classes, to compare with: each costs as much as the base, which
    must be trained here, too."""
    revoke: tuple[str, ...] = ()
    """Requests to revoke at the end, of earlier runs on the service, too."""
    service: str = ""
    """Service folder; "" = service/ in the run folder. A folder of an earlier run is gone on with."""
    policy: str = ""
    """File of limits; "" = the usual ones. They are judged on the certificates."""
    erase: EraseBoxesConfig = EraseBoxesConfig()
    """How a request is erased, with preset own."""
    base: DetectorBaseConfig = DetectorBaseConfig()
    """How the detector is trained first, if it is drawn from the seed."""
    audit: BoxAuditConfig = BoxAuditConfig()
    """How hard the leakage audit looks."""
    model: DetectorConfig = DetectorConfig()
    """The detector."""
    data: BoxesConfig = BoxesConfig()
    """Images and the boxes of their objects."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Where and how the run happens."""


def check(config: ForgetBoxesConfig) -> None:
    """Refuse settings that contradict each other."""
    check_boxes(config.data)
    check_erase_boxes(config.erase)
    check_box_audit(config.audit)
    check_policy(read_policy(config.policy))
    check_preset(config.preset, config.erase, EraseBoxesConfig())
    if config.shots < 0:
        raise ConfigError(f"shots: expected 0 (all) or more, found {config.shots}.")
    if config.model.path == TINY and (config.model.width % 32 or config.model.layers < 2):
        raise ConfigError(
            f"model: expected a width that is a multiple of 32 and at least 2 layers, found {config.model.width} and "
            f"{config.model.layers}."
        )
    requests = read_requests(map(Path, config.requests))
    if single := [request.id for request in requests if request.samples]:
        raise ConfigError(f"requests: expected whole classes to forget, found single images in {single}.")
    if config.gold and requests and config.model.path != TINY:
        raise ConfigError(
            "gold: a detector that never saw the forgotten classes can be trained only where the base is trained, too; "
            f"expected model.path {TINY}, found {config.model.path!r}. Set gold to false."
        )
    if not (requests or config.revoke or config.service or config.data.path == SHAPES):
        raise ConfigError(
            "requests: expected request files; only the built-in shapes, or a service to check, do without."
        )
    if not config.service and (
        unknown := set(config.revoke) - {request.id for request in requests or made_requests(0)}
    ):
        raise ConfigError(f"revoke: no request {sorted(unknown)} in this run. Set service to the folder that has it.")


def plan(config: ForgetBoxesConfig) -> Plan:
    """Say what a run would do."""
    check(config)
    train, test = load_boxes(config.data, config.runtime.seed)
    named = {f"request {request.id}": ", ".join(request.classes) for request in requests_of(config)}
    return {
        "training images": len(train), "test images": len(test), "classes with boxes": len(train.counts),
        "boxes": sum(train.counts.values()), **named,
        "models trained": int(config.model.path == TINY) * (1 + config.gold * len(named)),
        "requests to revoke": len(config.revoke),
    }  # fmt: skip


def requests_of(config: ForgetBoxesConfig) -> list[ForgetRequest]:
    """Read the requests, or make those of the built-in shapes."""
    if config.requests or config.data.path != SHAPES or config.service:
        return [with_salt(request) for request in read_requests(map(Path, config.requests))]
    return made_requests(config.runtime.seed)


def made_requests(seed: int) -> list[ForgetRequest]:
    """Make the requests of the built-in shapes."""
    return [
        ForgetRequest(id=f"request-{number}", classes=(name,), salt=f"{seed:032x}")
        for number, name in enumerate(MADE, 1)
    ]


def splits_of(requests: Sequence[ForgetRequest], boxes: BoxSet, before: Sequence[int]) -> list[TaskSplit]:
    """Say for each request which classes are kept, forgotten now, and were before.

    Args:   before: classes that earlier runs on the same service have forgotten.
    Raises: DataError: a class that is not there, has no box or was forgotten before, or none left to keep.
    """
    found, old = list[TaskSplit](), list(before)
    for request in requests:
        now = [_place(name, request, boxes) for name in request.classes]
        if again := [boxes.classes[label] for label in now if label in old]:
            raise DataError(f"request {request.id!r}: {again} was forgotten before. Take it out of this request.")
        remain = tuple(label for label in sorted(boxes.counts) if label not in (*old, *now))
        if not remain:
            raise DataError(
                f"request {request.id!r}: no box of another class is left to retain. Narrow the request, or add images "
                "of other objects."
            )
        found.append(TaskSplit(remain, tuple(now), tuple(old)))
        old += now
    return found


def _place(name: str, request: ForgetRequest, boxes: BoxSet) -> int:
    shown = [boxes.classes[label] for label in sorted(boxes.counts)]
    if name in shown:
        return boxes.classes.index(name)
    guess = nearest(name, shown)
    hint = f"Nearest is {guess!r}." if guess else f"There are boxes of {', '.join(shown[:5])}, and so on."
    what = "no training image shows a box of" if name in boxes.classes else "the detector has no class"
    raise DataError(f"request {request.id!r}: {what} {name!r}. {hint}")


def base_of(config: ForgetBoxesConfig, boxes: BoxSet, job: Job) -> tuple[Detector, str]:
    """Load the base, or train one and keep it; return it and its name."""
    detector = load_detector(config.model, boxes.classes, job)
    if config.model.path != TINY:
        return detector, config.model.path
    train_detector(detector, boxes, config.base, replace(job, folder=job.folder / "base"))
    if not (job.folder / "base" / "model").is_dir():
        first_rank(lambda: save_detector(detector, job.folder / "base" / "model"))
    return detector, "base/model"


def gold_detector(config: ForgetBoxesConfig, boxes: BoxSet, split: TaskSplit, number: int, job: Job) -> Detector | None:
    """Train gold for a request, from the base's first weights on what is left; None where none is wanted.

    It takes as many steps as the base: images with a forgotten object are many, and without them an epoch is short.
    """
    if not config.gold:
        return None
    steps = num_steps(len(boxes), config.base.train)
    base = replace(config.base, train=replace(config.base.train, max_steps=steps))
    detector = load_detector(config.model, boxes.classes, job)
    train_detector(detector, left(boxes, split), base, replace(job, folder=job.folder / f"gold-{number}"))
    return detector


def settings_of(config: ForgetBoxesConfig) -> Settings:
    """Say how requests are served."""
    erase = preset_of(config.preset, config.erase, PRESETS)
    return Settings(erase, read_policy(config.policy), config.audit, config.shots)


def run(config: ForgetBoxesConfig) -> Report:
    """Serve the requests and report what is found of what was forgotten and of what was kept."""
    job = start(config, check, "forget_boxes")
    if report := finished(job):
        return _judged(report)
    train, test = load_boxes(config.data, job.seed)
    requests = requests_of(config)
    if config.model.path == TINY:
        for split in splits_of(requests, train, ()):  # refuses before anything is trained
            if config.gold:
                left(train, split)
    detector, name = base_of(config, train, job)
    boxes = train.renamed(detector.classes), test.renamed(detector.classes)
    before = look(detector, boxes[1])
    folder = Path(config.service) if config.service else job.folder / "service"
    with boxes_service(folder, detector, name).open() as service:
        mine = first_rank(lambda: entries_of_run(folder, job))
        seen = see(detector, boxes, config.audit, job.seed) if requests else None
        bench = Bench(service, detector, boxes, before, seen, settings_of(config), job)
        others = [each for each in service.forgotten if each not in [request.id for request in requests]]
        splits = splits_of(requests, boxes[0], service.labels(others))
        for number, (request, split) in enumerate(zip(requests, splits, strict=True), 1):
            if service.carried_out(request) is None:
                bench.apply(request, split, gold_detector(config, boxes[0], split, number, job))
        revoked = [entry.body.request for entry in mine if isinstance(entry.body, RevokeBody)]
        for each in config.revoke:
            if each not in revoked:
                revoke_boxes(service, each, detector, boxes[1])
        service.show(service.active)
        after = look(detector, boxes[1])
        findings = service.findings()
        if not (requests or config.revoke):
            anew = BoxesAnew(service, detector, ServiceBoxes(config.data, detector.classes))
            examined = first_rank(lambda: examine(folder, anew, Expected()).findings)
            findings = [each for each in examined if each.found != UNMEASURED]
            service.show(service.active)
        results = {**summary(service, before, after), "errors": sum(each.severity == "error" for each in findings)}
        report = Report("forget_boxes", job.folder, results, boxes_sections(service, before, after, findings))
    return _judged(finish(job, report))


def _judged(report: Report) -> Report:
    """Let the command fail where the service is not as recorded."""
    if errors := int(report.results["errors"]):
        raise GateError(
            f"{errors} findings in the service, listed in {report.folder / 'report.html'}. Restore what was altered "
            "from a copy, and do not rely on the service until then."
        )
    return report
