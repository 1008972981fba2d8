"""Image sets: splits, draws and limits keyed by class, batches over ranks, augmentation pixel by pixel."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trees import job

from postgrad.core.config import TrainConfig, dump_config, load_config
from postgrad.core.loop import Batches
from postgrad.core.vision import (
    ImageBatches,
    ImagesConfig,
    ImageSet,
    augment,
    few,
    image_batches,
    load_images,
    share,
)
from postgrad.errors import ConfigError, DataError


def archive(folder: Path, counts: list[int], names: list[str] | None = None, **settings: Any) -> ImagesConfig:
    """Write so many images of each class; every pixel of an image is its number."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None].repeat(3, 1).repeat(2, 2)
    more = {"classes": names} if names else {}
    np.savez(folder / "a.npz", images=images, labels=labels, **more)
    return ImagesConfig(path=str(folder / "a.npz"), **settings)


def numbered(counts: list[int]) -> ImageSet:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return ImageSet(images, labels, tuple(f"c{i}" for i in range(len(counts))))


def numbers(images: ImageSet) -> list[int]:
    return images.images[:, 0, 0, 0].tolist()


def test_sets_are_selected_by_place_mask_and_class() -> None:
    images = numbered([2, 3, 1])
    assert len(images) == 6 and numbers(images.select([4, 0])) == [4, 0]
    assert numbers(images.select(images.labels == 1)) == [2, 3, 4]
    some = images.of_classes([2, 0])
    assert numbers(some) == [0, 1, 5] and some.labels.tolist() == [0, 0, 2] and some.classes == images.classes
    assert len(images.select([])) == len(images.of_classes([])) == 0
    with pytest.raises(DataError, match=r"expected classes from 0 to 2, found \[1, 3\]"):
        images.of_classes([3, 1])
    assert len(images.to(torch.device("cpu"))) == 6


def test_hashes_tell_shape_and_bytes() -> None:
    """sha256 of b"(1, 2, 2)" and four zero bytes begins with 4d70de1c6a8419ed."""
    images = numbered([3])
    same = ImageSet(images.images[[0, 0, 2]], images.labels, images.classes)
    assert images.hashes[0] == "4d70de1c6a8419ed"
    assert same.hashes == (images.hashes[0], images.hashes[0], images.hashes[2]) and len(set(images.hashes)) == 3
    flat = ImageSet(images.images.reshape(3, 1, 1, 4), images.labels, images.classes)
    assert not set(flat.hashes) & set(images.hashes)
    assert images.hashes is images.hashes, "computed once"


def test_a_share_of_each_class_is_held_out(tmp_path: Path) -> None:
    """A fifth of 10, 5, 2 and 1: 2, 1, 1 and none, since one image must stay."""
    config = archive(tmp_path, [10, 5, 2, 1])
    train, test = load_images(config, 0)
    assert Counter(test.labels.tolist()) == {0: 2, 1: 1, 2: 1}
    assert sorted(numbers(train) + numbers(test)) == list(range(18)) and train.classes == test.classes
    assert numbers(train) == sorted(numbers(train)), "the order of the source stays"
    assert numbers(load_images(config, 0)[1]) == numbers(test) != numbers(load_images(config, 1)[1])
    train, test = load_images(archive(tmp_path, [3, 3], test_share=0.0), 0)
    assert len(train) == 6 and len(test) == 0 and test.images.shape[1:] == train.images.shape[1:]


def test_what_is_held_out_of_a_class_does_not_depend_on_the_others(tmp_path: Path) -> None:
    held = numbers(load_images(archive(tmp_path, [10, 10], ["a", "b"]), 0)[1].of_classes([0]))
    assert numbers(load_images(archive(tmp_path, [10, 30, 7], ["a", "x", "y"]), 0)[1].of_classes([0])) == held


