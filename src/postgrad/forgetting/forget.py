"""Forget on request: a pretrained classifier loses the classes it is asked to, one request after another.

Formula:   CE(x_r) + beta relu(BND - CE(x_f)) + alpha sum_g ||g||_2 + prototype terms (forgetting/losses.py), trained by
           low-rank pairs on the feed-forward layers; the default adds the leak terms of forgetting/leakfree.py.
Source:    GS-LoRA (arXiv 2403.11530), GS-LoRA++ (arXiv 2501.09705).
Differs:   one revocable adapter a request on few blocks, an audit trail, a leakage audit against a model that never saw
           the data, early stops; presets "paper" and "paper++" keep to the released scripts (forgetting/erase.py).

    postgrad forget --data.path faces/ --model.path my-vit --no-gold --requests request1.json request2.json

Without arguments: a small vision transformer learns scikit-learn's digits and serves three requests and a revocation.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from postgrad.core.config import RuntimeConfig, nearest
from postgrad.core.distributed import first_rank
from postgrad.core.report import Report
from postgrad.core.runtime import Job, finish, finished, start
from postgrad.core.vision import ImagesConfig, ImageSet, check_images, few, load_images, share
from postgrad.core.vision_models import Classifier, ClassifierConfig, save_classifier
from postgrad.errors import ConfigError, DataError, GateError
from postgrad.forgetting.base import BUILDERS, BaseConfig, fresh, train_base
from postgrad.forgetting.baselines_table import BaselineConfig
from postgrad.forgetting.bench import Bench, Outcome, Shown, beside, left, levels_for, relearned, scopes_of
from postgrad.forgetting.comparison import chosen, compare
from postgrad.forgetting.erase_config import PRESETS, EraseConfig, check_erase, check_preset, preset_of
from postgrad.forgetting.forget_report import forget_sections, summary
from postgrad.forgetting.leakage_audit import AuditConfig, Views, check_audit
from postgrad.forgetting.losses import forget_loss
from postgrad.forgetting.policy import check_policy, read_policy
from postgrad.forgetting.preview import Outlook, in_service, preview
from postgrad.forgetting.request import ForgetRequest, read_requests, with_salt
from postgrad.forgetting.sample_audit import Scope
from postgrad.forgetting.schedules import TaskSplit, class_order, task_splits
from postgrad.forgetting.service import Service
from postgrad.forgetting.service_runs import entries_of_run
from postgrad.forgetting.states import states
from postgrad.forgetting.status import standing_lines
from postgrad.forgetting.views import passes

__all__ = ["LOSS", "ForgetConfig", "check", "forget_loss", "plan", "run"]

LOSS = None
"""Each request has a curve of its own, in requests/<request>/."""
DRAWN = ("tiny", *BUILDERS)
Plan = dict[str, str | int | float]


@dataclass(frozen=True, kw_only=True)
class ForgetConfig:
    """A model, requests, and what to measure."""

    requests: tuple[str, ...] = ()
    """Request files, in order; none = the last classes of a shuffled order, as `tasks` says."""
    tasks: tuple[int, int, int] = (8, 2, 3)
    """Without request files: classes the first request keeps (it forgets the others), classes a request, number of
    requests."""
    missing: int = 0
    """Without request files: how many of the kept classes have no image to learn from."""
    shots: int = 0
    """Images of each class to work with, forgotten and kept ones; 0 = the share."""
    share: float = 0.3
    """Share of the training images that requests work with."""
    preset: Literal["safe", "thorough", "gs-lora", "gs-lora++", "paper", "paper++", "own"] = "safe"
    """How requests are erased; own = as the settings under erase say."""
    gold: bool = True
    """Train models that never saw the forgotten classes, to compare with: each costs as much as the base, which must be
    trained here, too."""
    baselines: tuple[str, ...] = ()
    """Other presets and methods to serve the same requests with, for a table; all = every one."""
    revoke: tuple[str, ...] = ()
    """Requests to revoke at the end; none = the second of those without files."""
    service: str = ""
    """Service folder; "" = service/ in the run folder. A folder of an earlier run is gone on with."""
    policy: str = ""
    """File of limits; a request that misses one makes the command fail. "" = the usual ones, shown only."""
    erase: EraseConfig = EraseConfig()
    """How a request is erased, with preset own."""
    baseline: BaselineConfig = BaselineConfig()
    """How baselines train."""
    base: BaseConfig = BaseConfig()
    """How the model is trained first, if it is not a trained one."""
    audit: AuditConfig = AuditConfig()
    """How hard the leakage audit looks."""
    model: ClassifierConfig = ClassifierConfig()
    """The model."""
    data: ImagesConfig = ImagesConfig()
    """Images of all classes."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Where and how the run happens."""


