"""The model before any request, and gold: the same training on what is left, which never saw a forgotten class.

Letters: B images of a batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from postgrad.core.config import OptimConfig, TrainConfig
from postgrad.core.loop import Loss, train
from postgrad.core.runtime import Job, stage_seed
from postgrad.core.vision import ImageSet, augment, image_batches
from postgrad.core.vision_models import Classifier, ClassifierConfig, load_classifier
from postgrad.core.vision_networks import Builder
from postgrad.forgetting.face import ArcFaceHead, CosFaceHead, FaceTransformer, FaceTransformerConfig
from postgrad.forgetting.views import View, share_right

MARGIN_HEADS = (CosFaceHead, ArcFaceHead)


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """How the model is trained before the first request, where it is not a trained one already."""

    shift: int = 1
    """Move training images by up to so many pixels."""
    flip: bool = False
    """Mirror half of the training images."""
    train: TrainConfig = TrainConfig(
        epochs=40, batch_size=64, save_every=0, keep_checkpoints=1, log_every=20,
        optim=OptimConfig(lr=2e-3, weight_decay=0.05, warmup=0.1, final=0.01),
    )  # fmt: skip


def face_network(settings: Mapping[str, Any]) -> nn.Module:
    """Make a Face Transformer with a CosFace head from a classifier's settings; its images are square."""
    shape = FaceTransformerConfig(
        image_size=settings["size"][0], patch_size=settings["patch"], channels=settings["channels"],
        width=settings["width"], depth=settings["depth"], heads=settings["heads"],
        head_dim=settings["width"] // settings["heads"], ff_width=4 * settings["width"],
    )  # fmt: skip
    return FaceTransformer(shape, CosFaceHead(settings["width"], settings["num_classes"]))


BUILDERS: Mapping[str, Builder] = MappingProxyType({"face": face_network})
"""Networks of our own that `model.path` may name."""


def train_base(classifier: Classifier, images: ImageSet, config: BaseConfig, job: Job) -> None:
    """Train all weights on images; a margin head sees the labels while it trains."""
    batches = image_batches(images, config.train, job)

    def loss_fn(index: Int64[Tensor, " B"], step: int) -> Loss:
        pixels, labels = images.images[index], images.labels[index]
        noise = torch.Generator().manual_seed(stage_seed(job.seed, "augment", step, job.rank))
        seen = classifier(augment(pixels, flip=config.flip, shift=config.shift, generator=noise))
        head = classifier.head()
        logits = head(seen.features, labels) if isinstance(head, MARGIN_HEADS) else seen.logits
        right = (logits.argmax(1) == labels).sum()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return Loss(loss, float(len(index)), {"accuracy": (right, float(len(index)))}, len(index))

    job.folder.mkdir(parents=True, exist_ok=True)
    train(classifier, batches, loss_fn, lambda step: _accuracy(classifier, images), config.train, job)


def fresh(config: ClassifierConfig, classes: tuple[str, ...], images: ImageSet, job: Job) -> Classifier:
    """Draw or load a classifier that fits the images."""
    channels, height, width = images.images.shape[1:]
    return load_classifier(config, classes, (channels, height, width), job, builders=BUILDERS)


def _accuracy(classifier: Classifier, images: ImageSet) -> dict[str, float]:
    return {"train_accuracy": share_right(View(classifier, images).see_all(), images.labels)}
