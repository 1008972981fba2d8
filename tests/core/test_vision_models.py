"""Classifiers: features and logits, preparation of images, round trips, heads that follow the classes."""

import copy
import gc
import hashlib
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from trees import job

from postgrad.core.config import dump_config, load_config
from postgrad.core.vision_models import (
    Classifier,
    ClassifierConfig,
    classifier_hash,
    load_classifier,
    save_classifier,
)
from postgrad.errors import ModelError

JOB = job()
SHAPE = (3, 8, 8)
CLASSES = ("cat", "dog", "owl")
TINY = ClassifierConfig(width=16, depth=2, heads=2)
BUILDERS = {"plain": lambda settings: Plain(settings)}


class Plain(nn.Module):
    """A network of a caller's own; its head divides by a norm, as face recognisers' do."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        height, width = settings["size"]
        self.body = nn.Linear(settings["channels"] * height * width, settings["width"])
        self.loss = Cosine(settings["width"], settings["num_classes"])

    def forward(self, pixels: Tensor) -> Tensor:
        return self.loss(self.body(pixels.flatten(1)).tanh())


class Cosine(nn.Module):
    """Logits by cosine, with a label margin that is off without labels."""

    def __init__(self, width: int, num: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num, width))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        return 8 * F.normalize(features) @ F.normalize(self.weight).T


def images(num: int = 4, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (num, *shape), dtype=torch.uint8, generator=generator)


def vit(folder: Path, labels: tuple[str, ...] = (), **settings: Any) -> Path:
    """Save a transformers model as another program would."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    named = {"id2label": dict(enumerate(labels))} if labels else {"num_labels": 3}
    torch.manual_seed(1)
    ViTForImageClassification(ViTConfig(**shape, **named, image_size=8, patch_size=4, **settings)).save_pretrained(
        folder
    )
    return folder


def load(path: Path | str, classes: tuple[str, ...] = CLASSES, **more: Any) -> Classifier:
    settings = {name: more.pop(name) for name in ("size", "mean", "std", "head") if name in more}
    config = replace(TINY, path=str(path), **settings)
    return load_classifier(config, classes, more.pop("shape", SHAPE), more.pop("job", JOB), **more)


def test_tiny_depends_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first = classifier_hash(load("tiny"))
    assert torch.equal(torch.get_rng_state(), before), "drawing weights leaves other draws alone"
    torch.manual_seed(5)
    assert classifier_hash(load("tiny")) == first != classifier_hash(load("tiny", job=job(seed=1)))


def test_tiny_takes_rectangles_and_grey_images() -> None:
    classifier = load("tiny", shape=(1, 6, 4))
    seen = classifier(images(2, (1, 6, 4)))
    assert seen.features.shape == (2, 16) and seen.logits.shape == (2, 3)
    assert classifier.head_name == "classifier" and classifier.classes == CLASSES and classifier.size == (6, 4)
    assert classifier.network.config.id2label == dict(enumerate(CLASSES))
    assert not any(isinstance(module, nn.Dropout) and module.p for module in classifier.modules())


def test_features_are_what_the_head_reads_and_pass_gradients_on() -> None:
    classifier = load("tiny")
    seen = classifier(images())
    assert torch.equal(classifier.head()(seen.features), seen.logits)
    seen.features.sum().backward()
    gradients = {name for name, weight in classifier.network.named_parameters() if weight.grad is not None}
    assert gradients and not any(name.startswith("classifier") for name in gradients)


def test_nothing_of_a_call_is_kept() -> None:
    classifier = load("tiny")
    features = weakref.ref(classifier(images()).features)
    classifier.head()(torch.zeros(1, 16, requires_grad=True) * 1)
    assert features() is None
    twin = copy.deepcopy(classifier)
    assert torch.equal(twin(images()).features, classifier(images()).features)
    twin.head().weight.data.zero_()
    assert twin(images()).logits.abs().max() < classifier(images()).logits.abs().max()
    network = weakref.ref(classifier.network)
    gc.disable()
    try:
        del classifier
        assert network() is None, "no cycle keeps the weights in memory"
    finally:
        gc.enable()


def test_a_call_that_fails_leaves_no_trace() -> None:
    classifier = load("tiny")
    with pytest.raises(ValueError, match="channel"):
        classifier(images(2, (5, 8, 8)))
    assert classifier(images()).features.shape == (4, 16)
    classifier.network.classifier = nn.Linear(16, 3)
    with pytest.raises(AssertionError, match="classifier was called 0 times; was it replaced"):
        classifier(images())


