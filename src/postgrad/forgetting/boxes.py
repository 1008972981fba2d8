"""Images with the boxes of the objects on them: what a detector learns and forgets.

A target is what transformers' detectors take: {"class_labels": [T], "boxes": [T, 4]}, a box as (centre x, centre y,
width, height) in shares of the image.

Letters: C channels, H height, W width, T boxes of an image.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor

from postgrad.core.config import nearest
from postgrad.core.runtime import stage_seed
from postgrad.errors import DataError
from postgrad.forgetting.detection import Target, of_classes


@runtime_checkable
class Pictures(Protocol):
    """Where images come from: memory, files, a table."""

    def picture(self, row: int) -> UInt8[Tensor, "C H W"]:
        """Give one image."""
        ...


@dataclass(frozen=True, eq=False)
class InMemory:
    """Images that are there already."""

    images: Sequence[Tensor] | UInt8[Tensor, "N C H W"]

    def picture(self, row: int) -> UInt8[Tensor, "C H W"]:
        """Give one image."""
        return self.images[row]


@dataclass(frozen=True, eq=False)
class BoxSet:
    """Images, the boxes on each, and what their labels mean; an image is fetched when it is wanted."""

    pictures: Pictures
    rows: tuple[int, ...]
    """Which of the pictures are meant."""
    targets: tuple[Target, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.rows)

    def picture(self, item: int) -> UInt8[Tensor, "C H W"]:
        """Give one image."""
        return self.pictures.picture(self.rows[item])

    def select(self, items: Sequence[int]) -> "BoxSet":
        """Take some images by their places."""
        rows, targets = tuple(self.rows[i] for i in items), tuple(self.targets[i] for i in items)
        return replace(self, rows=rows, targets=targets)

    def showing(self, classes: Iterable[int]) -> "BoxSet":
        """Take the images that show one of the classes, and of the boxes on them those of these classes."""
        targets = of_classes(self.targets, classes)
        kept = [item for item, target in enumerate(targets) if len(target["class_labels"])]
        return replace(self.select(kept), targets=tuple(targets[item] for item in kept))

    def renamed(self, classes: Sequence[str]) -> "BoxSet":
        """Count the labels over other classes, a detector's, found by their names.

        Raises: DataError: a class of the boxes is not among them.
        """
        known = {name: label for label, name in enumerate(classes)}
        for label in sorted(self.counts):
            if self.classes[label] not in known:
                name = self.classes[label]
                guess = nearest(name, classes)
                hint = f"nearest is {guess!r}" if guess else f"it has {', '.join(tuple(classes)[:5])}, and so on"
                raise DataError(
                    f"the data has boxes of {name!r}, a class that the detector does not have; {hint}. Rename the "
                    "category in the data, or take its boxes out."
                )
        places = torch.tensor([known.get(name, 0) for name in self.classes], dtype=torch.int64)
        targets = ({**target, "class_labels": places[target["class_labels"]]} for target in self.targets)
        return replace(self, targets=tuple(targets), classes=tuple(classes))

    @cached_property
    def counts(self) -> Mapping[int, int]:
        """Count the boxes of each class that has some."""
        found: dict[int, int] = {}
        for target in self.targets:
            for label in target["class_labels"].tolist():
                found[label] = found.get(label, 0) + 1
        return found

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """Fingerprint each image: sha256 of its shape and bytes, 16 hex digits."""
        return tuple(_print(self.picture(item)) for item in range(len(self)))


def _print(image: UInt8[Tensor, "C H W"]) -> str:
    shape = f"{tuple(image.shape)}".encode()
    return hashlib.sha256(shape + image.contiguous().numpy().tobytes()).hexdigest()[:16]


def drawn(boxes: BoxSet, num: int, seed: int, purpose: str) -> list[int]:
    """Draw places of images; a larger draw contains the smaller one."""
    generator = torch.Generator().manual_seed(stage_seed(seed, purpose))
    return torch.randperm(len(boxes), generator=generator)[:num].tolist()


def held_out(boxes: BoxSet, share: float, seed: int) -> tuple[BoxSet, BoxSet]:
    """Hold a share of the images out for testing.

    Raises: DataError: a class has boxes in only one of the two parts.
    """
    test = set(drawn(boxes, round(share * len(boxes)), seed, "test images"))
    parts = [[i for i in range(len(boxes)) if (i in test) == held] for held in (False, True)]
    train, rest = (boxes.select(part) for part in parts)
    if lacking := [boxes.classes[label] for label in sorted(boxes.counts) if label not in train.counts]:
        raise DataError(f"no training image is left of {lacking}; lower test_share, or name test images.")
    return train, rest


def few_of_each(boxes: BoxSet, num: int, seed: int) -> BoxSet:
    """Draw so many images of each class that has some."""
    chosen: set[int] = set()
    for label in boxes.counts:
        shows = [i for i, target in enumerate(boxes.targets) if bool((target["class_labels"] == label).any())]
        part = boxes.select(shows)
        chosen |= {shows[i] for i in drawn(part, num, seed, f"shots {boxes.classes[label]}")}
    return boxes.select(sorted(chosen))
