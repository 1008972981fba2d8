"""Find images and their labels wherever they lie, and decode the ones that are wanted.

Sources: parquet, data sets saved with save_to_disk or on the hub, folders of class folders, .npz arrays, and
scikit-learn's bundled digits ("digits"). Labels are read first; an image is decoded once, to bytes in memory.

Letters: N images, C channels, H height, W width.
"""

import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from postgrad.core.tables import SPLITS
from postgrad.errors import DataError

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""File names that are taken for images in class folders."""
CHUNK = 256
"""Images a thread decodes at a time."""
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of more than 8 bits a pixel: which of their values is white is not known."""

_FORMATS = ((b"\xff\xd8", ("JPEG",)), (b"\x89PNG", ("PNG",)), (b"RIFF", ("WEBP",)))
"""First bytes of the usual formats; trying all of Pillow's on each small image takes as long as decoding it."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where in a table or an archive things stand; ``split`` and ``names`` may be missing or empty."""

    image: str
    label: str
    split: str
    names: str


@dataclass(frozen=True, eq=False)
class Found:
    """The images of one split, as they lie there."""

    place: str
    """Named in errors."""
    images: Any
    """A sequence of encoded bytes, paths, Pillow images or arrays; or one array of all."""
    labels: Sequence[Any]
    """Numbers or names, one for each of `rows`."""
    names: tuple[str, ...] = ()
    """What the numbers stand for, when the source says so."""
    folder: Path = field(default_factory=Path)
    """Where relative paths begin."""
    rows: Sequence[int] | None = None
    """Which of the images are meant; None = all."""

    def row(self, item: int) -> int:
        """Say which image an item is, counted from 0 over the whole source."""
        return item if self.rows is None else self.rows[item]


class _NotGrey(Exception):
    """A colour image came after grey ones."""


