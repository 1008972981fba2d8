"""Images in memory as bytes: load and split them, take few or a share of them, batch them, vary them.

Every random choice is keyed by the seed, its purpose and the name of the class: which images of a class are held out
or drawn does not depend on the other classes, and a larger draw contains the smaller one.

Letters: N images, B images of a batch, C channels, H height, W width.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from postgrad.core.batches import epoch_order, num_steps
from postgrad.core.config import TrainConfig
from postgrad.core.image_files import Columns, Found, decode, find_images
from postgrad.core.runtime import Job, stage_seed
from postgrad.errors import ConfigError, DataError

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Which images, their labels, and which of them are for testing."""

    path: str = "digits"
    """A parquet or .npz file, a folder (of parquet, of class folders, of a saved data set), a hub data set, or
    "digits": the 1,797 small ones that scikit-learn ships."""
    test_path: str = ""
    """Where the test images lie, when not under the path."""
    split: str = "train"
    """Name of the training split, for sources that have several."""
    test_split: str = "test"
    """Name of the test split; where there is none, a share of the training images is held out."""
    split_column: str = "split"
    """Column that says which split a row belongs to, if the source has it."""
    image_column: str = "image"
    """Column of the images: encoded bytes, paths or arrays."""
    label_column: str = "label"
    """Column of the labels: numbers or names."""
    names_key: str = ""
    """Metadata key of a parquet file's class names, or array of an .npz file; "" = the usual ones."""
    size: int = 0
    """Scale the shorter side to so many pixels and crop the middle to a square; 0 = as found."""
    test_share: float = 0.2
    """Share of each class held out where the source has no test split."""
    limit: int = 0
    """Use at most so many images of each split, in the classes' proportions and at least one of each; 0 = all."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, all in memory."""

    images: UInt8[Tensor, "N C H W"]
    labels: Int64[Tensor, " N"]
    """Places in `classes`."""
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.labels)

    def select(self, index: Tensor | Sequence[int]) -> "ImageSet":
        """Take some images by their places, or by a mask; the classes stay as they are."""
        chosen = index if isinstance(index, Tensor) else torch.tensor(list(index), dtype=torch.int64)
        chosen = chosen.to(self.labels.device)
        return ImageSet(self.images[chosen], self.labels[chosen], self.classes)

    def of_classes(self, classes: Iterable[int]) -> "ImageSet":
        """Take the images of some classes; the labels still count over all classes."""
        wanted = sorted(set(classes))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < len(self.classes):
            raise DataError(f"expected classes from 0 to {len(self.classes) - 1}, found {wanted}.")
        return self.select(torch.isin(self.labels, self.labels.new_tensor(wanted)))

    def to(self, device: torch.device) -> "ImageSet":
        """Move images and labels to a device."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """Fingerprint each image: sha256 of its shape and bytes, 16 hex digits."""
        shape = f"{tuple(self.images.shape[1:])}".encode()
        images = self.images.cpu().contiguous().numpy()
        return tuple(hashlib.sha256(shape + image.tobytes()).hexdigest()[:16] for image in images)


def check_images(config: ImagesConfig) -> None:
    """Refuse settings that make no sense."""
    if not 0 <= config.test_share < 1:
        raise ConfigError(f"test_share: expected a share from 0 up to, not including, 1, found {config.test_share}.")
    for name, value in (("size", config.size), ("limit", config.limit)):
        if value < 0:
            raise ConfigError(f"{name}: expected 0 or more, found {value}.")
    if not config.test_path and config.split == config.test_split:
        raise ConfigError(f"split and test_split: expected two names, found {config.split!r} for both.")


def load_images(config: ImagesConfig, seed: int) -> tuple[ImageSet, ImageSet]:
    """Load the training and the test images; they share classes and shape.

    Without a test split, `test_share` of each class is held out, chosen by the seed.

    Raises:  ConfigError: settings that make no sense.
             DataError: no such source, column or split; a label out of range; a class without images; an image that
             cannot be read or has another shape. It names the row where there is one.
    """
    check_images(config)
    train, test = _find(config)
    classes = _class_names([train] if test is None else [train, test])
    labels = _numbers(train, classes)
    if test is None:
        kept, held = _hold_out(labels, classes, config.test_share, seed)
        parts = [(train, kept, labels[kept]), (train, held, labels[held])]
    else:
        test_labels = _numbers(test, classes)
        parts = [(train, np.arange(len(labels)), labels), (test, np.arange(len(test_labels)), test_labels)]
    _require_every_class(parts[0][2], classes, train.place)
    images = [_decode(found, *_limited(items, own, classes, config.limit, seed), config) for found, items, own in parts]
    (first, first_labels), (second, second_labels) = images
    first, second = _alike(first, second, train.place, parts[1][0].place)
    return ImageSet(first, first_labels, classes), ImageSet(second, second_labels, classes)


def _find(config: ImagesConfig) -> tuple[Found, Found | None]:
    """Find the training split and, where there is one, the test split."""
    columns = Columns(
        image=config.image_column, label=config.label_column, split=config.split_column, names=config.names_key
    )
    wanted = (config.split, config.test_split)
    found = find_images(config.path, columns, wanted)
    train = found.get("") or _split(found, config.split, config.path, "split")
    if config.test_path:
        beside = find_images(config.test_path, columns, wanted)
        return train, beside.get("") or _split(beside, config.test_split, config.test_path, "test_split")
    return train, found.get(config.test_split)


def _split(found: dict[str, Found], split: str, path: str, setting: str) -> Found:
    if split not in found:
        raise DataError(f"{path}: expected a split {split!r}, found {', '.join(found)}. Set {setting}.")
    return found[split]


def _class_names(parts: Sequence[Found]) -> tuple[str, ...]:
    """Take the names the source gives, else the sorted labels."""
    place = parts[0].place
    given = next((part.names for part in parts if part.names), ())
    if given:
        if len(set(given)) < len(given):
            twice = sorted({name for name in given if given.count(name) > 1})
            raise DataError(f"{place}: expected different class names, found {', '.join(twice)} more than once.")
        return given
    values = {value for part in parts for value in part.labels}
    if not values:
        raise DataError(f"{place}: expected images, found none.")
    if not all(isinstance(value, int) for value in values) and not all(isinstance(value, str) for value in values):
        kinds = ", ".join(sorted({type(value).__name__ for value in values}))
        raise DataError(f"{place}: expected labels that are all whole numbers or all names, found {kinds}.")
    return tuple(str(value) for value in sorted(values))


def _numbers(found: Found, classes: tuple[str, ...]) -> np.ndarray:
    """Turn labels into places in the classes: a number counts in the names that its own source gives."""
    place: dict[Any, int] = {name: number for number, name in enumerate(classes)}
    if found.names:
        place |= {number: place[name] for number, name in enumerate(found.names) if name in place}
    else:
        place |= {int(name): number for name, number in list(place.items()) if name.lstrip("-").isdigit()}
    numbers = np.empty(len(found.labels), np.int64)
    for item, label in enumerate(found.labels):
        number = place.get(label)
        if number is None:
            shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
            raise DataError(
                f"{found.place}, row {found.row(item)}: expected a label of {len(classes)} classes ({shown}), found "
                f"{label!r}."
            )
        numbers[item] = number
    return numbers


def _require_every_class(labels: np.ndarray, classes: tuple[str, ...], place: str) -> None:
    missing = [classes[i] for i in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(
            f"{place}: expected training images of each of {len(classes)} classes, found none of {len(missing)} "
            f"({shown}). Add images, or remove the classes' folders or names."
        )


def _shuffled(
    labels: np.ndarray, classes: tuple[str, ...], seed: int, purpose: str
) -> Iterator[tuple[int, np.ndarray]]:
    """Give each class that has images and their places in an order that the seed, purpose and name alone decide."""
    for number in np.unique(labels):
        key = stage_seed(seed, "images", purpose, classes[number])
        places = np.flatnonzero(labels == number)
        yield int(number), np.random.Generator(np.random.Philox(key)).permutation(places)


def _hold_out(
    labels: np.ndarray, classes: tuple[str, ...], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Set aside a share of each class, at least one image where it has two."""
    held = []
    for _, places in _shuffled(labels, classes, seed, "hold out"):
        num = min(len(places) - 1, max(1, round(fraction * len(places)))) if fraction else 0
        held.append(places[:num])
    aside = np.sort(np.concatenate(held)) if held else np.empty(0, np.int64)
    return np.setdiff1d(np.arange(len(labels)), aside), aside


