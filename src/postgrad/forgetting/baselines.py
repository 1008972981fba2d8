"""Baselines of continual forgetting: what else can be done with a request, behind one call.

    run_baseline("scrub", classifier, forget, retain, BaselineConfig(), job) -> Classifier

`gold` and `retrain` begin at fresh weights, which the caller hands in as the classifier; `gold` is handed all remaining
data, `retrain` the few images kept for replay. What the papers' tables call Retrain is `retrain`: no gold standard.

Source:  each method's paper and GS-LoRA's released code (arXiv 2403.11530), named at its objective in
         baselines_steps.py, in regularisers.py and in saliency.py; numbers and schedules in baselines_table.py.
Differs: AdamW throughout, where SCRUB, SalUn, NegGrad+ and finetuning have SGD or Adam; one pass for both batches of a
         step; an epoch is a pass over the retained images, where GS-LoRA's LwF, DER, FDR and LIRF count passes over
         those to forget. Random labels are drawn from the kept classes; GS-LoRA takes the first classes of the data, as
         many as are forgotten, be they kept or not: labels="official". The original model's outputs are computed once.
         Heads with a margin train without it.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from postgrad.core.config import OptimConfig, TrainConfig
from postgrad.core.distributed import first_rank
from postgrad.core.files import write_json
from postgrad.core.loop import train
from postgrad.core.precision import autocast
from postgrad.core.runtime import Job, stage_seed
from postgrad.core.vision import ImageSet
from postgrad.core.vision_models import Classifier, Seen, classifier_hash
from postgrad.errors import ArtefactError, DataError
from postgrad.forgetting.baselines_batches import Deal, alternating, together
from postgrad.forgetting.baselines_parts import middle_block, part_names, train_only
from postgrad.forgetting.baselines_steps import Objective, Original, Task, baseline_step, captured
from postgrad.forgetting.baselines_table import BASELINES, Baseline, BaselineConfig, Need, check_baselines, settled
from postgrad.forgetting.distillation import attention_map
from postgrad.forgetting.regularisers import ewc_importance, gradient_mean, l2_importance, mas_importance
from postgrad.forgetting.saliency import dampened, restricted, saliency_masks

__all__ = ["BASELINES", "Baseline", "BaselineConfig", "check_baselines", "observe", "run_baseline"]

AVERAGE = 0.1
"""Weight of a round's outcome in the running average of SCRUB-S."""


def run_baseline(
    name: str, classifier: Classifier, forget: ImageSet, retain: ImageSet, config: BaselineConfig, job: Job
) -> Classifier:
    """Apply a baseline to a request and return the changed classifier; the one handed in stays as it is.

    What is written lies in baselines/NAME of the job's folder; a stopped run continues there.

    Args:    classifier: the original model; for gold and retrain, one with fresh weights.
             forget: images to forget; gold, retrain and finetune do not look at them.
             retain: images to keep; for gold, all of them.
    Raises:  ConfigError: no such baseline, or a setting that makes no sense.
             DataError: no images, or classes other than the classifier's.
             ArtefactError: the folder holds this baseline of another request.
    """
    baseline = settled(name, config)
    _check_data(name, baseline, classifier, forget, retain)
    stage = replace(job, method=name, folder=job.folder / "baselines" / name)
    mark = _fingerprint(classifier, forget, retain, config, job.seed)
    first_rank(lambda: _claim(stage.folder, mark))
    student = copy.deepcopy(classifier)
    train_only(student, part_names(student, baseline.trains, config.last_blocks))
    if baseline.objective is None:
        _dampen(student, forget, retain, baseline.numbers, config.batch_size)
    else:
        task = _prepare(baseline, student, forget, retain, config, stage)
        _train(baseline, baseline.objective, task, config, stage)
    train_only(student, tuple(own for own, param in classifier.named_parameters() if param.requires_grad))
    return student.eval()