def check(config: ForgetConfig) -> None:
    """Refuse settings that contradict each other."""
    check_images(config.data)
    check_erase(config.erase)
    check_audit(config.audit)
    check_policy(read_policy(config.policy))
    check_preset(config.preset, config.erase, EraseConfig())
    if not 0 < config.share <= 1 or config.shots < 0 or config.missing < 0:
        raise ConfigError(
            "expected share above 0 and at most 1, shots and missing at least 0; found "
            f"{config.share}, {config.shots}, {config.missing}."
        )
    chosen(config.baselines)
    if config.gold and config.model.path not in DRAWN:
        raise ConfigError(
            f"gold: a model that never saw the forgotten classes can be trained only where the base is trained, too; "
            f"expected model.path {' or '.join(DRAWN)}, found {config.model.path!r}. Set gold to false."
        )
    requests = read_requests(map(Path, config.requests))
    _check_single(config, requests)
    known = [request.id for request in requests] or [_made_id(number) for number in range(config.tasks[2])]
    if unknown := [name for name in config.revoke if name not in known]:
        raise ConfigError(f"revoke: no request {unknown} among {known}. Use `postgrad revoke` for earlier ones.")


def _check_single(config: ForgetConfig, requests: Sequence[ForgetRequest]) -> None:
    """Refuse what has no meaning for requests for single images."""
    single = [request for request in requests if request.samples]
    if mixed := [request.id for request in single if request.classes]:
        raise ConfigError(
            f"requests: expected classes or samples in one request, found both in {mixed}: classes are to be unknown, "
            "single images as unseen ones are. Make two requests of it."
        )
    if few_ones := [request.id for request in single if request.shots]:
        raise ConfigError(
            f"requests: shots: single images are all forgotten; expected no shots, found some in {few_ones}."
        )
    if single and config.baselines:
        raise ConfigError(
            f"baselines: other methods forget whole classes only; found single images in "
            f"{[request.id for request in single]}. Leave baselines empty."
        )


def plan(config: ForgetConfig) -> Plan:
    """Say what a run would do."""
    check(config)
    train, test = load_images(config.data, config.runtime.seed)
    requests = requests_of(config, train)
    found, service = scopes(config, (train, test), requests), Path(config.service or _folder(config) / "service")
    earlier = in_service(service)
    return {
        "training images": len(train), "test images": len(test), "classes": len(train.classes),
        "images to work with": len(working(config, train)), **(standing_lines(service) if earlier else {}),
        **preview(_outlook(config, train), requests, found, earlier),
        "models trained": 1 * (config.model.path in DRAWN) + config.gold * len(requests),
        "baselines": len(chosen(config.baselines)),
    }  # fmt: skip


def _folder(config: ForgetConfig) -> Path:
    return Path(config.runtime.folder or "runs/forget")


def _outlook(config: ForgetConfig, train: ImageSet) -> Outlook:
    """Load the base where it is trained already, else draw it."""
    job = Job("forget", _folder(config), config.runtime.seed, torch.device("cpu"), torch.float32, 0, 1, True)
    made = job.folder / "base" / "model"
    there = config.model.path not in DRAWN or made.is_dir()
    model = replace(config.model, path=str(made)) if config.model.path in DRAWN and there else config.model
    classifier = fresh(model, train.classes, train, job).eval()
    settings, least = preset_of(config.preset, config.erase, PRESETS), read_policy(config.policy).few_shot_min
    return Outlook(train, working(config, train), classifier, there, settings, least)


