"""Sources of images: each kind is found and decoded to the bytes that were written, and says what is wrong with it."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from postgrad.core.image_files import CHUNK, Columns, Found, decode, find_images
from postgrad.errors import DataError

COLUMNS = Columns(image="image", label="label", split="split", names="")
SPLITS = ("train", "test")


def pictures(num: int, channels: int = 3, height: int = 5, width: int = 4) -> np.ndarray:
    shape = (num, height, width) if channels == 1 else (num, height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def write_parquet(
    path: Path, images: list[Any], labels: list[Any], metadata: dict[str, str] | None = None, **more: Any
) -> Path:
    table = pa.table({"image": images, "label": labels, **more})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def write_folders(root: Path, images: np.ndarray, names: list[str], ending: str = "png") -> Path:
    for number, (pixels, name) in enumerate(zip(images, names, strict=True)):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name / f"{number:03}.{ending}")
    return root


def all_of(found: Found, size: int = 0) -> torch.Tensor:
    return decode(found, range(len(found.labels)), size)


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_parquet_of_encoded_images_comes_back_to_the_byte(tmp_path: Path, kind: str) -> None:
    images = pictures(CHUNK + 3)
    rows = [{"bytes": encoded(pixels, kind), "path": None} for pixels in images]
    path = write_parquet(tmp_path / "a.parquet", rows, [0, 1, 2] * 86 + [0], {"classes": '["x", "y", "z"]'})
    found = find_images(str(path), COLUMNS, SPLITS)
    assert list(found) == [""] and found[""].names == ("x", "y", "z") and found[""].labels[:4] == [0, 1, 2, 0]
    assert torch.equal(all_of(found[""]), channels_first(images))
    assert torch.equal(decode(found[""], [257, 3], 0), channels_first(images[[257, 3]]))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_may_be_bytes_paths_or_nested_lists(tmp_path: Path, channels: int) -> None:
    images = pictures(3, channels)
    Image.fromarray(images[1]).save(tmp_path / "one.png")
    for number, value in enumerate([encoded(images[0]), {"bytes": None, "path": "one.png"}, images[2].tolist()]):
        path = write_parquet(tmp_path / f"{number}.parquet", [value], [0])
        assert torch.equal(all_of(find_images(str(path), COLUMNS, SPLITS)[""]), channels_first(images[[number]]))
    loose = Found("loose", [Image.fromarray(images[0]), images[1], str(tmp_path / "one.png")], [0, 0, 0])
    assert torch.equal(all_of(loose), channels_first(images[[0, 1, 1]]))


def test_grey_among_colour_becomes_colour() -> None:
    grey, colour = pictures(2, 1), pictures(1)
    images = all_of(Found("mixed", [encoded(grey[0]), encoded(colour[0]), encoded(grey[1])], [0, 0, 0]))
    assert images.shape == (3, 3, 5, 4)
    assert torch.equal(images[0], torch.from_numpy(grey[0]).expand(3, 5, 4))
    assert torch.equal(images[1], channels_first(colour)[0])
    alpha = Image.fromarray(colour[0]).convert("RGBA")
    assert torch.equal(all_of(Found("alpha", [alpha], [0]))[0], channels_first(colour)[0])


def test_size_scales_the_middle_square() -> None:
    """A 4x8 image of a grey left, white middle and grey right: the 4x4 middle is white; halved, it is 2x2 of white."""
    wide = np.full((4, 8), 100, np.uint8)
    wide[:, 2:6] = 255
    assert torch.equal(all_of(Found("a", [wide], [0]), 2), torch.full((1, 1, 2, 2), 255, dtype=torch.uint8))
    stripes = np.zeros((8, 8), np.uint8)
    stripes[:, ::2] = 200
    small = all_of(Found("a", [encoded(stripes)], [0]), 2)
    assert (small.int() - 100).abs().max() <= 20, "scaling down averages; taking every fourth pixel would give 0 or 200"
    tall = pictures(1, 3, 9, 5)
    assert all_of(Found("a", [tall[0]], [0]), 3).shape == (1, 3, 3, 3)


def test_turned_photographs_stand_upright() -> None:
    pixels = pictures(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right to see it
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    seen = all_of(Found("a", [buffer.getvalue()], [0]))
    assert torch.equal(seen, channels_first(np.rot90(pixels, -1)[None].copy()))


def test_class_folders_and_their_splits(tmp_path: Path) -> None:
    images = pictures(4)
    root = write_folders(tmp_path / "flat", images, ["b", "a", "b", "c"])
    (root / "b" / "Thumbs.db").write_bytes(b"?")
    (root / ".hidden").mkdir()
    found = find_images(str(root), COLUMNS, SPLITS)[""]
    assert found.names == ("a", "b", "c") and found.labels == ["a", "b", "b", "c"]
    assert torch.equal(all_of(found), channels_first(images[[1, 0, 2, 3]]))
    for split in ("train", "test"):
        write_folders(tmp_path / "split" / split, images, ["b", "a", "b", "c"], "webp")
    assert list(find_images(str(tmp_path / "split"), COLUMNS, SPLITS)) == ["test", "train"]


def test_a_folder_of_parquet_is_parted_by_file_names(tmp_path: Path) -> None:
    rows = [encoded(pixels) for pixels in pictures(4)]
    for name, some in (("train-0-of-2", rows[:1]), ("train-1-of-2", rows[1:3]), ("test-0-of-1", rows[3:])):
        write_parquet(tmp_path / "data" / f"{name}.parquet", some, [0] * len(some), split=["x"] * len(some))
    found = find_images(str(tmp_path), COLUMNS, SPLITS)
    assert {name: len(part.labels) for name, part in found.items()} == {"train": 3, "test": 1}
    write_parquet(tmp_path / "plain" / "a.parquet", rows[:2], [0, 1])
    write_parquet(tmp_path / "plain" / "b.parquet", rows[2:], [1, 0])
    assert find_images(str(tmp_path / "plain"), COLUMNS, SPLITS)[""].labels == [0, 1, 1, 0]
    write_parquet(tmp_path / "plain" / "c.parquet", rows[2:], ["one", "two"])
    with pytest.raises(DataError, match=r"plain \(3 files\): expected the same columns in every file"):
        find_images(str(tmp_path / "plain"), COLUMNS, SPLITS)


def test_a_split_column_parts_rows_and_errors_name_the_row_of_the_file(tmp_path: Path) -> None:
    rows = [encoded(pixels) for pixels in pictures(3)] + [b"\x89PNG no more"]
    path = write_parquet(tmp_path / "a.parquet", rows, [0, 1, 2, 3], split=["train", "test", "train", "test"])
    found = find_images(str(path), COLUMNS, SPLITS)
    assert {name: part.labels for name, part in found.items()} == {"train": [0, 2], "test": [1, 3]}
    with pytest.raises(DataError, match=r"a\.parquet, split test, row 3: cannot read the image: .*Mend or remove it"):
        all_of(found["test"])


def test_data_sets_saved_by_datasets_and_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    images = pictures(4)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"image": [Image.fromarray(pixels) for pixels in images], "label": [1, 0, 1, 1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "one")
    found = find_images(str(tmp_path / "one"), COLUMNS, SPLITS)[""]
    assert found.names == ("no", "yes") and found.labels == [1, 0, 1, 1]
    assert torch.equal(all_of(found), channels_first(images))
    datasets.DatasetDict({"train": data.select([2, 0]), "test": data.select([1])}).save_to_disk(tmp_path / "two")
    found = find_images(str(tmp_path / "two"), COLUMNS, SPLITS)
    assert torch.equal(all_of(found["train"]), channels_first(images[[2, 0]])) and found["test"].labels == [0]
    data.to_parquet(tmp_path / "three.parquet")
    assert find_images(str(tmp_path / "three.parquet"), COLUMNS, SPLITS)[""].names == ("no", "yes")
    monkeypatch.setattr(datasets, "load_dataset", lambda path: datasets.DatasetDict({path: data}))
    found = find_images("some/name", COLUMNS, SPLITS)["some/name"]
    assert torch.equal(all_of(found), channels_first(images)) and found.place == "some/name, split some/name"


def test_arrays_in_an_archive(tmp_path: Path) -> None:
    colour, grey = pictures(3), pictures(3, 1)
    path = tmp_path / "a.npz"
    np.savez(path, x_train=colour, y_train=[[0], [1], [1]], x_test=colour[:1].transpose(0, 3, 1, 2), y_test=[1])
    found = find_images(str(path), COLUMNS, SPLITS)
    assert found["train"].labels == [0, 1, 1]
    assert torch.equal(all_of(found["train"]), channels_first(colour))
    assert torch.equal(all_of(found["test"]), channels_first(colour[:1]))
    np.savez(path, images=grey, labels=["u", "v", "u"], classes=["u", "v"], split=["train", "test", "train"])
    found = find_images(str(path), COLUMNS, SPLITS)
    assert found["train"].names == ("u", "v") and found["train"].labels == ["u", "u"]
    assert torch.equal(all_of(found["train"]), channels_first(grey[[0, 2]]))
    np.savez(path, image=grey[..., None] / 255, label=[0, 1, 0])
    assert torch.equal(all_of(find_images(str(path), COLUMNS, SPLITS)[""]), channels_first(grey))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.array([[[0.5]], [[np.nan]]]), r"image 1: expected float64 values from 0 to 1, found nan"),
        (np.array([[[0.5]], [[255.0]]]), r"image 1: expected float64 values from 0 to 1, found 255\.0"),
        (np.array([[[-1]], [[3]]]), r"image 0: expected int64 values from 0 to 255, found -1"),
        (np.array([[["a"]], [["b"]]]), r"expected images of numbers, found an array of <U1"),
        (np.zeros((2, 3), np.uint8), r"expected images of height x width, .* found shape \(3,\)"),
        (np.zeros((2, 5, 4, 2), np.uint8), r"1, 3 or 4 channels before or after them, found shape \(5, 4, 2\)"),
        (np.zeros((3, 2, 2), np.uint8), r"expected a label for each image, found 3 and 2"),
    ],
)
def test_arrays_that_are_no_images(tmp_path: Path, images: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "a.npz", images=images, labels=[0, 1])
    with pytest.raises(DataError, match=message):
        find_images(str(tmp_path / "a.npz"), COLUMNS, SPLITS)


def test_archives_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x_train=pictures(2), z=[1, 2])
    with pytest.raises(DataError, match=r"expected x_train and y_train, or images and labels, found x_train \(2, 5, 4"):
        find_images(str(path), COLUMNS, SPLITS)
    np.savez(path, images=pictures(2), labels=[0, 1])
    with pytest.raises(DataError, match=r"expected class names under 'wnid', found images, labels"):
        find_images(str(path), Columns(image="image", label="label", split="", names="wnid"), SPLITS)
    np.savez(path, images=np.array([None, {}], dtype=object), labels=[0, 1])
    with pytest.raises(DataError, match=r"expected an \.npz archive of plain arrays"):
        find_images(str(path), COLUMNS, SPLITS)
    path.write_bytes(b"PK no archive")
    with pytest.raises(DataError, match=r"expected an \.npz archive of plain arrays"):
        find_images(str(path), COLUMNS, SPLITS)


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    good = encoded(pictures(1)[0])
    with pytest.raises(DataError, match=r"x, row 1: expected 5x4 pixels like the first image, found 4x5 .*Set size"):
        all_of(Found("x", [good, encoded(pictures(1, 3, 4, 5)[0])], [0, 0]))
    with pytest.raises(DataError, match=r"x, row 1: cannot read the image: cannot identify"):
        all_of(Found("x", [good, b"<svg/>"], [0, 0]))
    with pytest.raises(DataError, match=r"x, row 1: cannot read the image"):
        all_of(Found("x", [good, good[:60]], [0, 0]))
    with pytest.raises(DataError, match=r"x, row 1: expected an encoded image, a path or an array, found NoneType"):
        all_of(Found("x", [good, {"bytes": None, "path": None}], [0, 0]))
    with pytest.raises(DataError, match=r"x, row 0 \(.*gone\.png\): cannot read the image: .*No such file"):
        all_of(Found("x", [tmp_path / "gone.png"], [0]))
    with pytest.raises(DataError, match=r"row 0: expected 8 bits a channel, found mode I;16"):
        all_of(Found("x", [Image.fromarray(np.zeros((2, 2), np.uint16))], [0]))


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [b"x"], [0], {"fine": '["u"]'}, file=["f"])
    with pytest.raises(DataError, match=r"expected a column 'img', found image, label, file\. Set image_column"):
        find_images(str(path), Columns(image="img", label="label", split="split", names=""), SPLITS)
    with pytest.raises(DataError, match=r"expected a column 'y', found image, label, file\. Set label_column"):
        find_images(str(path), Columns(image="image", label="y", split="split", names=""), SPLITS)
    with pytest.raises(DataError, match=r"expected class names under the key 'coarse', found fine"):
        find_images(str(path), Columns(image="image", label="label", split="split", names="coarse"), SPLITS)
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="expected a parquet file"):
        find_images(str(path), COLUMNS, SPLITS)


def test_class_names_stand_under_the_label_column_s_own_key(tmp_path: Path) -> None:
    metadata = {"fine": json.dumps(["u", "v"]), "coarse": json.dumps(["w"]), "names": json.dumps(["n"])}
    path = write_parquet(tmp_path / "a.parquet", [b"x"], [0], metadata, fine_label=[0], coarse_label=[0])
    for label, names in (("fine_label", ("u", "v")), ("coarse_label", ("w",)), ("label", ("n",))):
        columns = Columns(image="image", label=label, split="", names="")
        assert find_images(str(path), columns, SPLITS)[""].names == names
    columns = Columns(image="image", label="label", split="", names="fine")
    assert find_images(str(path), columns, SPLITS)[""].names == ("u", "v")


def test_places_where_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"expected parquet files, a saved data set or a folder for each class, found n"
    ):
        find_images(str(tmp_path), COLUMNS, SPLITS)
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"expected a \.parquet or \.npz file or a folder, found \.zip"):
        find_images(str(tmp_path / "a.zip"), COLUMNS, SPLITS)
    with pytest.raises(
        DataError, match=r"expected a \.parquet or \.npz file, a folder or a hub data set, found no .*b\."
    ):
        find_images(str(tmp_path / "b.parquet"), COLUMNS, SPLITS)
    with pytest.raises(DataError, match=r"no file or folder some/where, and the hub did not give a data set"):
        find_images("some/where", COLUMNS, SPLITS)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="expected a data set saved with save_to_disk"):
        find_images(str(tmp_path / "saved"), COLUMNS, SPLITS)


def test_digits_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        find_images("digits", COLUMNS, SPLITS)


def test_digits_are_scaled_to_bytes() -> None:
    pytest.importorskip("sklearn")
    found = find_images("digits", COLUMNS, SPLITS)[""]
    images = all_of(found)
    assert images.shape == (1797, 1, 8, 8) and found.labels[:5] == [0, 1, 2, 3, 4]
    # 17 shades: k / 16 of 255, rounded.
    assert images.unique().tolist() == [round(255 * k / 16) for k in range(17)]
    assert images[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    """Half opaque black is 255 * (1 - 128 / 255) = 127; what is hidden does not show."""
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 3] = [[255, 0], [128, 0]]
    expected = torch.tensor([[0, 255], [127, 255]], dtype=torch.uint8)
    whole = Image.fromarray(pixels)
    grey = Image.merge("LA", (Image.new("L", (2, 2)), whole.getchannel("A")))
    for number, image in enumerate((whole, grey)):
        image.save(tmp_path / f"{number}.png")
        (found,) = all_of(Found("some", [str(tmp_path / f"{number}.png")], [0]))
        assert torch.equal(found, expected.expand(3 if image is whole else 1, 2, 2))
    for arrays in (pixels[None], pixels[None].transpose(0, 3, 1, 2)):
        path = tmp_path / "set.npz"
        np.savez(path, x_train=np.repeat(arrays, 5, 0), y_train=np.arange(5))
        assert torch.equal(all_of(find_images(str(path), COLUMNS, SPLITS)["train"])[4], expected.expand(3, 2, 2))


def test_palettes_are_looked_up(tmp_path: Path) -> None:
    """With or without a transparent entry, even one with a transparency of its own for each."""
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    for name, transparency, last in (("a", None, [40, 50, 60]), ("b", 1, [255] * 3), ("c", b"\xff\x00", [255] * 3)):
        path = tmp_path / f"{name}.png"
        image.save(path, **({} if transparency is None else {"transparency": transparency}))
        (found,) = all_of(Found("some", [str(path)], [0]))
        assert found[:, 0, 0].tolist() == [10, 20, 30] and found[:, 0, 1].tolist() == last


def test_more_than_eight_bits_are_refused(tmp_path: Path) -> None:
    """Of what they hold nobody says which value is white."""
    deep = np.full((2, 2), 40_000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png\): expected 8 bits a channel, found mode I;16\. Convert the image"):
        all_of(Found("some", [str(tmp_path / "deep.png")], [0]))
    np.savez(tmp_path / "deep.npz", x_train=deep[None], y_train=np.arange(1))
    with pytest.raises(DataError, match="expected uint16 values from 0 to 255, found 40000"):
        find_images(str(tmp_path / "deep.npz"), COLUMNS, SPLITS)