def observe(
    classifier: Classifier, images: ImageSet, batch_size: int, job: Job, block: str = ""
) -> tuple[Seen, Float[Tensor, "N M"] | None]:
    """Return a classifier's features and logits of all images, and the attention maps of a block if one is named.

    In evaluation mode, without gradients; on the CPU.
    """
    features, logits, maps = [], [], []
    training = classifier.training
    classifier.eval()
    with torch.no_grad(), autocast(job), captured(classifier, block) as kept:
        for batch in torch.split(images.images, batch_size):
            seen: Seen = classifier(batch.to(job.device))
            features.append(seen.features.cpu())
            logits.append(seen.logits.cpu())
            maps += [attention_map(hidden).cpu() for hidden in kept]
            kept.clear()
    classifier.train(training)
    return Seen(torch.cat(features), torch.cat(logits)), torch.cat(maps) if maps else None


def _check_data(name: str, baseline: Baseline, classifier: Classifier, forget: ImageSet, retain: ImageSet) -> None:
    if len(retain) == 0 or (baseline.sees_forget and len(forget) == 0):
        raise DataError(f"{name}: expected images to keep and to forget, found {len(retain)} and {len(forget)}.")
    for part in (forget, retain):
        if part.classes != classifier.classes:
            raise DataError(
                f"{name}: expected images of the classifier's {len(classifier.classes)} classes, in its order, found "
                f"{len(part.classes)}: {', '.join(part.classes[:5])}, ..."
            )


def _fingerprint(
    classifier: Classifier, forget: ImageSet, retain: ImageSet, config: BaselineConfig, seed: int
) -> dict[str, object]:
    """Describe what a run depends on: settings, seed, and hashes of weights and of images with their labels."""

    def digest(data: object) -> str:
        return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]

    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    return {
        "settings": settings,
        "seed": seed,
        "classifier": digest(classifier_hash(classifier)),
        "forget": digest([forget.hashes, forget.labels.tolist()]),
        "retain": digest([retain.hashes, retain.labels.tolist()]),
    }


def _claim(folder: Path, mark: Mapping[str, object]) -> None:
    """Take the folder, unless another run's files are in it."""
    path = folder / "baseline.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, mark)
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    different = [key for key, value in mark.items() if there.get(key) != value]
    if different:
        raise ArtefactError(
            f"{path}: expected a run with the same classifier, images, settings and seed, found another "
            f"{', '.join(different)}. Delete {folder}, or give each request a folder of its own."
        )


def _dampen(
    student: Classifier, forget: ImageSet, retain: ImageSet, numbers: Mapping[str, float], batch_size: int
) -> None:
    """Dampen the weights that train, in place.

    Batches are of one class as far as they can, as in the released code: mixed ones have smaller gradients.
    """
    others = retain
    if numbers["whole"]:
        both = torch.cat([retain.images, forget.images])
        others = ImageSet(both, torch.cat([retain.labels, forget.labels]), retain.classes)
    means = [
        gradient_mean(
            student,
            part.select(part.labels.argsort(stable=True)),
            batch_size,
            F.cross_entropy,
            lambda gradient, _: gradient.square(),
        )
        for part in (others, forget)
    ]
    with torch.no_grad():
        for name, param in student.named_parameters():
            if name in means[0]:
                sides = (means[0][name], means[1][name])
                param.copy_(dampened(param, *sides, alpha=numbers["alpha"], strength=numbers["lambda"]))


def _prepare(
    baseline: Baseline, student: Classifier, forget: ImageSet, retain: ImageSet, config: BaselineConfig, job: Job
) -> Task:
    """Look at the original model, which the student still is, as far as the baseline asks for it."""
    num_classes, kept = len(student.classes), tuple(sorted(set(retain.labels.tolist())))
    num_forgotten = len(set(forget.labels.tolist()))
    numbers = dict(baseline.numbers)
    if numbers.get("bound") == 0.0:
        numbers["bound"] = 2 * math.log(num_classes)
    return Task(
        student=student,
        retain=retain,
        forget=forget,
        numbers=numbers,
        allowed=kept if config.labels == "kept" else tuple(range(num_forgotten)),
        columns=tuple(range(num_forgotten, num_classes)) if baseline.by_position else kept,
        middle=middle_block(student) if baseline.need == "attention" else "",
        original=_original(baseline.need, student, forget, retain, config.batch_size, job),
        seed=job.seed,
    )


