"""A detector of the DETR family: load, draw, train, save, and ask it for boxes.

Deformable DETR, Conditional DETR and DETR of transformers. A detector prepares its images itself: scaled to its usual
size, less the mean, over the deviation, and padded to the largest of the batch.

Letters: B images of a batch, C channels, H height, W width, Q queries, K classes.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from postgrad.core.batches import epoch_order, num_steps
from postgrad.core.config import OptimConfig, TrainConfig
from postgrad.core.files import atomic_path, flush, remove, write_json
from postgrad.core.loop import Loss, train
from postgrad.core.runtime import Job, stage_seed
from postgrad.errors import ModelError
from postgrad.forgetting.average_precision import MAX_DETECTIONS, Boxes, detections
from postgrad.forgetting.boxes import BoxSet
from postgrad.forgetting.detection import DetectorBatch, Predictions, Target, is_softmax, predict

TINY = "tiny"
EVAL_IMAGES = 64
"""Images a forward pass without gradients, small ones; one of large ones."""
LARGE_SIDE = 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, which the family's backbones were trained on."""
BACKBONE = {"embedding_size": 16, "hidden_sizes": [32, 64, 64], "depths": [1, 1, 1], "layer_type": "basic"}
"""The convolutions of a detector drawn here: a ResNet of three blocks."""


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Which detector."""

    path: str = TINY
    """A folder or hub name of a transformers detector, or "tiny": a small one drawn from the seed and trained here."""
    kind: Literal["deformable", "conditional", "detr"] = "deformable"
    """What a drawn detector is: Deformable DETR learns fastest, DETR slowest."""
    width: int = 64
    """Hidden width of a drawn detector, a multiple of 32."""
    layers: int = 2
    """Its layers in the encoder, and in the decoder."""
    queries: int = 12
    """Its queries: the most objects it finds on an image."""


@dataclass(frozen=True, kw_only=True)
class DetectorBaseConfig:
    """How the detector is trained before the first request, where it is not a trained one already."""

    flip: bool = True
    """Mirror half of the training batches, where all images are of one size."""
    train: TrainConfig = TrainConfig(
        epochs=11, batch_size=16, save_every=0, keep_checkpoints=1, log_every=20,
        optim=OptimConfig(lr=2e-3, weight_decay=1e-4, warmup=0.1, final=0.01, clip=0.5),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Detector:
    """A network, what its labels mean, and how its images are prepared."""

    network: Any
    classes: tuple[str, ...]
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    sides: tuple[int, int] = (0, 0)
    """Pixels of the shorter side that images are scaled to, and most of the longer one; 0 = as found."""

    @property
    def device(self) -> torch.device:
        """Say where it computes."""
        device: torch.device = next(self.network.parameters()).device
        return device

    def batch(self, boxes: BoxSet, items: Sequence[int]) -> DetectorBatch:
        """Prepare some images and their targets."""
        pixels = [self._pixels(boxes.picture(item)) for item in items]
        height, width = (max(image.shape[side] for image in pixels) for side in (1, 2))
        alike = all(image.shape[1:] == (height, width) for image in pixels)
        mask = torch.zeros(len(pixels), height, width, dtype=torch.int64)
        for i, image in enumerate(pixels):
            mask[i, : image.shape[1], : image.shape[2]] = 1
        padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in pixels]
        targets = [{key: part.to(self.device) for key, part in boxes.targets[item].items()} for item in items]
        return DetectorBatch(torch.stack(padded), targets, None if alike else mask.to(self.device))

    def _pixels(self, image: UInt8[Tensor, "C H W"]) -> Float[Tensor, "3 h w"]:
        """Scale, normalise and move one image."""
        pixels = image.to(self.device).float() / 255
        if self.sides[0]:
            shorter, longer = sorted(image.shape[1:])
            factor = min(self.sides[0] / shorter, (self.sides[1] or math.inf) / longer)
            size = [max(1, round(factor * side)) for side in image.shape[1:]]
            pixels = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
        mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels.expand(3, -1, -1) - mean) / std

    def find(self, boxes: BoxSet) -> list[Boxes]:
        """Find objects on all images, on the CPU, the surest first: no more than queries, and at most 100."""
        return [found for _, seen in self.looks(boxes) for found in self.read(seen)]

    def read(self, seen: Predictions) -> list[Boxes]:
        """Read objects off predictions, as `find` gives them."""
        limit = min(MAX_DETECTIONS, seen.logits.shape[1])
        return detections(seen.logits.cpu(), seen.boxes.cpu(), softmax=is_softmax(self.network), limit=limit)

    def looks(self, boxes: BoxSet) -> Iterator[tuple[DetectorBatch, Predictions]]:
        """Look at all images, part after part, without gradients and as it does when it is used."""
        for items in _parts(boxes):
            was_training = self.network.training
            self.network.eval()
            with torch.no_grad():
                batch = self.batch(boxes, items)
                found = predict(self.network, batch)
            self.network.train(was_training)
            yield batch, found


def _parts(boxes: BoxSet) -> list[list[int]]:
    """Part the images for forward passes: many small ones at a time, or one."""
    large = len(boxes) > 0 and max(boxes.picture(0).shape[1:]) > LARGE_SIDE
    size = 1 if large else EVAL_IMAGES
    return [list(range(first, min(first + size, len(boxes)))) for first in range(0, len(boxes), size)]


def load_detector(config: DetectorConfig, classes: Sequence[str], job: Job) -> Detector:
    """Load a detector, or draw one from the seed for some classes.

    Raises: ModelError: no such detector, or one of another family.
    """
    if config.path == TINY:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stage_seed(job.seed, "detector"))
            network = tiny_detector(config, classes)
        return Detector(network.to(job.device).eval(), tuple(classes))
    from transformers import AutoModelForObjectDetection

    try:
        network = AutoModelForObjectDetection.from_pretrained(config.path)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{config.path}: expected a folder or hub name of a transformers detector: {error}") from error
    is_softmax(network)
    network.requires_grad_(False)
    names = tuple(str(network.config.id2label[label]) for label in range(network.config.num_labels))
    return Detector(network.to(job.device).eval(), names, *_preparation(Path(config.path)))


def tiny_detector(config: DetectorConfig, classes: Sequence[str]) -> nn.Module:
    """Draw a small detector.

    Differs: classifiers of focal losses begin at a probability of 1 %, as they were published.
    """
    import transformers as hf

    layers: dict[str, Any] = {
        f"{part}_{key}": value
        for part in ("encoder", "decoder")
        for key, value in (("layers", config.layers), ("attention_heads", 4), ("ffn_dim", 2 * config.width))
    }
    stages = ["stage2", "stage3"] if config.kind == "deformable" else ["stage2"]
    shared: dict[str, Any] = {
        "d_model": config.width, "num_queries": config.queries, "dropout": 0.0, "auxiliary_loss": True,
        "id2label": dict(enumerate(classes)), "label2id": {name: label for label, name in enumerate(classes)},
        "backbone_config": hf.ResNetConfig(**BACKBONE, out_features=stages), **layers,
    }  # fmt: skip
    network: Any
    match config.kind:
        case "deformable":
            network = hf.DeformableDetrForObjectDetection(
                hf.DeformableDetrConfig(num_feature_levels=2, with_box_refine=True, **shared)
            )
            heads = list(network.class_embed)
        case "conditional":
            network = hf.ConditionalDetrForObjectDetection(hf.ConditionalDetrConfig(**shared))
            heads = [network.class_labels_classifier]
        case "detr":
            network = hf.DetrForObjectDetection(hf.DetrConfig(**shared))
            heads = []
    for head in heads:
        nn.init.constant_(head.bias, -math.log(99))
    drawn: nn.Module = network
    return drawn


def save_detector(detector: Detector, folder: Path) -> None:
    """Write a folder that `load_detector` and transformers read, atomically."""
    shorter, longer = detector.sides
    steps: dict[str, Any] = {
        "image_processor_type": "DetrImageProcessor", "do_resize": bool(shorter), "do_rescale": True,
        "do_normalize": True, "do_pad": True, "rescale_factor": 1 / 255,
        "image_mean": list(detector.mean), "image_std": list(detector.std),
        "size": {"shortest_edge": shorter, "longest_edge": longer},
    }  # fmt: skip
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        detector.network.save_pretrained(temporary)
        write_json(temporary / "preprocessor_config.json", steps)
        for file in temporary.iterdir():
            flush(file)
        remove(folder)


def _preparation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, int]]:
    """Read how images are prepared: mean, deviation, sides; the family's usual where nothing says so."""
    file = folder / "preprocessor_config.json"
    table: Mapping[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
    size = table.get("size") or {}
    size = size if isinstance(size, Mapping) else {"shortest_edge": size, "longest_edge": table.get("max_size")}
    sides = (int(size.get("shortest_edge") or 800), int(size.get("longest_edge") or 1333))
    mean, std = (
        tuple(map(float, table.get(key) or usual)) for key, usual in (("image_mean", MEAN), ("image_std", STD))
    )
    return mean, std, sides if table.get("do_resize", True) else (0, 0)


@dataclass(frozen=True)
class _Order:
    """Random access to the images of each step; satisfies `core.loop.Batches`."""

    num: int
    steps: int
    size: int
    job: Job

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[list[int]]:
        places = range(step * self.size, (step + 1) * self.size)
        items = [int(epoch_order(self.num, self.job.seed, at // self.num)[at % self.num]) for at in places]
        return [items[self.job.rank :: self.job.world]]


def train_detector(detector: Detector, boxes: BoxSet, config: DetectorBaseConfig, job: Job) -> None:
    """Train all weights with transformers' own loss, every decoder layer's predictions counting."""
    detector.network.requires_grad_(True)

    def loss_fn(items: list[int], step: int) -> Loss:
        batch = detector.batch(boxes, items)
        pixels, targets = batch.pixel_values, list(batch.targets)
        if config.flip and batch.pixel_mask is None and stage_seed(job.seed, "flip", step, job.rank) % 2:
            pixels, targets = pixels.flip(-1), [mirrored(target) for target in targets]
        out = detector.network(pixel_values=pixels, pixel_mask=batch.pixel_mask, labels=targets)
        loss = out.loss
        if not is_softmax(detector.network):  # transformers counts the focal loss once, its paper twice
            loss = loss + sum(value for name, value in out.loss_dict.items() if name.startswith("loss_ce"))
        return Loss(loss * len(items), float(len(items)), {}, len(items))

    job.folder.mkdir(parents=True, exist_ok=True)
    steps = num_steps(len(boxes), config.train)
    train(detector.network, _Order(len(boxes), steps, config.train.batch_size, job), loss_fn, None, config.train, job)
    detector.network.requires_grad_(False)


def mirrored(target: Target) -> Target:
    """Mirror boxes with their image, left to right."""
    x, y, width, height = target["boxes"].unbind(-1)
    return {**target, "boxes": torch.stack([1 - x, y, width, height], dim=-1)}
