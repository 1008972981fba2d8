"""A small service with a trained base, as `postgrad forget` leaves them: made once a process, then copied."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from postgrad.core.config import TrainConfig
from postgrad.core.runtime import Job
from postgrad.core.vision import ImagesConfig, ImageSet, load_images
from postgrad.core.vision_models import Classifier, ClassifierConfig, save_classifier
from postgrad.forgetting.base import BaseConfig, fresh, train_base
from postgrad.forgetting.entries import Entry
from postgrad.forgetting.erase_config import PRESETS, EraseConfig
from postgrad.forgetting.metrics import acc_table
from postgrad.forgetting.policy import PolicyConfig
from postgrad.forgetting.request import ForgetRequest
from postgrad.forgetting.schedules import TaskSplit
from postgrad.forgetting.service import Service
from postgrad.forgetting.service_parts import answers

SEED = 3
DATA = ImagesConfig(limit=240)
MODEL = ClassifierConfig(width=16, depth=2, heads=2, patch=4)
PLAIN = PRESETS["gs-lora"].train
QUICK = replace(
    PRESETS["gs-lora"], rank=4, scale=4.0, select_epochs=1, blocks=1, snap=0.0, patience=0, floor=100.0,
    train=replace(PLAIN, epochs=8, batch_size=32, log_every=100, optim=replace(PLAIN.optim, lr=2e-2)),
)  # fmt: skip
CONFIGS: tuple[EraseConfig, PolicyConfig] = (QUICK, PolicyConfig())


@dataclass(frozen=True)
class Made:
    """A service and its base."""

    service: Path
    model: Path


def job(folder: Path) -> Job:
    """Make a run's frame without starting a run."""
    folder.mkdir(parents=True, exist_ok=True)
    return Job("forget", folder, SEED, torch.device("cpu"), torch.float32, 0, 1, True)


@cache
def images() -> tuple[ImageSet, ImageSet]:
    """Load a few digits: training and test images."""
    return load_images(DATA, SEED)


def request(name: str, *classes: str) -> ForgetRequest:
    """Make a request with a salt that is no secret."""
    return ForgetRequest(id=name, classes=classes, salt="5a" * 16)


def load(path: Path) -> Classifier:
    """Load a base."""
    config = replace(MODEL, path=str(path))
    return fresh(config, images()[0].classes, images()[0], job(path.parent)).eval()


def measured(service: Service, asked: ForgetRequest, base: Classifier) -> Mapping[str, float]:
    """Measure as a forgetting run does: accuracies, and the same of the base."""
    test = images()[1]
    old = [name for each in service.active for name in service.request(each).classes]
    numbers = {name: number for number, name in enumerate(test.classes)}
    gone = [numbers[name] for name in (*asked.classes, *old)]
    split = TaskSplit(
        tuple(label for label in range(len(test.classes)) if label not in gone),
        tuple(sorted(numbers[name] for name in asked.classes)),
        tuple(sorted(numbers[name] for name in old)),
    )
    after, before = (answers(model, test).argmax(1) for model in (service.classifier, base))
    return acc_table(test.labels, after, split, pretrained=before, start=before).row()


def carry_out(service: Service, asked: ForgetRequest, base: Classifier, folder: Path) -> Entry:
    """Apply a request."""
    material = service.material(asked, images()[0])
    return service.apply(asked, material, CONFIGS, job(folder), lambda: measured(service, asked, base))


@cache
def _original() -> tuple[TemporaryDirectory[str], Made]:
    """Train a base and serve two requests."""
    keeper = TemporaryDirectory()
    folder = Path(keeper.name)
    train = images()[0]
    classifier = fresh(MODEL, train.classes, train, job(folder))
    optim = replace(BaseConfig().train.optim, lr=1e-2)
    steps = TrainConfig(epochs=25, batch_size=32, save_every=0, log_every=100, optim=optim)
    train_base(classifier, train, BaseConfig(train=steps), job(folder / "training"))
    made = Made(folder / "service", folder / "base")
    save_classifier(classifier, made.model)
    with Service.open(made.service, load(made.model), "base") as service:
        for name, asked in (("first", ("0", "6")), ("second", ("4",))):
            carry_out(service, request(name, *asked), load(made.model), folder / name)
    return keeper, made


def base() -> Path:
    """Give the folder of a trained base; nobody writes there."""
    return _original()[1].model


def forgotten(folder: Path) -> Made:
    """Copy a service that has two requests in use, first and second, and its base into a folder."""
    made = Made(folder / "service", folder / "base")
    _, original = _original()
    shutil.copytree(original.service, made.service)
    shutil.copytree(original.model, made.model)
    return made
