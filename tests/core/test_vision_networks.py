"""Networks by family: where the head is, what a processor's file says, names that match; timm where it is installed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from trees import job

from postgrad.core.vision_models import ClassifierConfig, load_classifier, save_classifier
from postgrad.core.vision_networks import Inputs, find_head, from_hub, is_saved, match_rows, replace_head, timm_network
from postgrad.errors import ModelError

CLASSES = ("a", "b", "c", "d", "e")
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DINO = {name: value for name, value in VIT.items() if name != "intermediate_size"}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "ViT": (VIT, 16),
    "DeiT": (VIT, 16),
    "Dinov2": (DINO, 32),  # class token beside the mean of the patches
    "Beit": (VIT, 16),
    "Swin": (SWIN, 16),
    "CLIP": ({"vision_config": VIT, "text_config": TEXT}, 16),
    "Siglip": ({"vision_config": VIT, "text_config": TEXT}, 16),
}


def family(name: str, **more: Any) -> Any:
    settings = FAMILIES[name][0]
    config = getattr(transformers, f"{name}Config")(**settings, num_labels=5, **more)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForImageClassification")(config).eval()


def images(size: int = 16) -> Tensor:
    return torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def load(path: Path | str, **settings: Any) -> Any:
    return load_classifier(ClassifierConfig(path=str(path), **settings), CLASSES, (3, 16, 16), job())


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_of_transformers(name: str, tmp_path: Path) -> None:
    model = family(name)
    model.save_pretrained(tmp_path / "theirs")
    classifier = load(tmp_path / "theirs").eval()
    seen = classifier(images())
    assert classifier.head_name == "classifier" and classifier.size == (16, 16)
    assert seen.features.shape == (2, FAMILIES[name][1])
    assert torch.equal(classifier.head()(seen.features), seen.logits)
    torch.testing.assert_close(model(classifier.pixels(images())).logits, seen.logits)
    save_classifier(classifier, tmp_path / "ours")
    torch.testing.assert_close(load(tmp_path / "ours").eval()(images()), seen)


def test_logits_that_no_layer_gives_alone_are_refused(tmp_path: Path) -> None:
    config = transformers.DeiTConfig(**VIT, num_labels=5)
    transformers.DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match="found none in DeiTForImageClassificationWithTeacher"):
        load(tmp_path / "two")


def test_the_head_is_the_last_linear_layer_that_gives_the_logits() -> None:
    body = [nn.Flatten(), nn.Linear(12, 5), nn.ReLU()]
    places: list[tuple[nn.Module, str]] = [
        (nn.Sequential(*body, nn.Linear(5, 5)), "3"),
        (nn.Sequential(*body, nn.Sequential(nn.Linear(5, 5), nn.Identity())), "3.0"),
        (nn.Sequential(*body, nn.Linear(5, 5), nn.Tanh()), "4"),
    ]
    for network, name in places:
        before = network.training
        assert find_head(network, Inputs((2, 2), 3), "x") == name
        assert network.training == before
        assert not any(module._forward_hooks for module in network.modules()), "no hook stays"


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"size": {"height": 12, "width": 8}}, Inputs((12, 8), 3)),
        ({"size": {"shortest_edge": 9}}, Inputs((9, 9), 3)),
        ({"size": 10, "image_mean": [0.1, 0.2, 0.3]}, Inputs((10, 10), 3, (0.1, 0.2, 0.3), (0.5,))),
        ({"size": [6, 4], "do_normalize": False}, Inputs((6, 4), 3, (0.0,), (1.0,))),
        ({"size": 20, "crop_size": {"height": 14, "width": 14}, "do_center_crop": True}, Inputs((14, 14), 3)),
        ({"size": 20, "crop_size": 14, "do_center_crop": False}, Inputs((20, 20), 3)),
        # 0..255 times 1 / 127.5, less 1, over 1: as 0..1 less 0.5, over 0.5.
        ({"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0}, Inputs((16, 16), 3, (0.5,), (0.5,))),
        ({"do_rescale": False, "image_mean": 127.5, "image_std": 255.0}, Inputs((16, 16), 3, (0.5,), (1.0,))),
    ],
)
def test_what_a_processor_s_file_says(known: dict[str, Any], expected: Inputs, tmp_path: Path) -> None:
    family("ViT").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(known))
    found = from_hub(str(tmp_path), (3, 5, 5)).inputs
    assert (found.size, found.channels) == (expected.size, expected.channels)
    assert found.mean == pytest.approx(expected.mean) and found.std == pytest.approx(expected.std)


def test_a_grey_network_takes_the_mean_of_three_channels(tmp_path: Path) -> None:
    family("ViT", num_channels=1).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.6], "image_std": [0.5]}')
    found = from_hub(str(tmp_path), (1, 5, 5)).inputs
    assert found.channels == 1 and found.mean == pytest.approx((0.3,)) and found.std == (0.5,)


@pytest.mark.parametrize(
    ("labels", "classes", "rows"),
    [
        (["a", "b", "c"], ["c", "a"], [2, 0]),
        (["Maltese dog, Maltese terrier", "polar_bear"], ["polar-bear", "maltese terrier"], [1, 0]),
        (["crane", "crane, bird"], ["crane"], [0]),
        (["crane, machine", "crane, bird"], ["crane"], None),
        (["a", "b"], ["a", "d"], None),
        (["tench, Tinca"], ["tench", "tinca"], None),
        ([], [], []),
    ],
)
def test_rows_are_found_by_name(labels: list[str], classes: list[str], rows: list[int] | None) -> None:
    assert match_rows(labels, classes) == rows


def test_a_head_without_bias_stays_without() -> None:
    network = nn.Sequential(nn.Linear(4, 3, bias=False))
    old = network[0].weight.detach().clone()
    replace_head(network, "0", [2, 0], 2, 0)
    assert torch.equal(network[0].weight, old[[2, 0]]) and network[0].bias is None


def test_our_folders_are_told_from_those_of_transformers(tmp_path: Path) -> None:
    assert not is_saved("some/name") and not is_saved(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert not is_saved(str(tmp_path))
    (tmp_path / "config.json").write_text('{"kind": "face"}')
    assert is_saved(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: expected JSON"):
        is_saved(str(tmp_path))


class Convolutions(nn.Module):
    """What timm gives for the name of a network that takes images of any size."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.pretrained_cfg = {"architecture": "convs", "input_size": (3, 24, 24), "classifier": "fc"}
        self.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}
        self.num_classes = num_classes
        self.conv, self.pool = nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(6, num_classes) if num_classes else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.fc(self.pool(self.conv(pixels)).flatten(1))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Put a module with timm's few functions in its place; its networks have so many classes of their own."""

    def use(own_classes: int) -> None:
        def create_model(name: str, pretrained: bool = False, num_classes: int = own_classes) -> nn.Module:
            return Convolutions(num_classes)

        timm, data = ModuleType("timm"), ModuleType("timm.data")
        vars(timm)["create_model"] = create_model
        vars(data)["infer_imagenet_subset"] = lambda cfg: None
        vars(data)["ImageNetInfo"] = None
        monkeypatch.setitem(sys.modules, "timm", timm)
        monkeypatch.setitem(sys.modules, "timm.data", data)

    return use


