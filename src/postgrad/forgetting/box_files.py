"""Find images with boxes: COCO's JSON beside a folder of images, and data sets saved with save_to_disk.

A box is left out when it encloses no area or a crowd, and an image when no box is left. Boxes may stick out of their
image by less than a pixel, as rounding makes them; they are cut.

Letters: H height, W width.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from postgrad.core.config import nearest
from postgrad.errors import ConfigError, DataError
from postgrad.forgetting.boxes import BoxSet, drawn, held_out
from postgrad.forgetting.detection import Target
from postgrad.forgetting.shapes import shapes

SHAPES, NUM_SHAPES, NUM_TEST_SHAPES = "shapes", 800, 200
SLACK = 1.0
"""Pixels by which a box may stick out of its image."""


@dataclass(frozen=True, kw_only=True)
class BoxesConfig:
    """Which images, and where their boxes are written down."""

    path: str = SHAPES
    """A folder of images, a data set saved with save_to_disk, or "shapes": coloured shapes drawn here."""
    annotations: str = ""
    """COCO's JSON of the images in the folder: images, annotations, categories. "" = the path is a saved data set."""
    test_path: str = ""
    """Where the test images lie; "" = in the path."""
    test_annotations: str = ""
    """COCO's JSON of the test images."""
    split: str = "train"
    """Name of the training split of a saved data set that has several."""
    test_split: str = "test"
    """Name of its test split; where there is none, a share of the images is held out."""
    image_column: str = "image"
    """Column of a saved data set's images."""
    objects_column: str = "objects"
    """Column of its objects, with bbox and category for each."""
    corners: Literal["xywh", "xyxy"] = "xywh"
    """How its boxes are written: left, top, width, height as in COCO; or left, top, right, bottom. In pixels."""
    test_share: float = 0.2
    """Share of the images held out where no test images are named."""
    limit: int = 0
    """Use at most so many images for training, and as many for testing; 0 = all."""


@dataclass(frozen=True)
class Sheet:
    """What is written down of one image."""

    width: int
    height: int
    boxes: Sequence[Sequence[float]]
    """Left, top, width, height in pixels."""
    labels: Sequence[int]
    where: str
    """Named in errors."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Images in files or in a table's column, decoded when they are wanted."""

    sources: Any
    """A sequence of paths, encoded bytes or Pillow images."""
    place: str

    def picture(self, row: int) -> UInt8[Tensor, "3 H W"]:
        """Decode one image to RGB.

        Raises: DataError: it cannot be read.
        """
        source = self.sources[row]
        try:
            image = _opened(source)
            pixels = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = source if isinstance(source, Path) else f"{self.place}, row {row}"
            raise DataError(f"{name}: cannot read the image: {error}. Mend it, or take it out of the data.") from error
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # [3, H, W]


def check_boxes(config: BoxesConfig) -> None:
    """Refuse settings that contradict each other."""
    if not 0 < config.test_share < 1 or config.limit < 0:
        raise ConfigError(
            f"data: expected test_share between 0 and 1 and limit at least 0, found {config.test_share} and "
            f"{config.limit}."
        )
    if config.test_path and not config.test_annotations and config.annotations:
        raise ConfigError("data.test_annotations: expected COCO's JSON of the images in test_path, found none.")
    if config.test_annotations and not config.annotations:
        raise ConfigError("data.annotations: expected COCO's JSON of the training images, as of the test images.")


def load_boxes(config: BoxesConfig, seed: int) -> tuple[BoxSet, BoxSet]:
    """Load the training and the test images.

    Raises: DataError: nothing there, an annotation that fits no image or category, a box outside its image, or no box
            at all; it names the place.
    """
    check_boxes(config)
    if config.path == SHAPES:
        return shapes(config.limit or NUM_SHAPES, "train"), shapes(min(config.limit or 999, NUM_TEST_SHAPES), "test")
    train, test = _coco(config) if config.annotations else _saved(config)
    if test is None:
        train, test = held_out(train, config.test_share, seed)
    if train.classes != test.classes:
        test = test.renamed(train.classes)
    return _at_most(train, config.limit, seed), _at_most(test, config.limit, seed)


