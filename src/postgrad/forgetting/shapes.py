"""Made images for a detector to learn: coloured shapes on noisy grounds, each with its box. Nothing is downloaded.

A shape has a usual colour, which varies; one to three stand on an image and do not overlap. An image depends
on the name of its set and its number alone.

Letters: S side of an image, h and w height and width of a shape, in pixels.
"""

import numpy as np
import torch

from postgrad.core.runtime import stage_seed
from postgrad.forgetting.boxes import BoxSet, InMemory
from postgrad.forgetting.detection import Target

SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
COLOURS = ((220, 60, 60), (70, 200, 80), (80, 110, 235), (230, 200, 60), (200, 80, 210), (70, 210, 220))
SIDE = 64
SMALLEST, LARGEST = 14, 28
"""Height and width of a shape."""


def shapes(num: int, part: str) -> BoxSet:
    """Draw a set of images, always the same ones; `part`, such as "train", tells sets apart."""
    images = np.empty((num, 3, SIDE, SIDE), np.uint8)
    targets = []
    for number in range(num):
        random = np.random.default_rng(stage_seed(0, "shapes", part, number))
        images[number], target = _image(random)
        targets.append(target)
    return BoxSet(InMemory(torch.from_numpy(images)), tuple(range(num)), tuple(targets), SHAPES)


def _image(random: np.random.Generator) -> tuple[np.ndarray, Target]:
    """Draw one image [3, S, S] and its target."""
    ground = random.uniform(60, 160, (3, 1, 1))
    image = ground + random.normal(0, 12, (3, SIDE, SIDE))
    labels: list[int] = []
    boxes: list[tuple[int, int, int, int]] = []
    wanted = int(random.integers(1, 4))
    for _ in range(20):
        height, width = random.integers(SMALLEST, LARGEST + 1, 2).tolist()
        top, left = random.integers(0, SIDE - height + 1), random.integers(0, SIDE - width + 1)
        box = (int(left), int(top), int(left) + width, int(top) + height)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes):
            continue
        label = int(random.integers(len(SHAPES)))
        colour = np.array(COLOURS[label]) + random.normal(0, 15, 3)
        inside = _mask(SHAPES[label], height, width)
        pixels = image[:, box[1] : box[3], box[0] : box[2]]
        pixels[:, inside] = colour[:, None] + random.normal(0, 12, (3, int(inside.sum())))
        labels.append(label)
        boxes.append(box)
        if len(boxes) == wanted:
            break
    corners = torch.tensor(boxes, dtype=torch.float32) / SIDE
    middle = (corners[:, :2] + corners[:, 2:]) / 2
    target = {"class_labels": torch.tensor(labels), "boxes": torch.cat([middle, corners[:, 2:] - corners[:, :2]], 1)}
    return np.rint(image.clip(0, 255)).astype(np.uint8), target


def _mask(shape: str, height: int, width: int) -> np.ndarray:
    """Say which pixels [h, w] of its box a shape covers."""
    y, x = np.mgrid[0:height, 0:width]
    y, x = (2 * y + 1) / height - 1, (2 * x + 1) / width - 1
    radius = np.hypot(x, y)
    masks: dict[str, np.ndarray] = {
        "circle": radius <= 1,
        "square": np.ones((height, width), dtype=bool),
        "triangle": np.abs(x) <= (y + 1) / 2,
        "cross": (np.abs(x) <= 1 / 3) | (np.abs(y) <= 1 / 3),
        "ring": (radius <= 1) & (radius >= 0.55),
        "bar": np.abs(x - y) <= 0.5,
    }
    return masks[shape]