def test_splits_by_name_and_beside(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.uint8).reshape(6, 1, 1)
    np.savez(tmp_path / "a.npz", x_train=x[:3], y_train=["u", "v", "v"], x_valid=x[3:], y_valid=["v", "u", "u"])
    train, test = load_images(ImagesConfig(path=str(tmp_path / "a.npz"), test_split="valid"), 0)
    assert (numbers(train), numbers(test), test.labels.tolist()) == ([0, 1, 2], [3, 4, 5], [1, 0, 0])
    train, test = load_images(ImagesConfig(path=str(tmp_path / "a.npz"), test_share=0.5), 0)
    assert len(train) == 2 and len(test) == 1, "no split called test: held out of the training images"
    np.savez(tmp_path / "b.npz", images=np.repeat(x[:2, :, :, None], 3, 3), labels=[1, 0], classes=["v", "u"])
    both = ImagesConfig(path=str(tmp_path / "a.npz"), test_path=str(tmp_path / "b.npz"))
    train, test = load_images(both, 0)
    assert train.images.shape == (3, 3, 1, 1), "grey becomes colour beside colour"
    assert train.classes == ("v", "u") and test.labels.tolist() == [1, 0] and train.labels.tolist() == [1, 0, 0]
    with pytest.raises(DataError, match=r"a\.npz: expected a split 'training', found train, valid\. Set split"):
        load_images(ImagesConfig(path=str(tmp_path / "a.npz"), split="training"), 0)
    with pytest.raises(DataError, match=r"a\.npz: expected a split 'test', found train, valid\. Set test_split"):
        load_images(ImagesConfig(path=str(tmp_path / "b.npz"), test_path=str(tmp_path / "a.npz")), 0)
    np.savez(tmp_path / "c.npz", images=np.zeros((2, 2, 2)), labels=["u", "v"])
    with pytest.raises(DataError, match=r"c\.npz: .*expected 1x1 pixels like the training images .* found 2x2"):
        load_images(ImagesConfig(path=str(tmp_path / "a.npz"), test_path=str(tmp_path / "c.npz")), 0)


def test_labels_become_places(tmp_path: Path) -> None:
    def labels(values: list[Any], **more: Any) -> tuple[list[int], tuple[str, ...]]:
        np.savez(tmp_path / "a.npz", images=np.zeros((len(values), 1, 1)), labels=values, **more)
        train, _ = load_images(ImagesConfig(path=str(tmp_path / "a.npz"), test_share=0.0), 0)
        return train.labels.tolist(), train.classes

    assert labels([10, 2, -1, 2]) == ([2, 1, 0, 1], ("-1", "2", "10"))
    assert labels(["b", "a", "b"]) == ([1, 0, 1], ("a", "b"))
    assert labels([1, 0], classes=["z", "y"]) == ([1, 0], ("z", "y"))
    assert labels(["y", "z"], classes=["z", "y"]) == ([1, 0], ("z", "y"))
    for values, names, message in (
        ([0, 2], ["z", "y"], r"row 1: expected a label of 2 classes \(z, y\), found 2"),
        ([0, -1], ["z", "y"], r"row 1: expected a label of 2 classes \(z, y\), found -1"),
        (["z", "w"], ["z", "y"], r"row 1: expected a label of 2 classes \(z, y\), found 'w'"),
        ([0, 1], ["z", "y", "x"], r"training images of each of 3 classes, found none of 1 \(x\)"),
        ([0, 1], ["z", "z"], r"expected different class names, found z more than once"),
    ):
        with pytest.raises(DataError, match=message):
            labels(values, classes=names)
    with pytest.raises(DataError, match=r"expected labels that are all whole numbers or all names, found float"):
        labels([0.5, 1.0])
    with pytest.raises(DataError, match="expected images, found none"):
        labels([])


def test_the_limit_keeps_the_classes_proportions(tmp_path: Path) -> None:
    """Half of 20, 10, 2 and 1 images: 10, 5 or so, 1 and 1."""
    counts = [20, 10, 2, 1]
    config = archive(tmp_path, counts, test_share=0.0, limit=17)
    train, _ = load_images(config, 0)
    found = Counter(train.labels.tolist())
    assert len(train) == 17 and found[2] == found[3] == 1 and abs(found[0] - 10) <= 1
    less, _ = load_images(archive(tmp_path, counts, test_share=0.0, limit=9), 0)
    assert set(numbers(less)) < set(numbers(train)), "a larger limit contains the smaller one"
    with pytest.raises(ConfigError, match="limit: expected at least one image of each of 4 classes, found 3"):
        load_images(archive(tmp_path, counts, test_share=0.0, limit=3), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_share": 1.0}, "test_share: expected a share from 0 up to, not including, 1, found 1"),
        ({"size": -1}, "size: expected 0 or more, found -1"),
        ({"limit": -2}, "limit: expected 0 or more, found -2"),
        ({"split": "a", "test_split": "a"}, "expected two names, found 'a' for both"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_images(ImagesConfig(**settings), 0)


def test_settings_round_trip(tmp_path: Path) -> None:
    config = ImagesConfig(path="a", size=32, limit=5)
    (tmp_path / "c.toml").write_text(dump_config(config))
    assert load_config(ImagesConfig, tmp_path / "c.toml") == config


def test_few_draws_so_many_of_each_class_and_more_contain_fewer() -> None:
    images = numbered([5, 0, 4])
    two, three = few(images, 2, 0), few(images, 3, 0)
    assert Counter(two.labels.tolist()) == {0: 2, 2: 2} and set(numbers(two)) < set(numbers(three))
    assert numbers(few(images, 2, 1)) != numbers(two) == numbers(few(images, 2, 0))
    assert len(few(images.of_classes([1]), 2, 0)) == 0
    with pytest.raises(DataError, match=r"expected 5 images of each class, found 4 of c2"):
        few(images, 5, 0)
    with pytest.raises(ConfigError, match="shots: expected 1 or more, found 0"):
        few(images, 0, 0)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.floats(0.01, 1), st.integers(0, 3))
def test_share_takes_of_each_class_and_at_least_one(counts: list[int], fraction: float, seed: int) -> None:
    drawn = share(numbered(counts), fraction, seed)
    expected = {i: max(1, round(fraction * num)) for i, num in enumerate(counts) if num}
    assert Counter(drawn.labels.tolist()) == expected
    assert len(set(numbers(drawn))) == len(drawn)


def test_share_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="fraction: expected a share above 0 and up to 1, found 0"):
        share(numbered([2]), 0.0, 0)