def box_set(sheets: Sequence[Sheet], pictures: Encoded, classes: Sequence[str]) -> BoxSet:
    """Bring boxes to shares of their images, and leave images without any out.

    Raises: DataError: a box outside its image, or no box at all.
    """
    targets = [_target(sheet) for sheet in sheets]
    rows = tuple(row for row, target in enumerate(targets) if len(target["class_labels"]))
    if not rows:
        raise DataError(
            f"{pictures.place}: expected boxes, found none on its {len(sheets)} images: there is nothing to learn or "
            "to forget. Is it the file of annotations that belongs to these images?"
        )
    return BoxSet(pictures, rows, tuple(targets[row] for row in rows), tuple(classes))


def _target(sheet: Sheet) -> Target:
    """Read one image's boxes."""
    kept, labels = [], []
    for box, label in zip(sheet.boxes, sheet.labels, strict=True):
        left, top, width, height = map(float, box)
        right, bottom = left + width, top + height
        sane = width >= 0 and height >= 0 and left >= -SLACK and top >= -SLACK
        if not (sane and right <= sheet.width + SLACK and bottom <= sheet.height + SLACK):  # a NaN is not
            raise DataError(
                f"{sheet.where}: expected a box within the image of {sheet.width}x{sheet.height} pixels (width x "
                f"height), found left {left:g}, top {top:g}, width {width:g}, height {height:g}. Mend the annotation; "
                "a saved data set with right and bottom in place of width and height needs corners xyxy."
            )
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, sheet.width), min(bottom, sheet.height)
        if right > left and bottom > top:
            kept.append([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
            labels.append(label)
    size = torch.tensor([sheet.width, sheet.height] * 2, dtype=torch.float32)
    boxes = torch.tensor(kept, dtype=torch.float32).reshape(-1, 4) / size
    return {"class_labels": torch.tensor(labels, dtype=torch.int64), "boxes": boxes}


def _coco(config: BoxesConfig) -> tuple[BoxSet, BoxSet | None]:
    train = read_coco(Path(config.path), Path(config.annotations))
    if not config.test_annotations:
        return train, None
    return train, read_coco(Path(config.test_path or config.path), Path(config.test_annotations))


def read_coco(folder: Path, annotations: Path) -> BoxSet:
    """Read COCO's JSON.

    Raises: DataError: as `load_boxes`, or the JSON is not COCO's.
    """
    try:
        table = json.loads(annotations.read_bytes())
        categories = {int(each["id"]): str(each["name"]) for each in table["categories"]}
        images = {int(each["id"]): each for each in table["images"]}
        objects: dict[int, list[Mapping[str, Any]]] = {key: [] for key in images}
        for each in table["annotations"]:
            _check_annotation(each, categories, images, annotations)
            if not each.get("iscrowd"):
                objects[int(each["image_id"])].append(each)
        places = {key: place for place, key in enumerate(categories)}
        sheets = [
            Sheet(
                int(image["width"]), int(image["height"]), [each["bbox"] for each in objects[key]],
                [places[int(each["category_id"])] for each in objects[key]],
                f"{annotations}, image {image['file_name']}",
            )
            for key, image in images.items()
        ]  # fmt: skip
        files = [folder / str(image["file_name"]) for image in images.values()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{annotations}: expected COCO's JSON with images (id, file_name, width, height), annotations (image_id, "
            f"category_id, bbox) and categories (id, name): {error!r}."
        ) from error
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(
            f"{annotations} names {len(missing)} of {len(files)} images that are not there, such as {missing[0]}. Set "
            "data.path to the folder that file names begin at."
        )
    return box_set(sheets, Encoded(files, str(annotations)), tuple(categories.values()))


def _check_annotation(
    each: Mapping[str, Any], categories: Mapping[int, str], images: Mapping[int, Any], file: Path
) -> None:
    where = f"{file}, annotation {each.get('id', '')}"
    if int(each["category_id"]) not in categories:
        known = ", ".join(f"{key} {name}" for key, name in list(categories.items())[:5])
        raise DataError(f"{where}: no category {each['category_id']} among {len(categories)} ({known}, ...).")
    if int(each["image_id"]) not in images:
        raise DataError(f"{where}: no image {each['image_id']} among {len(images)}. Are these another set's boxes?")


def _saved(config: BoxesConfig) -> tuple[BoxSet, BoxSet | None]:
    from datasets import Dataset, load_from_disk

    try:
        data = load_from_disk(config.path)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{config.path}: expected a data set saved with save_to_disk, or a folder of images with data.annotations "
            f"set to COCO's JSON of them: {error}"
        ) from error
    if isinstance(data, Dataset):
        return read_saved(data, config, config.path), None
    if config.split not in data:
        raise DataError(f"{config.path}: no split {config.split!r} among {', '.join(data)}. Set data.split.")
    train = read_saved(data[config.split], config, f"{config.path}, split {config.split}")
    if config.test_split not in data:
        return train, None
    return train, read_saved(data[config.test_split], config, f"{config.path}, split {config.test_split}")


def read_saved(data: Any, config: BoxesConfig, place: str) -> BoxSet:
    """Read a data set with a column of images and one of objects.

    Raises: DataError: as `load_boxes`, or columns are missing.
    """
    from datasets import Image as ImageFeature

    for setting, name in (("image_column", config.image_column), ("objects_column", config.objects_column)):
        if name not in data.column_names:
            guess = nearest(name, data.column_names) or ", ".join(data.column_names)
            raise DataError(f"{place}: no column {name!r}; set data.{setting}. There is {guess}.")
    objects = [_objects(each, f"{place}, row {row}") for row, each in enumerate(data[config.objects_column])]
    names = _names(data.features[config.objects_column], [label for _, labels in objects for label in labels])
    pictures = data.cast_column(config.image_column, ImageFeature(decode=False))
    encoded = Encoded(_Column(pictures, config.image_column), place)
    sheets = []
    for row, (boxes, labels) in enumerate(objects):
        where = f"{place}, row {row}"
        numbers = [_number(label, names, where) for label in labels]
        if config.corners == "xyxy":
            boxes = [[box[0], box[1], box[2] - box[0], box[3] - box[1]] for box in boxes]
        width, height = _size(data, encoded, row) if boxes else (1, 1)
        sheets.append(Sheet(width, height, boxes, numbers, where))
    return box_set(sheets, encoded, names)


@dataclass(frozen=True, eq=False)
class _Column:
    """A column of encoded images, row by row."""

    data: Any
    name: str

    def __getitem__(self, row: int) -> Any:
        value = self.data[row][self.name]
        return value["bytes"] if value["bytes"] is not None else Path(value["path"])


def _objects(value: Any, where: str) -> tuple[list[list[float]], list[Any]]:
    """Take boxes and categories from a dictionary of lists, or from a list of dictionaries."""
    try:
        if isinstance(value, Mapping):
            return list(value["bbox"]), list(value["category"])
        return [each["bbox"] for each in value], [each["category"] for each in value]
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: expected objects with bbox and category, found {str(value)[:80]}.") from error


def _names(feature: Any, labels: Iterable[Any]) -> tuple[str, ...]:
    """Read the categories' names from the features; else they are the names, or numbers, that stand there."""
    from datasets import ClassLabel

    inner = feature
    while not isinstance(inner, Mapping):
        inner = inner[0] if isinstance(inner, list) else inner.feature
    category = inner["category"]
    category = category if isinstance(category, ClassLabel) else vars(category).get("feature")
    if isinstance(category, ClassLabel):
        return tuple(category.names)
    return tuple(str(label) for label in sorted(set(labels)))


def _number(label: Any, names: Sequence[str], where: str) -> int:
    """Find a category, given by its number or its name."""
    if isinstance(label, int) and str(label) not in names and 0 <= label < len(names):
        return label
    if str(label) not in names:
        raise DataError(f"{where}: unknown category {label!r} among {len(names)} ({', '.join(tuple(names)[:5])}, ...).")
    return names.index(str(label))


def _size(data: Any, encoded: Encoded, row: int) -> tuple[int, int]:
    """Give an image's width and height: from the columns of that name, or from the image's own head."""
    if {"width", "height"} <= set(data.column_names):
        return int(data[row]["width"]), int(data[row]["height"])
    with _opened(encoded.sources[row]) as image:
        return int(image.width), int(image.height)


def _opened(source: Any) -> Image.Image:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _at_most(boxes: BoxSet, limit: int, seed: int) -> BoxSet:
    return boxes.select(sorted(drawn(boxes, limit, seed, "limit"))) if limit else boxes