def test_timm_models_keep_their_settings(stand_in: Callable[[int], None], tmp_path: Path) -> None:
    stand_in(5)
    classifier = load("timm:convs", size=16)
    assert classifier.mean == (0.1, 0.2, 0.3) and classifier.size == (16, 16) and classifier.head_name == "fc"
    assert load("timm:convs").size == (24, 24)
    save_classifier(classifier, tmp_path / "model")
    torch.testing.assert_close(load(tmp_path / "model")(images()), classifier(images()))
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert saved["architecture"] == "convs" and saved["label_names"] == list(CLASSES) and saved["num_classes"] == 5
    assert saved["pretrained_cfg"]["input_size"] == [3, 16, 16] and saved["model_args"] == {}


def test_timm_models_without_a_head_or_weights_are_drawn_for_the_classes(stand_in: Callable[[int], None]) -> None:
    stand_in(0)
    for pretrained in (True, False):
        made = timm_network("convs", pretrained, 0, CLASSES)
        assert made.network.num_classes == 5 and made.labels == (CLASSES if not pretrained else made.labels)
        assert made.missing == (frozenset({"fc.weight", "fc.bias"}) if pretrained else frozenset())
    first, again = (load("timm:convs", pretrained=False) for _ in range(2))
    assert torch.equal(first.network.conv.weight, again.network.conv.weight)


def test_timm_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match="pip install timm"):
        load("timm:resnet18")


def test_real_timm(tmp_path: Path) -> None:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs timm: {error}")
    classifier = load("timm:vit_tiny_patch16_224", size=16, pretrained=False).eval()
    seen = classifier(images())
    assert classifier.head_name == "head" and seen.features.shape == (2, 192)
    save_classifier(classifier, tmp_path / "model")
    torch.testing.assert_close(load(tmp_path / "model").eval()(images()), seen)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    torch.testing.assert_close(theirs(classifier.pixels(images())), seen.logits)