def test_batches_are_permutations_dealt_over_ranks() -> None:
    images = numbered([4, 6])
    config = TrainConfig(batch_size=4, epochs=2)
    whole = image_batches(images, config, job())
    assert isinstance(whole, Batches) and len(whole) == 5
    stream = [i for step in range(5) for i in whole.items(step)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10)) and stream[:10] != stream[10:]
    assert [part.tolist() for part in whole[1]] == [whole.items(1)]
    ranks = [image_batches(images, config, job(rank, 3), micro_images=1) for rank in range(3)]
    for step in range(5):
        parts = [part for rank in ranks for part in rank[step]]
        assert all(len(part) == 1 for part in parts)
        assert sorted(torch.cat(parts).tolist()) == sorted(whole.items(step))
    assert ImageBatches(1, 1, 1, 0, rank=1, world=2)[0] == []
    assert len(image_batches(numbered([0]), config, job())) == 0
    assert [len(part) for part in ImageBatches(3, 1, 8, 0, micro_images=3)[0]] == [3, 3, 2]


def test_augment_mirrors_half_and_moves_by_reflection() -> None:
    """Every result is one of the 2 x 5 x 5 images that numpy's reflection and flip give."""
    image = torch.arange(2 * 4 * 6, dtype=torch.uint8).view(1, 2, 4, 6)
    padded = np.pad(image[0].numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
    moved = [padded[:, y : y + 4, x : x + 6] for y in range(5) for x in range(5)]
    possible = {m.tobytes() for m in moved} | {m[:, :, ::-1].tobytes() for m in moved}
    many = image.expand(400, -1, -1, -1)
    seen = augment(many, flip=True, shift=2, generator=torch.Generator().manual_seed(0))
    found = {one.numpy().tobytes() for one in seen}
    assert found <= possible and len(found) > 40 and seen.dtype == torch.uint8 and seen.is_contiguous()
    mirrored = augment(many, flip=True, shift=0, generator=torch.Generator().manual_seed(0))
    share_of_mirrored = (mirrored == image.flip(3)).all((1, 2, 3)).float().mean().item()
    assert 0.4 < share_of_mirrored < 0.6
    assert torch.equal(augment(many, flip=False, shift=0, generator=torch.Generator()), many)


def test_augment_follows_its_generator() -> None:
    images = torch.randint(256, (8, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def vary(seed: int) -> torch.Tensor:
        return augment(images, flip=True, shift=1, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(vary(3), vary(3)) and not torch.equal(vary(3), vary(4))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ConfigError, match="shift: expected 0 or more and less than 5 pixels, found 5"):
        augment(images, flip=True, shift=5, generator=torch.Generator())


def test_digits() -> None:
    pytest.importorskip("sklearn")
    train, test = load_images(ImagesConfig(), 0)
    assert train.images.shape == (1438, 1, 8, 8) and test.images.shape == (359, 1, 8, 8)
    assert train.classes == tuple("0123456789")


def test_real_images(shared: Path) -> None:
    folder = shared / "data"
    fine = ImagesConfig(path=str(folder / "images/cifar100_test.parquet"), label_column="fine_label", limit=200)
    train, test = load_images(fine, 0)
    assert train.images.shape == test.images.shape == (200, 3, 32, 32)
    assert train.classes[:2] == ("apple", "aquarium_fish") and set(train.labels.tolist()) == set(range(100))
    faces, held = load_images(ImagesConfig(path=str(folder / "faces/orl_40x10_112x92.npz")), 0)
    assert faces.images.shape == (320, 1, 112, 92) and Counter(held.labels.tolist()) == dict.fromkeys(range(40), 2)
    people, more = load_images(ImagesConfig(path=str(folder / "faces/lfw158_112x96.parquet"), limit=158), 0)
    assert people.images.shape == (158, 3, 112, 96) and len(more) == 158
    assert people.classes[0] == "Abdullah_Gul" and sorted(people.labels.tolist()) == list(range(158))