def _limited(
    items: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], limit: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keep at most `limit` items, as many of each class as its share, one of each first."""
    if not limit or limit >= len(items):
        return items, labels
    num_classes = len(np.unique(labels))
    if limit < num_classes:
        raise ConfigError(f"limit: expected at least one image of each of {num_classes} classes, found {limit}.")
    turn = np.empty(len(items))
    for _, places in _shuffled(labels, classes, seed, "limit"):
        turn[places] = np.arange(len(places)) / len(places)
    kept = np.sort(np.argsort(turn, kind="stable")[:limit])
    return items[kept], labels[kept]


def _decode(found: Found, items: np.ndarray, labels: np.ndarray, config: ImagesConfig) -> tuple[Tensor, Tensor]:
    if not len(items):
        return torch.empty(0, 1, 0, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    return decode(found, items.tolist(), config.size), torch.from_numpy(labels)


def _alike(train: Tensor, test: Tensor, place: str, test_place: str) -> tuple[Tensor, Tensor]:
    """Bring both to the same channels; refuse different sizes."""
    if not len(test):
        return train, train[:0]
    if train.shape[2:] != test.shape[2:]:
        raise DataError(
            f"{test_place}: expected {train.shape[2]}x{train.shape[3]} pixels like the training images of {place}, "
            f"found {test.shape[2]}x{test.shape[3]} (height x width). Set size to bring all to one shape."
        )
    channels = max(train.shape[1], test.shape[1])
    grey = [images if images.shape[1] == channels else images.repeat(1, channels, 1, 1) for images in (train, test)]
    return grey[0], grey[1]


def few(images: ImageSet, shots: int, seed: int) -> ImageSet:
    """Draw so many images of each class that is there.

    Raises: DataError: a class has fewer.
    """
    if shots < 1:
        raise ConfigError(f"shots: expected 1 or more, found {shots}.")
    chosen = []
    for number, places in _shuffled(images.labels.cpu().numpy(), images.classes, seed, "few"):
        if len(places) < shots:
            raise DataError(
                f"expected {shots} images of each class, found {len(places)} of {images.classes[number]}. Ask for "
                f"{len(places)} shots or leave the class out."
            )
        chosen.append(places[:shots])
    return images.select(np.sort(np.concatenate(chosen)).tolist() if chosen else [])


def share(images: ImageSet, fraction: float, seed: int) -> ImageSet:
    """Draw a share of each class that is there, at least one image."""
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction: expected a share above 0 and up to 1, found {fraction}.")
    found = _shuffled(images.labels.cpu().numpy(), images.classes, seed, "share")
    chosen = [places[: max(1, round(fraction * len(places)))] for _, places in found]
    return images.select(np.sort(np.concatenate(chosen)).tolist() if chosen else [])


@dataclass(frozen=True)
class ImageBatches:
    """Random access to every step's images, as places in their set; nothing to save or to replay on resume."""

    num_images: int
    steps: int
    batch_size: int
    """Images a step, over all ranks."""
    seed: int
    micro_images: int = 0
    """Images of a micro-batch; 0 = a rank's whole share of the step."""
    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    def __len__(self) -> int:
        """Optimizer steps in all."""
        return self.steps

    def items(self, step: int) -> list[int]:
        """List the images of a step over all ranks: the step's slice of one endless stream of shuffled epochs."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        num = self.num_images
        return [int(epoch_order(num, self.seed, place // num)[place % num]) for place in places]

    def __getitem__(self, step: int) -> list[Int64[Tensor, " B"]]:
        """Cut this rank's share of a step into micro-batches; there may be none."""
        mine = torch.tensor(self.items(step)[self.rank :: self.world], dtype=torch.int64, device=self.device)
        return list(torch.split(mine, self.micro_images or self.batch_size)) if len(mine) else []