def _original(
    need: Need, student: Classifier, forget: ImageSet, retain: ImageSet, batch_size: int, job: Job
) -> Original:
    """Compute what a baseline needs of the original model."""
    generator = torch.Generator().manual_seed(stage_seed(job.seed, "importance"))
    mixed = retain.select(torch.randperm(len(retain), generator=generator))
    weights = {name: param.detach().clone() for name, param in student.named_parameters() if param.requires_grad}
    match need:
        case "":
            return Original()
        case "retain":
            return Original(retain=observe(student, retain, batch_size, job)[0])
        case "both":
            sides = [observe(student, part, batch_size, job)[0] for part in (retain, forget)]
            return Original(retain=sides[0], forget=sides[1], weights=weights)
        case "attention":
            seen, maps = observe(student, forget, batch_size, job, middle_block(student))
            return Original(forget=seen, attention=maps)
        case "l2":
            return Original(weights=weights, importance=l2_importance(weights))
        case "ewc":
            return Original(weights=weights, importance=ewc_importance(student, mixed, batch_size))
        case "mas":
            return Original(weights=weights, importance=mas_importance(student, mixed, batch_size))
        case "mask":
            sums = gradient_mean(student, forget, batch_size, F.cross_entropy, lambda gradient, _: gradient)
            return Original(importance=sums)


def _train(baseline: Baseline, objective: Objective, task: Task, config: BaselineConfig, job: Job) -> None:
    """Train the student: on both sets in each step, or in rounds of passes over one set and the other."""
    deal = Deal(job.rank, job.world, config.micro_images)
    settings = TrainConfig(
        batch_size=config.batch_size,
        log_every=config.log_every,
        save_every=config.save_every,
        keep_checkpoints=1,
        optim=OptimConfig(
            lr=baseline.lr,
            weight_decay=baseline.weight_decay,
            schedule=baseline.schedule,
            warmup=baseline.warmup,
            clip=0.0,
        ),
    )
    sizes = (len(task.retain), len(task.forget), config.batch_size)
    if baseline.rounds == 1:
        batches = together(*sizes, baseline.epochs, seed=job.seed, deal=deal, with_forget=baseline.sees_forget)
        with _masked(baseline, task):
            train(task.student, batches, partial(baseline_step, task, objective), None, settings, job)
        return
    rounds = min(baseline.rounds, baseline.epochs)
    average = dict(task.original.weights)
    for number in range(rounds):
        epochs = baseline.epochs * (number + 1) // rounds - baseline.epochs * number // rounds
        stage = replace(
            job, seed=stage_seed(job.seed, "round", number), folder=job.folder / f"round-{number}"
        )  # fmt: skip
        first_rank(partial(stage.folder.mkdir, exist_ok=True))
        part = replace(task, original=replace(task.original, weights=average))
        passes = alternating(*sizes, epochs, seed=stage.seed, deal=deal)
        train(task.student, passes, partial(baseline_step, part, objective), None, settings, stage)
        average = _averaged(average, task.student, AVERAGE if number else 1.0)


def _averaged(average: Mapping[str, Tensor], student: Classifier, weight: float) -> dict[str, Tensor]:
    """Move an average of weights towards a student's; the first round's outcome takes its place."""
    own = dict(student.named_parameters())
    return {name: torch.lerp(value, own[name].detach(), weight) for name, value in average.items()}


@contextmanager
def _masked(baseline: Baseline, task: Task) -> Iterator[None]:
    """Keep gradients within the saliency mask, where the baseline has one."""
    if baseline.need != "mask":
        yield
        return
    masks = saliency_masks(task.original.importance, task.numbers["share"])
    with restricted(dict(task.student.named_parameters()), masks):
        yield