def requests_of(config: ForgetConfig, images: ImageSet) -> list[ForgetRequest]:
    """Read the requests, or make those of `tasks`."""
    if config.requests:
        return [with_salt(request) for request in read_requests(map(Path, config.requests))]
    salt = f"{config.runtime.seed:032x}"
    named = [tuple(images.classes[label] for label in split.forget) for split in splits_of(config, images, ())]
    return [ForgetRequest(id=_made_id(i), classes=classes, salt=salt) for i, classes in enumerate(named)]


def splits_of(
    config: ForgetConfig, images: ImageSet, requests: Sequence[ForgetRequest], before: Sequence[int] = ()
) -> list[TaskSplit]:
    """Say for each request which classes are kept, forgotten now, and were before.

    Args:   before: classes that earlier runs on the same service have forgotten.
    Raises: DataError: a class that is not there or was forgotten before, or none left to keep.
            ConfigError: `tasks` does not fit the classes.
    """
    num = len(images.classes)
    if not config.requests:
        if sum(config.tasks[:2]) != num:
            raise ConfigError(
                f"tasks: what the first request keeps and forgets must be all {num} classes, found {config.tasks[0]} "
                f"and {config.tasks[1]}."
            )
        made = task_splits(class_order(num), *config.tasks, config.missing)
        splits = [TaskSplit(each.remain, each.forget, (*before, *each.old), each.missing) for each in made]
        return [replace(each, remain=tuple(c for c in each.remain if c not in before)) for each in splits]
    found: list[TaskSplit] = []
    old = list(before)
    for request in requests:
        now = [_place(name, request, images.classes) for name in request.classes]
        remain = tuple(label for label in range(num) if label not in (*old, *now))
        again = [images.classes[label] for label in now if label in old]
        if again or not remain:
            problem = f"{again} was forgotten before" if again else "no class would be left to keep"
            raise DataError(f"request {request.id!r}: {problem}. Take classes out of this request.")
        found.append(TaskSplit(remain, tuple(now), tuple(old)))
        old += now
    return found


def _made_id(number: int) -> str:
    return f"request-{number + 1}"


def _place(name: str, request: ForgetRequest, classes: Sequence[str]) -> int:
    if name not in classes:
        guess = nearest(name, classes)
        hint = f"Nearest is {guess!r}." if guess else f"There are {', '.join(classes[:5])}, and so on."
        raise DataError(f"request {request.id!r}: no class {name!r} among {len(classes)}. {hint}")
    return classes.index(name)


def requests_before(service: Service, requests: Sequence[ForgetRequest], job: Job) -> list[ForgetRequest]:
    """List the requests in use, or baked, of earlier runs on a service, as it was when this run came to it."""
    num_mine = len(first_rank(lambda: entries_of_run(service.folder, job)))
    found = states(service.ledger.entries()[: -num_mine or None])
    mine = [request.id for request in requests]
    return [service.request(name) for name, state in found.items() if state != "revoked" and name not in mine]


def working(config: ForgetConfig, images: ImageSet) -> ImageSet:
    """Choose the training images that requests may use."""
    if config.shots:
        return few(images, config.shots, config.runtime.seed)
    return share(images, config.share, config.runtime.seed)


def base_of(config: ForgetConfig, images: ImageSet, job: Job) -> tuple[Classifier, str]:
    """Load the base, or train one and keep it; return it and its name."""
    classifier = fresh(config.model, images.classes, images, job)
    if config.model.path not in DRAWN:
        return classifier.eval(), config.model.path
    train_base(classifier, images, config.base, replace(job, folder=job.folder / "base"))
    if not (job.folder / "base" / "model").is_dir():
        save_classifier(classifier, job.folder / "base" / "model")
    return classifier.eval(), "base/model"


def gold_models(
    config: ForgetConfig, images: tuple[ImageSet, ImageSet], scopes: Sequence[Scope], job: Job
) -> Iterator[Classifier]:
    """Train gold for each request, from the same first weights on what is left."""
    for number, scope in enumerate(scopes, 1) if config.gold else ():
        part = replace(job, folder=job.folder / f"gold-{number}")
        classifier = fresh(config.model, images[0].classes, images[0], job)
        train_base(classifier, left(images[0], scope), config.base, part)
        yield classifier