def image_batches(images: ImageSet, config: TrainConfig, job: Job, *, micro_images: int = 0) -> ImageBatches:
    """Batch images for training: a permutation an epoch keyed by the seed, dealt over ranks and micro-batches."""
    return ImageBatches(
        num_images=len(images),
        steps=num_steps(len(images), config) if len(images) else 0,
        batch_size=config.batch_size,
        seed=job.seed,
        micro_images=micro_images,
        rank=job.rank,
        world=job.world,
        device=images.labels.device,
    )


def augment(
    images: UInt8[Tensor, "B C H W"], *, flip: bool, shift: int, generator: torch.Generator
) -> UInt8[Tensor, "B C H W"]:
    """Mirror half of the images and move each by up to `shift` pixels, filling in by reflection at the edges.

    Args:    shift: most pixels up, down, left or right; less than the images' height and width.
    """
    num, _, height, width = images.shape
    if not 0 <= shift < min(height, width):
        raise ConfigError(f"shift: expected 0 or more and less than {min(height, width)} pixels, found {shift}.")
    at = generator.device
    moved = torch.randint(-shift, shift + 1, (2, num, 1), generator=generator, device=at).to(images.device)
    mirrored = torch.randint(2, (num, 1), generator=generator, device=at).to(images.device)
    rows = _reflected(torch.arange(height, device=images.device) + moved[0], height)  # [B, H]
    columns = _reflected(torch.arange(width, device=images.device) + moved[1], width)  # [B, W]
    if flip:
        columns = torch.where(mirrored == 1, columns.flip(1), columns)
    every = torch.arange(num, device=images.device)[:, None, None]
    channels_last = images.permute(0, 2, 3, 1)[every, rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
    return channels_last.permute(0, 3, 1, 2).contiguous()


def _reflected(places: Tensor, size: int) -> Tensor:
    """Fold places outside 0 .. size - 1 back at the edges, which are not repeated."""
    last = size - 1
    return last - (last - places.abs()).abs()
