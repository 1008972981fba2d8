"""Which weights train."""

import pytest
import tiny_vision
import torch
from networks import VISION, describe
from torch import nn

from postgrad.core.vision_models import Classifier
from postgrad.errors import ConfigError, ModelError
from postgrad.forgetting.baselines_parts import middle_block, part_names, train_only
from postgrad.forgetting.face import CosFaceHead, FaceTransformer, FaceTransformerConfig


def count(classifier, names):
    return sum(param.numel() for name, param in classifier.named_parameters() if name in set(names))


def test_parts_of_the_face_transformer():
    """The paper's 99.73 % is everything but the head. Its 50.66 % counts norm and head besides the lower half."""
    with torch.device("meta"):
        network = FaceTransformer(FaceTransformerConfig(), CosFaceHead(512, 100))
    classifier = Classifier(network, "head", [str(i) for i in range(100)], size=(112, 112))
    total = count(classifier, part_names(classifier, "all"))
    assert total == 19_157_504
    body, lower = (count(classifier, part_names(classifier, part)) for part in ("body", "lower"))
    assert total - body == 51_200 and round(100 * body / total, 2) == 99.73
    assert round(100 * lower / total, 2) == 50.39
    assert round(100 * (lower + 1024 + 51_200) / total, 2) == 50.66
    assert middle_block(classifier) == "blocks.2"


def test_parts_of_a_small_network():
    classifier = tiny_vision.fresh()
    names = part_names(classifier, "lower")
    assert {name.rsplit(".", 1)[0].split(".mlp")[0] for name in names} == {
        "network.embed",
        "network.blocks.0",
        "network.blocks.0.norm",
        "network.blocks.1",
        "network.blocks.1.norm",
    }
    last = part_names(classifier, "last", 2)
    assert set(names) | set(last) == set(part_names(classifier, "all")) and not set(names) & set(last)
    train_only(classifier, last)
    assert {name for name, param in classifier.named_parameters() if param.requires_grad} == set(last)


def test_parts_of_a_pretrained_architecture():
    kind, config = describe("vit")
    classifier = Classifier(kind(config), "classifier", list("abcde"), size=(VISION["image_size"],) * 2)
    lower = part_names(classifier, "lower")
    assert any("embeddings" in name for name in lower) and any(".0." in name for name in lower)
    assert not any(".1." in name or ".2." in name or "classifier" in name for name in lower)


def test_what_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match="last_blocks: expected 1 to 4"):
        part_names(tiny_vision.fresh(), "last", 5)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ModelError, match="none of the linear layers"):
        part_names(Classifier(network, "1", ("a", "b"), size=(2, 2)), "lower")
