"""The base: it learns, the seed alone decides what, and a margin head sees the labels."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_digits import SEED, base_config, drawn, images, job

from postgrad.core.report import read_metrics
from postgrad.core.vision import ImageSet
from postgrad.core.vision_models import Classifier, ClassifierConfig, load_classifier, save_classifier
from postgrad.errors import ModelError
from postgrad.forgetting.base import BUILDERS, MARGIN_HEADS, fresh, train_base
from postgrad.forgetting.face import CosFaceHead
from postgrad.forgetting.views import View, share_right

FACE = ClassifierConfig(path="face", width=16, depth=1, heads=2, patch=4)


@pytest.fixture(scope="module")
def few() -> ImageSet:
    return images()[0].select(list(range(96)))


def trained(images: ImageSet, folder: Path, *, seed: int = SEED, model: ClassifierConfig | None = None) -> Classifier:
    found = drawn(seed) if model is None else fresh(model, images.classes, images, job(folder, seed))
    train_base(found, images, base_config(6), job(folder, seed))
    return found


def accuracy(classifier: Classifier, images: ImageSet) -> float:
    return share_right(View(classifier, images).see_all(), images.labels)


def same(one: Classifier, other: Classifier) -> bool:
    own, others = one.state_dict(), other.state_dict()
    return own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own)


def test_it_learns_and_says_how_well(few: ImageSet, tmp_path: Path) -> None:
    before = accuracy(drawn(), few)
    classifier = trained(few, tmp_path)
    assert accuracy(classifier, few) > before + 10
    last = read_metrics(tmp_path)[-1]
    assert last["eval/train_accuracy"] == pytest.approx(accuracy(classifier, few))


def test_the_seed_alone_decides(few: ImageSet, tmp_path: Path) -> None:
    one, two, other = (trained(few, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert same(one, two) and not same(one, other)
    assert same(drawn(1), drawn(1)) and not same(drawn(1), drawn(2))


def test_a_finished_training_is_loaded(few: ImageSet, tmp_path: Path) -> None:
    first = trained(few, tmp_path)
    rows = read_metrics(tmp_path)
    assert same(trained(few, tmp_path), first) and read_metrics(tmp_path) == rows
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_images_are_moved_in_training(few: ImageSet, tmp_path: Path) -> None:
    classifier = drawn()
    train_base(classifier, few, replace(base_config(6), shift=1), job(tmp_path / "moved"))
    assert not same(classifier, trained(few, tmp_path / "still"))


def test_a_margin_head_sees_the_labels_in_training_only(few: ImageSet, tmp_path: Path) -> None:
    labels: list[bool] = []
    classifier = fresh(FACE, few.classes, few, job(tmp_path))
    assert isinstance(classifier.head(), CosFaceHead) and isinstance(classifier.head(), MARGIN_HEADS)
    classifier.head().register_forward_pre_hook(lambda _, args: labels.append(len(args) > 1 and args[1] is not None))
    train_base(classifier, few, base_config(2), job(tmp_path))
    assert True in labels
    labels.clear()
    accuracy(classifier, few)
    assert labels == [False]


def test_a_face_transformer_is_saved_and_found_again(few: ImageSet, tmp_path: Path) -> None:
    classifier = fresh(FACE, few.classes, few, job(tmp_path)).eval()
    save_classifier(classifier, tmp_path / "model")
    config = replace(FACE, path=str(tmp_path / "model"))
    again = load_classifier(config, few.classes, (1, 8, 8), job(tmp_path), builders=BUILDERS)
    assert same(again, classifier)


def test_a_model_of_other_classes_is_refused(few: ImageSet, tmp_path: Path) -> None:
    save_classifier(drawn(), tmp_path / "model")
    config = replace(FACE, path=str(tmp_path / "model"))
    with pytest.raises(ModelError, match="other names"):
        fresh(config, tuple("abcdefghij"), few, job(tmp_path))