def gold_views(
    config: ForgetConfig, images: tuple[ImageSet, ImageSet], splits: Sequence[TaskSplit], job: Job
) -> list[Views]:
    """Train gold for each request for classes; show it all images."""
    return [passes(model, images) for model in gold_models(config, images, [Scope(each) for each in splits], job)]


def scopes(
    config: ForgetConfig,
    images: tuple[ImageSet, ImageSet],
    requests: Sequence[ForgetRequest],
    earlier: Sequence[ForgetRequest] = (),
) -> list[Scope]:
    """Say of each request which classes and images it is about.

    Args:   earlier: requests of runs before on the same service.
    Raises: as `splits_of` and `scopes_of`.
    """
    names = {name for each in earlier for name in each.classes}
    before = [label for label, name in enumerate(images[0].classes) if name in names]
    return scopes_of(requests, splits_of(config, images[0], requests, before), images, earlier)


def serve(bench: Bench, service: Service, config: ForgetConfig, job: Job) -> list[Outcome]:
    """Apply the requests that were not applied yet; audit after each, in either case."""
    (train, test), audits = bench.images, list[Outcome]()
    few_images = working(config, train)
    settings = preset_of(config.preset, config.erase, PRESETS), read_policy(config.policy)
    before = service.earlier([request.id for request in bench.requests])
    for number, request in enumerate(bench.requests):

        def figures(number: int = number) -> Mapping[str, float]:
            audits.append(bench.outcome(config.preset, service.classifier, number))
            return audits[-1].figures()

        if service.carried_out(request) is None:
            scope = bench.scopes[number]
            material = service.material(request, beside(few_images, train, scope), scope.split.missing)
            if scope.rows:
                service.show(service.active)
                material = replace(material, levels=levels_for(service.classifier, material.forget, test))
            part = replace(job, folder=job.folder / "requests" / request.id)
            service.apply(request, material, settings, part, figures)
        else:
            service.show([*before, *(each.id for each in bench.requests[: number + 1])])
            figures()
    return audits


def run(config: ForgetConfig) -> Report:
    """Serve the requests and report what was forgotten, kept, and still leaks."""
    job = start(config, check, "forget")
    if report := finished(job):
        return _judged(config, report)
    train, test = (images.to(job.device) for images in load_images(config.data, job.seed))
    images, requests = (train, test), requests_of(config, train)
    scopes(config, images, requests)  # refuses before anything is trained
    classifier, name = base_of(config, train, job)
    untouched = copy.deepcopy(classifier)
    with Service.open(Path(config.service) if config.service else job.folder / "service", classifier, name) as service:
        earlier = requests_before(service, requests, job)
        if earlier and config.baselines:
            raise ConfigError(
                f"baselines: expected a service without requests of earlier runs, since other methods begin at the "
                f"base; found {[each.id for each in earlier]} in {service.folder}."
            )
        found = scopes(config, images, requests, earlier)
        gold = [
            Shown(passes(model, images), relearned(model, images, scope, config.audit.relearn, job.seed))
            for model, scope in zip(gold_models(config, images, found, job), found, strict=bool(config.gold))
        ]
        bench = Bench(config.audit, images, requests, found, untouched, gold, job.seed)
        audits = serve(bench, service, config, job)
        others = compare(config.baselines, untouched, bench, working(config, train), job, config.baseline)
        service.show(service.active)
        for request in config.revoke or (() if config.requests else tuple(each.id for each in requests[1:2])):
            if request in service.active:
                service.revoke(request, test)
        names = [request.id for request in requests]
        sections = forget_sections(service, audits, others, *bench.references_of(audits), names=names)
        report = Report("forget", job.folder, summary(audits, service), sections)
    return _judged(config, finish(job, report))


def _judged(config: ForgetConfig, report: Report) -> Report:
    """Let the command fail where a policy of the user's own is not kept."""
    missed = int(report.results["limits_missed"])
    if config.policy and missed:
        raise GateError(
            f"{missed} limits of {config.policy} are not kept; {report.folder / 'report.html'} and the certificates "
            "say which. The requests are applied: revoke them, or erase again with other settings."
        )
    return report
