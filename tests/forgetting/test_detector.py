"""Drawn and saved detectors, how they prepare images, what they find, and how they are trained."""

import json
from dataclasses import replace

import pytest
import torch
from networks import network

from postgrad.core.config import OptimConfig, TrainConfig
from postgrad.core.layer_adapters import base_hashes, inject, pairs
from postgrad.core.report import read_metrics
from postgrad.core.runtime import Job
from postgrad.errors import ModelError
from postgrad.forgetting.blocks import ffn_blocks
from postgrad.forgetting.boxes import BoxSet, InMemory
from postgrad.forgetting.detector import (
    MEAN,
    STD,
    Detector,
    DetectorBaseConfig,
    DetectorConfig,
    load_detector,
    mirrored,
    save_detector,
    train_detector,
)
from postgrad.forgetting.shapes import SHAPES, shapes

KINDS = ("deformable", "conditional", "detr")
SMALL = DetectorConfig(width=32, queries=4)


@pytest.fixture(autouse=True)
def matcher():
    """transformers' matcher solves the assignment with scipy."""
    pytest.importorskip("scipy")


def job(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return Job("forget_boxes", folder, 3, torch.device("cpu"), torch.float32, 0, 1, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawn_detector_is_saved_and_loaded(kind, tmp_path):
    drawn = load_detector(replace(SMALL, kind=kind), SHAPES, job(tmp_path))
    again = load_detector(replace(SMALL, kind=kind), SHAPES, job(tmp_path))
    assert base_hashes(drawn.network) == base_hashes(again.network)
    save_detector(drawn, tmp_path / "model")
    loaded = load_detector(DetectorConfig(path=str(tmp_path / "model")), (), job(tmp_path))
    assert loaded.classes == SHAPES and loaded.sides == drawn.sides == (0, 0)
    assert base_hashes(loaded.network) == base_hashes(drawn.network)
    assert not any(p.requires_grad for p in loaded.network.parameters())
    found = drawn.find(shapes(3, "test"))
    assert len(found) == 3 and all(len(boxes.labels) == SMALL.queries for boxes in found)
    for one, other in zip(found, loaded.find(shapes(3, "test")), strict=True):
        torch.testing.assert_close(one.scores, other.scores)  # memory lies otherwise, and rounding with it


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_of_encoder_and_decoder_can_be_adapted(kind, tmp_path):
    network = load_detector(replace(SMALL, kind=kind), SHAPES, job(tmp_path)).network
    assert len(ffn_blocks(network)) == 4


def test_deformable_detr_has_twelve_blocks_and_the_papers_number_of_parameters():
    import transformers as hf

    stages = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"])
    config = hf.DeformableDetrConfig(backbone_config=stages, num_feature_levels=1, num_queries=4)
    config.encoder_ffn_dim = config.decoder_ffn_dim = 1024
    detector = hf.DeformableDetrForObjectDetection(config)
    blocks = ffn_blocks(detector)
    inject(detector, "request", [layer for block in blocks for layer in block.linears], rank=8, alpha=1)
    sizes = [matrix.numel() for pair in pairs(detector, "request").values() for matrix in pair]
    assert len(blocks) == 12 and sum(sizes) == 245_760


def test_images_are_scaled_normalised_and_padded(tmp_path):
    images = [torch.full((3, 20, 40), 255, dtype=torch.uint8), torch.zeros(1, 40, 20, dtype=torch.uint8)]
    target = {"class_labels": torch.tensor([0]), "boxes": torch.full((1, 4), 0.5)}
    boxes = BoxSet(InMemory(images), (0, 1), (target, target), SHAPES)
    plain = load_detector(SMALL, SHAPES, job(tmp_path))
    batch = replace(plain, sides=(10, 15)).batch(boxes, [0, 1])
    assert batch.pixel_values.shape == (2, 3, 15, 15), "the longer side is at most 15, so the shorter is 7.5"
    assert batch.pixel_mask is not None and batch.pixel_mask.sum((1, 2)).tolist() == [15 * 8, 15 * 8]
    torch.testing.assert_close(batch.pixel_values[0, :, 2, 2], (1 - torch.tensor(MEAN)) / torch.tensor(STD))
    torch.testing.assert_close(batch.pixel_values[1, :, 2, 2], -torch.tensor(MEAN) / torch.tensor(STD))
    assert batch.pixel_values[0, :, 10:].eq(0).all()
    assert plain.batch(boxes, [0]).pixel_mask is None


@pytest.mark.parametrize(
    ("written", "sides"),
    [
        ({"size": {"shortest_edge": 480, "longest_edge": 600}}, (480, 600)),
        ({"size": 480, "max_size": 640}, (480, 640)),
        ({"do_resize": False}, (0, 0)),
        (None, (800, 1333)),
    ],
)
def test_preparation_is_read_from_the_folder(written, sides, tmp_path):
    save_detector(load_detector(SMALL, SHAPES, job(tmp_path)), tmp_path / "model")
    file = tmp_path / "model" / "preprocessor_config.json"
    file.unlink()
    if written is not None:
        file.write_text(json.dumps({**written, "image_mean": [0.5, 0.5, 0.5]}))
    loaded = load_detector(DetectorConfig(path=str(tmp_path / "model")), (), job(tmp_path))
    assert loaded.sides == sides and loaded.mean == (MEAN if written is None else (0.5, 0.5, 0.5))


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ModelError, match="expected a folder or hub name of a transformers detector"):
        load_detector(DetectorConfig(path=str(tmp_path)), (), job(tmp_path))
    with pytest.raises(ModelError, match="DetrForObjectDetection"):
        Detector(network("vit"), SHAPES).find(shapes(1, "test"))


def test_boxes_are_mirrored_with_their_image():
    target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.2, 0.3, 0.1, 0.4]])}
    torch.testing.assert_close(mirrored(target)["boxes"], torch.tensor([[0.8, 0.3, 0.1, 0.4]]))


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind, tmp_path):
    detector = load_detector(replace(SMALL, kind=kind), SHAPES, job(tmp_path))
    steps = TrainConfig(max_steps=12, batch_size=4, log_every=1, save_every=0, optim=OptimConfig(lr=2e-3, clip=1.0))
    train_detector(detector, shapes(8, "train"), DetectorBaseConfig(train=steps), job(tmp_path / "base"))
    losses = [row["loss"] for row in read_metrics(tmp_path / "base") if "loss" in row]
    assert sum(losses[-3:]) < sum(losses[:3])