def test_images_are_scaled_normalised_resized_and_repeated() -> None:
    """Byte 51 is 0.2; less a mean of 0.1, 0.2 and 0.4, over 0.5, 1 and 2: 0.2, 0 and -0.1."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    kind: dict[str, Any] = {"size": (2, 2), "mean": (0.1, 0.2, 0.4), "std": (0.5, 1.0, 2.0), "channels": 3}
    classifier = Classifier(network, "1", CLASSES, **kind)
    pixels = classifier.pixels(torch.full((1, 1, 2, 2), 51, dtype=torch.uint8))
    torch.testing.assert_close(pixels, torch.tensor([0.2, 0.0, -0.1]).view(1, 3, 1, 1).expand(1, 3, 2, 2))
    checks = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8).repeat(4, 4).expand(1, 3, 8, 8)
    plain = Classifier(network, "1", CLASSES, size=(2, 2), mean=(0.0,), std=(1.0,))
    assert (plain.pixels(checks) - 0.5).abs().max() < 0.1, "scaling down averages over what lies between"
    assert classifier(checks).logits.shape == (1, 3)


def test_half_precision_comes_back_in_float32() -> None:
    frozen = load("tiny", job=replace(JOB, dtype=torch.bfloat16), frozen=True)
    assert {weight.dtype for weight in frozen.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in frozen.parameters()) and not frozen.training
    seen = frozen(images())
    assert seen.features.dtype == seen.logits.dtype == torch.float32
    whole = load("tiny")
    assert whole.training and next(whole.parameters()).dtype == torch.float32
    torch.testing.assert_close(seen.logits, whole(images()).logits, atol=0.05, rtol=0.05)


def test_a_saved_folder_loads_here_and_in_transformers(tmp_path: Path) -> None:
    classifier = load("tiny", mean=(0.1, 0.2, 0.3), std=(0.7,))
    save_classifier(classifier, tmp_path / "model")
    back = load(tmp_path / "model", frozen=True)
    assert (back.mean, back.std, back.size) == ((0.1, 0.2, 0.3), (0.7, 0.7, 0.7), (8, 8))
    torch.testing.assert_close(back(images()), classifier(images()))
    assert classifier_hash(back) == classifier_hash(classifier)
    theirs = ViTForImageClassification.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(theirs(classifier.pixels(images())).logits, classifier(images()).logits)
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    save_classifier(load("tiny", job=job(seed=3)), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert classifier_hash(load(tmp_path / "model")) != classifier_hash(classifier)


def test_a_network_of_the_caller_s_own_round_trips(tmp_path: Path) -> None:
    classifier = load("plain", builders=BUILDERS, mean=(0.0,), std=(1.0,))
    seen = classifier(images())
    assert classifier.head_name == "loss" and seen.features.shape == (4, 16)
    assert torch.equal(classifier.head()(seen.features), seen.logits)
    assert classifier_hash(load("plain", builders=BUILDERS)) == classifier_hash(classifier)
    save_classifier(classifier, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    back = load(tmp_path / "model", builders=BUILDERS, frozen=True)
    torch.testing.assert_close(back(images()), seen)
    assert back.mean == (0.0, 0.0, 0.0) and back.settings["kind"] == "plain"
    save_classifier(back, tmp_path / "again")
    torch.testing.assert_close(load(tmp_path / "again", builders=BUILDERS)(images()), seen)
    with pytest.raises(ModelError, match=r"model: expected a kind among timm, found 'plain'"):
        load(tmp_path / "model")
    with pytest.raises(ModelError, match=r"expected a head .* found one of 3 \(cat"):
        load(tmp_path / "model", ("cat", "dog", "emu", "elk"), builders=BUILDERS, frozen=True)
    with pytest.raises(ModelError, match="expected a linear layer to take classes from, found Cosine loss"):
        load(tmp_path / "model", ("cat", "dog", "emu", "elk"), builders=BUILDERS)


def test_adapters_are_neither_saved_nor_hashed(tmp_path: Path) -> None:
    loose = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), "1", CLASSES, size=(8, 8))
    with pytest.raises(ModelError, match="expected a network with a kind in its settings, found Sequential"):
        save_classifier(loose, tmp_path / "model")
    from peft import LoraConfig, inject_adapter_in_model

    classifier = load("tiny")
    before = classifier_hash(classifier)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["fc1"]), classifier.network)
    assert classifier_hash(classifier) == before, "the base is hashed without its adapters"
    with pytest.raises(ModelError, match="without adapters to save, found some; export, merge or drop them"):
        save_classifier(classifier, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_hashes_are_of_dtype_shape_and_bytes() -> None:
    """sha256 of b"torch.float32 (2,)" and eight zero bytes."""
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), "1", ("a", "b"), size=(1, 1))
    classifier.head().bias.data.zero_()
    assert classifier_hash(classifier)["1.bias"] == hashlib.sha256(b"torch.float32 (2,)" + bytes(8)).hexdigest()
    tiny = load("tiny")
    before = classifier_hash(tiny)
    assert before.keys() == tiny.network.state_dict().keys()
    tiny.head().bias.data[1] += 1e-7
    changed = classifier_hash(tiny)
    assert [name for name in before if before[name] != changed[name]] == ["classifier.bias"]


def test_rows_of_a_pretrained_head_follow_the_classes(tmp_path: Path) -> None:
    path = vit(tmp_path / "a", ("tench, Tinca tinca", "Great_White-Shark", "crane", "crane", "owl"))
    whole = load(path, ())
    assert whole.classes[:2] == ("tench, Tinca tinca", "Great_White-Shark") and whole(images()).logits.shape == (4, 5)
    some = load(path, ("owl", "Tinca tinca", "great white shark"), frozen=True)
    torch.testing.assert_close(some(images()).logits, whole.eval()(images()).logits[:, [4, 0, 1]])
    save_classifier(some, tmp_path / "b")
    assert load(tmp_path / "b", ()).classes == ("owl", "Tinca tinca", "great white shark")
    with pytest.raises(ModelError, match=r"expected a head for the data's 2 classes \(crane, owl.* Finetune the model"):
        load(path, ("crane", "owl"), frozen=True)  # which crane?


def test_unnamed_rows_are_kept_by_position(tmp_path: Path) -> None:
    path = vit(tmp_path / "a")
    assert load(path).classes == CLASSES and classifier_hash(load(path)) == classifier_hash(load(path, ()))
    assert load(path).network.config.id2label == dict(enumerate(CLASSES))


def test_other_names_want_a_decision(tmp_path: Path) -> None:
    path = vit(tmp_path / "a", ("x", "y", "z"))
    with pytest.raises(
        ModelError, match=r"other names than the data's \(cat, dog, owl, \.\.\.\)\. Set head to position"
    ):
        load(path)
    kept = load(path, head="position")
    assert classifier_hash(kept) == classifier_hash(load(path, ())) and kept.classes == CLASSES
    drawn = load(path, head="new")
    assert classifier_hash(drawn)["classifier.weight"] != classifier_hash(kept)["classifier.weight"]
    with pytest.raises(ModelError, match="expected a head for the data's 2 classes"):
        load(path, ("cat", "dog"), head="position")
    with pytest.raises(ModelError, match="expected a head for the data's 3 classes"):
        load(path, head="new", frozen=True)


def test_a_new_head_is_small_and_drawn_from_the_seed(tmp_path: Path) -> None:
    path = vit(tmp_path / "a")
    many = tuple(f"c{i}" for i in range(40))
    before = torch.get_rng_state()
    first = load(path, many)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.head().weight.std().item() == pytest.approx(0.02, rel=0.1) and not first.head().bias.any()
    assert torch.equal(first.head().weight, load(path, many).head().weight)
    assert not torch.equal(first.head().weight, load(path, many, job=job(seed=1)).head().weight)
    assert first(images()).logits.shape == (4, 40)
    save_classifier(first, tmp_path / "b")
    torch.testing.assert_close(load(tmp_path / "b", many)(images()), first(images()))


def test_a_body_without_head_gets_one_and_cannot_be_frozen(tmp_path: Path) -> None:
    model = ViTForImageClassification.from_pretrained(vit(tmp_path / "a"))
    model.vit.save_pretrained(tmp_path / "body")
    first = load(tmp_path / "body", CLASSES[:2])  # two, as many rows as transformers gives a model that says nothing
    assert first.head().weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(first.head().weight, load(tmp_path / "body", CLASSES[:2]).head().weight)
    with pytest.raises(ModelError, match=r"expected all weights of a frozen classifier, found none for \['classifier"):
        load(tmp_path / "body", frozen=True)


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load .*nowhere'.*Give a hub name you can reach"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="a multiple of patch = 2 pixels, found 7x8"):
        load("tiny", shape=(3, 7, 8))
    with pytest.raises(ModelError, match="expected a width that heads = 3 divide, found 16"):
        load_classifier(replace(TINY, heads=3), CLASSES, SHAPE, JOB)
    with pytest.raises(ModelError, match="needs classes to tell apart, found none"):
        load("tiny", ())
    path = vit(tmp_path / "a")
    with pytest.raises(ModelError, match=r"does not take images of 3 channels and 10x10 pixels: .*Set size to what"):
        load(path, size=10)
    with pytest.raises(ModelError, match=r"expected 1 or 3 values of std, found \(0.5, 0.5\)"):
        load(path, std=(0.5, 0.5))
    with pytest.raises(ModelError, match="the network takes 1 channels, the images have 3"):
        load(vit(tmp_path / "grey", num_channels=1))
    grey = load(path, shape=(1, 12, 12))
    assert grey(images(2, (1, 12, 12))).logits.shape == (2, 3), "grey is repeated, and 12 pixels become 8"
    (tmp_path / "a" / "model.safetensors").write_bytes(b"\x08" + bytes(15))
    with pytest.raises(ModelError, match="cannot load"):
        load(path)


def test_settings_round_trip(tmp_path: Path) -> None:
    config = ClassifierConfig(path="a", mean=(0.1, 0.2, 0.3), head="new")
    (tmp_path / "c.toml").write_text(dump_config(config))
    assert load_config(ClassifierConfig, tmp_path / "c.toml") == config
