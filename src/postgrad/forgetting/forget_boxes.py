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

import torch
from torch import Tensor

from postgrad.core.config import RuntimeConfig, dump_config, load_config, nearest
from postgrad.core.distributed import first_rank
from postgrad.core.report import Report
from postgrad.core.runtime import Job, finish, finished, start
from postgrad.errors import ConfigError, DataError, GateError
from postgrad.forgetting.blocks import ffn_blocks
from postgrad.forgetting.box_files import SHAPES, BoxesConfig, check_boxes, load_boxes
from postgrad.forgetting.boxes import BoxSet, few_of_each
from postgrad.forgetting.boxes_report import Found, boxes_sections, look, precisions, summary
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
from postgrad.forgetting.erase_boxes import PRESETS, BoxMaterial, EraseBoxesConfig, check_erase_boxes, erase_boxes
from postgrad.forgetting.network_service import Carried, NetworkService
from postgrad.forgetting.policy import PolicyConfig, check_policy
from postgrad.forgetting.request import ForgetRequest, manifest_hash, read_requests, with_salt
from postgrad.forgetting.schedules import TaskSplit
from postgrad.forgetting.service_parts import adapter_name
from postgrad.forgetting.service_runs import entries_of_run

LOSS = None
"""Each request has a curve of its own, in requests/<request>/."""
NUM_NOISE, NOISE_SIDE = 2, 64
"""Images of noise on which answers are compared bit for bit, and their height and width."""
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
    check_policy(limits(config))
    if config.preset != "own" and config.erase != EraseBoxesConfig():
        raise ConfigError(f"erase: settings are given, but preset is {config.preset!r}; set preset to 'own'.")
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
        "boxes": sum(train.counts.values()), **named, "models trained": int(config.model.path == TINY),
        "requests to revoke": len(config.revoke),
    }  # fmt: skip


def limits(config: ForgetBoxesConfig) -> PolicyConfig:
    """Read the policy."""
    return load_config(PolicyConfig, config.policy) if config.policy else PolicyConfig()


def erasing(config: ForgetBoxesConfig) -> EraseBoxesConfig:
    """Give the settings of the preset."""
    return config.erase if config.preset == "own" else PRESETS[config.preset]


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


def noise(detector: Detector) -> Tensor:
    """Compute what a detector makes of noise, always the same."""
    drawn = torch.randn(NUM_NOISE, 3, NOISE_SIDE, NOISE_SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = detector.network.eval()(pixel_values=drawn.to(detector.device))
    return torch.cat([out.logits.flatten(), out.pred_boxes.flatten()])


def material(
    service: NetworkService, request: ForgetRequest, boxes: BoxSet, split: TaskSplit, shots: int, seed: int
) -> BoxMaterial:
    """Choose the images a request is learnt from."""
    forget, retain = boxes.showing(split.forget), boxes.showing(split.remain)
    if few := request.shots or shots:
        forget, retain = few_of_each(forget, few, seed), few_of_each(retain, few, seed)
    return BoxMaterial(forget, retain, len(service.active))


@dataclass(frozen=True, eq=False)
class Bench:
    """What the requests of a run are served with."""

    config: ForgetBoxesConfig
    service: NetworkService
    detector: Detector
    boxes: tuple[BoxSet, BoxSet]
    before: Found
    """By the base, on test images."""
    job: Job

    def apply(self, request: ForgetRequest, split: TaskSplit) -> None:
        """Carry out a request: train its adapter, write it, measure, enter it in the ledger, certify."""
        config, service, network = self.config, self.service, self.detector.network
        earlier = service.active
        service.show(earlier)
        chosen = material(service, request, self.boxes[0], split, config.shots, self.job.seed)
        part = replace(self.job, folder=self.job.folder / "requests" / request.id)
        settings, name = erasing(config), adapter_name(request.id)
        outcome = erase_boxes(self.detector, chosen, name, [adapter_name(each) for each in earlier], settings, part)
        service.write(request)
        counts = {
            "num_earlier": float(chosen.number), "steps": float(outcome.steps),
            "min_shots": float(min(chosen.forget.counts.values())),
        }  # fmt: skip
        metrics = self.measure(split)
        carried = Carried(
            blocks=ffn_blocks(network), num_forget=len(chosen.forget), num_retain=len(chosen.retain),
            manifest_hash=manifest_hash(request.salt, chosen.forget.hashes), config=dump_config(settings),
            seed=self.job.seed, hardware=str(self.job.device), metrics={**metrics, **counts}, policy=limits(config),
        )  # fmt: skip
        service.enter(request, carried)

    def measure(self, split: TaskSplit) -> dict[str, float]:
        """Measure the detector as it is on test images."""
        return precisions(self.before, look(self.detector, self.boxes[1]), split)

    def revoke(self, name: str) -> None:
        """Take a request back; the classes it had forgotten are measured again."""
        back = self.service.labels([name])
        gone = self.service.labels(each for each in self.service.active if each != name)
        kept = tuple(label for label in sorted(self.boxes[1].counts) if label not in (*back, *gone))

        def metrics() -> dict[str, float]:
            found = self.measure(TaskSplit(kept, back, gone))
            names = {"ap_r": "ap_r", "ap_f": "ap_back", "ap_o": "ap_o"}
            return {new: found[old] for old, new in names.items() if old in found}

        self.service.revoke(name, metrics)


def run(config: ForgetBoxesConfig) -> Report:
    """Serve the requests and report what is found of what was forgotten and of what was kept."""
    job = start(config, check, "forget_boxes")
    if report := finished(job):
        return _judged(report)
    train, test = load_boxes(config.data, job.seed)
    requests = requests_of(config)
    if config.model.path == TINY:
        splits_of(requests, train, ())  # refuses before anything is trained
    detector, name = base_of(config, train, job)
    boxes = train.renamed(detector.classes), test.renamed(detector.classes)
    before = look(detector, boxes[1])
    folder = Path(config.service) if config.service else job.folder / "service"
    with NetworkService(folder, detector.network, detector.classes, name, lambda: noise(detector)).open() as service:
        mine = first_rank(lambda: entries_of_run(folder, job))
        bench = Bench(config, service, detector, boxes, before, job)
        others = [each for each in service.active if each not in [request.id for request in requests]]
        for request, split in zip(requests, splits_of(requests, boxes[0], service.labels(others)), strict=True):
            if service.carried_out(request) is None:
                bench.apply(request, split)
        revoked = [entry.body.request for entry in mine if isinstance(entry.body, RevokeBody)]
        for each in config.revoke:
            if each not in revoked:
                bench.revoke(each)
        service.show(service.active)
        after = look(detector, boxes[1])
        findings = service.findings(None if requests or config.revoke else bench.measure)
        results = {**summary(service, before, after), "errors": len(findings)}
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