def find_images(path: str, columns: Columns, splits: Sequence[str]) -> dict[str, Found]:
    """Find what lies at a path: the splits by their names, or "" for all of a source that has none.

    Args:    splits: names that a file, a folder or a row may say it belongs to, besides the usual ones.
    Raises:  DataError: nothing there, not readable, or without the columns asked for; it says what was found.
    """
    if path == "digits":
        return {"": _digits()}
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix == ".npz":
            return _read_npz(place, columns)
        if place.suffix == ".parquet":
            return _read_parquet([place], columns)
        raise DataError(f"{place}: expected a .parquet or .npz file or a folder, found {place.suffix or 'no ending'}.")
    known = tuple(dict.fromkeys((*SPLITS, *splits)))
    if not place.is_dir():
        return _read_hub(path, columns)
    if any((place / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _read_saved(place, columns)
    if files := sorted(place.rglob("*.parquet")):
        return _read_parquets(files, columns, known)
    return _read_folders(place, known)


def decode(found: Found, items: Sequence[int], size: int) -> UInt8[Tensor, "N C H W"]:
    """Decode some items: to grey when all are grey, else to RGB.

    Args:    size: scale the shorter side to it and crop the middle to a square; 0 = as found.
    Raises:  DataError: an image cannot be read, or differs in shape from the first; it names the row.
    """
    rows = [found.row(item) for item in items]
    first = _one(found, rows[0], size)
    num_channels = 3 if first.ndim == 3 else 1
    try:
        return _fill(found, rows, size, (num_channels, *first.shape[:2]))
    except _NotGrey:
        return _fill(found, rows, size, (3, *first.shape[:2]))


def _fill(found: Found, rows: Sequence[int], size: int, shape: tuple[int, int, int]) -> Tensor:
    """Decode in threads, each straight to its place; Pillow lets other threads run while it decodes."""
    images = np.empty((len(rows), *shape), np.uint8)

    def work(start: int) -> None:
        for at in range(start, min(start + CHUNK, len(rows))):
            pixels = _one(found, rows[at], size)
            if pixels.shape[:2] != shape[1:]:
                raise DataError(
                    f"{found.place}, row {rows[at]}: expected {shape[1]}x{shape[2]} pixels like the first image, found "
                    f"{pixels.shape[0]}x{pixels.shape[1]} (height x width). Set size to bring all to one shape."
                )
            if pixels.ndim == 3 and shape[0] == 1:
                raise _NotGrey
            images[at] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels  # [C, H, W]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(work, range(0, len(rows), CHUNK)):
            pass
    return torch.from_numpy(images)


def _one(found: Found, row: int, size: int) -> np.ndarray:
    """Decode one row to [H, W] or [H, W, 3]."""
    value = found.images[row]
    if isinstance(value, pa.Scalar):
        value = value.as_py()
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    where = f"{found.place}, row {row}" + (f" ({value})" if isinstance(value, str | Path) else "")
    try:
        if isinstance(value, list | np.ndarray):
            pixels = _upright(_bytes(np.asarray(value)[None], where), where)[0]
            return _pixels(Image.fromarray(pixels), size, where) if size else pixels
        if isinstance(value, Image.Image):
            return _pixels(value.copy(), size, where)
        if isinstance(value, str | Path):
            value = (found.folder / value).read_bytes()
        if not isinstance(value, bytes):
            raise DataError(f"{where}: expected an encoded image, a path or an array, found {type(value).__name__}.")
        formats = next((kind for start, kind in _FORMATS if value.startswith(start)), None)
        with Image.open(io.BytesIO(value), formats=formats) as image:
            return _pixels(image, size, where)
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: cannot read the image: {error}. Mend or remove it.") from error


def _pixels(image: Image.Image, size: int, where: str) -> np.ndarray:
    """Turn upright, lay on white, convert to grey or RGB, and scale the middle square to the size."""
    if image.mode in _DEEP:
        raise DataError(f"{where}: expected 8 bits a channel, found mode {image.mode}. Convert the image.")
    ImageOps.exif_transpose(image, in_place=True)
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    if image.mode != mode:
        image = image.convert(mode)
    if size:
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _bytes(images: np.ndarray, place: str) -> np.ndarray:
    """Bring an array of images to bytes: whole numbers must be from 0 to 255, others from 0 to 1."""
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind not in "iuf":
        raise DataError(f"{place}: expected images of numbers, found an array of {images.dtype}.")
    top = 1 if images.dtype.kind == "f" else 255
    flat = images.reshape(len(images), math.prod(images.shape[1:]))
    good = (flat >= 0) & (flat <= top)  # false for NaN, too
    if not good.all():
        row = int(good.all(1).argmin())
        raise DataError(
            f"{place}, image {row}: expected {images.dtype} values from 0 to {top}, found "
            f"{flat[row][~good[row]][0]}. Mend or scale the images, or store bytes."
        )
    return np.rint(images * (255 / top)).astype(np.uint8)


def _upright(images: np.ndarray, place: str) -> np.ndarray:
    """Bring an array of images to [N, H, W] or [N, H, W, 3]; with a fourth channel, how opaque they are, onto white."""
    for plain in ((1, 3), (4,)):
        if images.ndim == 4 and not {images.shape[3], images.shape[1]}.isdisjoint(plain):
            images = images if images.shape[3] in plain else images.transpose(0, 2, 3, 1)
            break
    if images.ndim == 4 and images.shape[3] == 4:
        opaque = images[..., 3:].astype(np.uint16)
        images = ((images[..., :3] * opaque + 255 * (255 - opaque) + 127) // 255).astype(np.uint8)
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)) or 0 in images.shape[1:]:
        raise DataError(
            f"{place}: expected images of height x width, with 1, 3 or 4 channels before or after them, found shape "
            f"{tuple(images.shape[1:])}."
        )
    return images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images


def _digits() -> Found:
    """Take the 1,797 digits that scikit-learn ships: 8x8 pixels of 17 shades of grey."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the built-in digits come with scikit-learn, which is not installed: pip install scikit-learn, or set "
            "path to images of your own."
        ) from error
    data = load_digits()
    return Found("digits", _bytes(data.images / 16, "digits"), data.target.tolist(), tuple("0123456789"))


def _read_npz(path: Path, columns: Columns) -> dict[str, Found]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"{path}: expected an .npz archive of plain arrays: {error}") from error
    keys = [key for key in ([columns.names] if columns.names else ["classes", "names"]) if key in arrays]
    if columns.names and not keys:
        raise DataError(f"{path}: expected class names under {columns.names!r}, found {', '.join(arrays)}.")
    names = tuple(str(name) for name in arrays[keys[0]]) if keys else ()
    pairs = {
        name[2:]: (name, f"y_{name[2:]}") for name in arrays if name.startswith("x_") and f"y_{name[2:]}" in arrays
    }
    if not pairs:
        image = next((key for key in (columns.image, "images", "image", "x") if key in arrays), "")
        label = next((key for key in (columns.label, "labels", "label", "y") if key in arrays), "")
        if not image or not label:
            shown = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise DataError(f"{path}: expected x_train and y_train, or images and labels, found {shown}.")
        pairs = {"": (image, label)}
    found: dict[str, Found] = {}
    for name, (image, label) in pairs.items():
        images, labels = arrays[image], arrays[label].reshape(-1)
        if len(images) != len(labels):
            raise DataError(f"{path}: expected a label for each image, found {len(images)} and {len(labels)}.")
        place = f"{path}: {image}"
        every = Found(place, _upright(_bytes(images, place), place), labels.tolist(), names)
        rows = arrays[columns.split].tolist() if not name and columns.split in arrays else None
        found |= _by_split(every, rows) if rows is not None else {name: every}
    return found


def _read_parquets(files: Sequence[Path], columns: Columns, splits: Sequence[str]) -> dict[str, Found]:
    """Read a folder's parquet files; those named after a split make it up, where any is."""
    named: dict[str, list[Path]] = {}
    for file in files:
        for split in set(re.split(r"[-_.]", file.stem)) & set(splits):
            named.setdefault(split, []).append(file)
    if not named:
        return _read_parquet(files, columns)
    whole = replace(columns, split="")
    return {split: _read_parquet(some, whole)[""] for split, some in named.items()}


def _read_parquet(files: Sequence[Path], columns: Columns) -> dict[str, Found]:
    """Read parquet files of the same columns one after another."""
    tables = []
    for file in files:
        try:
            schema = pq.read_schema(file)
            _require(schema.names, columns, str(file))
            wanted = [name for name in (columns.image, columns.label, columns.split) if name in schema.names]
            tables.append(pq.read_table(file, columns=list(dict.fromkeys(wanted))))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: expected a parquet file: {error}") from error
    place = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise DataError(f"{place}: expected the same columns in every file: {error}") from error
    return _from_table(table, _names(tables[0].schema, columns, place), columns, (place, files[0].parent))


def _read_saved(path: Path, columns: Columns) -> dict[str, Found]:
    from datasets import load_from_disk

    try:
        return _from_datasets(load_from_disk(str(path)), columns, str(path))
    except (OSError, KeyError) as error:
        raise DataError(f"{path}: expected a data set saved with save_to_disk: {error}") from error


def _read_hub(path: str, columns: Columns) -> dict[str, Found]:
    """Load a hub data set, when the name can be one."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.endswith((".parquet", ".npz")):
        raise DataError(f"expected a .parquet or .npz file, a folder or a hub data set, found no {path}.")
    from datasets import load_dataset

    try:
        data = load_dataset(path)
    except Exception as error:  # the hub client raises errors of many libraries
        raise DataError(
            f"no file or folder {path}, and the hub did not give a data set of that name "
            f"({type(error).__name__}: {error})."
        ) from error
    return _from_datasets(data, columns, path)


def _from_datasets(data: Any, columns: Columns, path: str) -> dict[str, Found]:
    """Take one data set, or a dictionary of them by split."""
    if isinstance(data, Mapping):
        whole = replace(columns, split="")
        return {name: _from_datasets(part, whole, f"{path}, split {name}")[""] for name, part in data.items()}
    _require(data.column_names, columns, path)
    names = _names(data.features.arrow_schema, columns, path)
    return _from_table(data.with_format("arrow")[:], names, columns, (path, Path()))


def _from_table(table: pa.Table, names: tuple[str, ...], columns: Columns, place: tuple[str, Path]) -> dict[str, Found]:
    """Take images and labels of an arrow table, parted by its split column when it has one."""
    every = Found(place[0], table[columns.image], table[columns.label].to_pylist(), names, place[1])
    rows = table[columns.split].to_pylist() if columns.split in table.column_names else None
    return {"": every} if rows is None else _by_split(every, rows)


def _by_split(found: Found, splits: Sequence[Any]) -> dict[str, Found]:
    """Part rows by what their split column says."""
    rows: dict[str, list[int]] = {}
    for row, split in enumerate(splits):
        rows.setdefault(str(split), []).append(row)
    return {
        split: replace(found, place=f"{found.place}, split {split}", labels=[found.labels[r] for r in some], rows=some)
        for split, some in rows.items()
    }


def _require(found: Iterable[str], columns: Columns, place: str) -> None:
    for setting, name in (("image_column", columns.image), ("label_column", columns.label)):
        if name not in found:
            raise DataError(f"{place}: expected a column {name!r}, found {', '.join(found)}. Set {setting}.")


def _names(schema: pa.Schema, columns: Columns, place: str) -> tuple[str, ...]:
    """Read class names from a schema: the features of `datasets`, or a JSON list under a key of its own."""
    metadata = {key.decode(): value for key, value in (schema.metadata or {}).items()}
    if not columns.names and "huggingface" in metadata:
        features = json.loads(metadata["huggingface"]).get("info", {}).get("features", {})
        names = (features.get(columns.label) or {}).get("names")
        if names:
            return tuple(names)
    stem = columns.label.removesuffix("_label")
    for key in [columns.names] if columns.names else [stem, columns.label, "classes", "names"]:
        if key in metadata:
            return tuple(str(name) for name in json.loads(metadata[key]))
    if columns.names:
        raise DataError(f"{place}: expected class names under the key {columns.names!r}, found {', '.join(metadata)}.")
    return ()


def _read_folders(root: Path, splits: Sequence[str]) -> dict[str, Found]:
    """Read a folder of class folders, or of splits that each are one."""
    inside = _folders(root)
    parts = [folder for folder in inside if folder.name in splits and _folders(folder)]
    if not inside:
        shown = ", ".join(sorted(child.name for child in root.iterdir())[:10]) or "nothing"
        raise DataError(f"{root}: expected parquet files, a saved data set or a folder for each class, found {shown}.")
    if parts:
        return {folder.name: _read_classes(folder, _folders(folder)) for folder in parts}
    return {"": _read_classes(root, inside)}


def _read_classes(root: Path, folders: Sequence[Path]) -> Found:
    files = [(file, folder.name) for folder in folders for file in sorted(folder.iterdir())]
    files = [(file, name) for file, name in files if file.suffix.lower() in ENDINGS]
    names = tuple(folder.name for folder in folders)
    return Found(str(root), [file for file, _ in files], [name for _, name in files], names)


def _folders(root: Path) -> list[Path]:
    return sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
