"""Digits, and a small vision transformer of three blocks that reads them: what tests of erasing share."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from postgrad.core.runtime import Job
from postgrad.core.vision import ImagesConfig, ImageSet, load_images
from postgrad.core.vision_models import Classifier, ClassifierConfig
from postgrad.forgetting.base import BaseConfig, fresh, train_base
from postgrad.forgetting.erase import Material
from postgrad.forgetting.erase_config import PRESETS, EraseConfig

SEED = 3
DATA = ImagesConfig(limit=240)
MODEL = ClassifierConfig(width=32, depth=3, heads=2, patch=4)
GONE, LATER = (8, 9), (3,)
"""Classes of a first request and of a second one."""
PLAIN = PRESETS["gs-lora"]


def job(folder: Path, seed: int = SEED) -> Job:
    """Make a run's frame without starting a run."""
    folder.mkdir(parents=True, exist_ok=True)
    return Job("forget", folder, seed, torch.device("cpu"), torch.float32, 0, 1, True)


@cache
def images() -> tuple[ImageSet, ImageSet]:
    """Load a few digits: training and test images."""
    return load_images(DATA, SEED)


def drawn(seed: int = SEED) -> Classifier:
    """Draw a classifier that has learnt nothing."""
    return fresh(MODEL, images()[0].classes, images()[0], job(Path("."), seed)).eval()


def base_config(epochs: int = 10) -> BaseConfig:
    """Train for so many epochs."""
    usual = BaseConfig().train
    settings = replace(usual, epochs=epochs, batch_size=32, log_every=100, optim=replace(usual.optim, lr=1e-2))
    return BaseConfig(shift=0, train=settings)


@cache
def _weights() -> dict[str, torch.Tensor]:
    classifier = drawn()
    with TemporaryDirectory() as folder:
        train_base(classifier, images()[0], base_config(), job(Path(folder) / "base"))
    return {name: tensor.clone() for name, tensor in classifier.state_dict().items()}


def taught() -> Classifier:
    """Give a trained classifier of the test's own."""
    classifier = drawn()
    classifier.load_state_dict(_weights())
    return classifier


def material(gone: tuple[int, ...] = GONE, old: tuple[int, ...] = ()) -> Material:
    """Split the training images for a request."""
    train = images()[0]
    kept = [label for label in range(10) if label not in (*gone, *old)]
    return Material(train.of_classes(gone), train.of_classes(kept), len(old), old)


def quick(config: EraseConfig = PLAIN, epochs: int = 20) -> EraseConfig:
    """Make a preset fit for these few images."""
    settings = replace(config.train, epochs=epochs, batch_size=32, log_every=100)
    few = replace(config, select_epochs=min(1, config.select_epochs), blocks=1, least_steps=0)
    return replace(few, rank=4, scale=4.0, train=settings)
