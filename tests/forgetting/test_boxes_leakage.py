"""What attackers find of forgotten objects: the nearest query by hand, attacks on made embeddings, figures by name."""

from dataclasses import replace

import pytest
import torch
from forgotten_boxes import job

from postgrad.errors import ConfigError
from postgrad.forgetting.boxes_leakage import (
    BoxAuditConfig,
    Seen,
    attack,
    check_box_audit,
    leak_figures,
    objects,
    see,
)
from postgrad.forgetting.detection import nearest_queries, predict
from postgrad.forgetting.detector import DetectorConfig, load_detector
from postgrad.forgetting.leakage import Pass
from postgrad.forgetting.shapes import SHAPES, shapes

CONFIG = BoxAuditConfig()


@pytest.fixture
def detector(tmp_path):
    return load_detector(DetectorConfig(width=32, queries=4), SHAPES, job(tmp_path))


def test_the_nearest_query_is_found_by_place_and_size():
    there = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.4, 0.4]])
    # one that is right, one of another size at the same place, one that is far from both
    found = torch.tensor([[0.7, 0.7, 0.1, 0.1], [0.25, 0.2, 0.2, 0.2], [0.7, 0.65, 0.4, 0.3], [0.5, 0.1, 0.9, 0.1]])
    assert nearest_queries(found, there).tolist() == [1, 2]
    # 5 L1 - 2 GIoU by hand: boxes of one size, apart by 0.1 and 0.3; GIoU 1/3, and 0 overlap in a hull of 0.1 x 0.2
    one, near, far = (torch.tensor([[x, 0.5, 0.2, 0.2]]) for x in (0.3, 0.4, 0.6))
    assert nearest_queries(torch.cat([far, near]), one).tolist() == [1]


def test_objects_are_read_box_by_box_in_the_order_of_the_images(detector):
    boxes = shapes(5, "train")
    shown = objects(detector, boxes)
    assert shown.labels.tolist() == [label for each in boxes.targets for label in each["class_labels"].tolist()]
    with torch.no_grad():
        found = predict(detector.network, detector.batch(boxes, [3]))
    queries = nearest_queries(found.boxes[0], boxes.targets[3]["boxes"])
    first = sum(len(each["class_labels"]) for each in boxes.targets[:3])
    torch.testing.assert_close(shown.features[first : first + len(queries)], found.embeddings[0, queries])
    torch.testing.assert_close(shown.logits[first : first + len(queries)], found.logits[0, queries])
    part = boxes.showing([4])
    assert set(objects(detector, part).labels.tolist()) <= {4}


def test_a_draw_of_training_images_is_looked_at(detector):
    boxes = shapes(6, "train"), shapes(3, "test")
    whole, few = (see(detector, boxes, BoxAuditConfig(images=num), 0) for num in (0, 2))
    assert len(few.bank.labels) < len(whole.bank.labels) and len(few.test.labels) == len(whole.test.labels)


def made(apart: float, seed: int) -> Pass:
    """Make embeddings of three classes, the third apart from the others by so much."""
    noise = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(40)
    centres = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0], [5.0, 0.0, apart]])
    features = centres[labels] + torch.randn(len(labels), 3, generator=noise)
    return Pass(features, torch.zeros(len(labels), 3), labels)


def test_what_lies_apart_is_found_and_only_the_excess_over_gold_is_a_leak():
    clear, mixed = (Seen(made(apart, 0), made(apart, 1)) for apart in (8.0, 0.0))
    after, gold = attack(clear, (2,), CONFIG), attack(mixed, (2,), CONFIG)
    figures = leak_figures(after, after, gold)
    for name in ("knn", "knn_alone", "probe", "probe_alone"):
        assert figures[f"{name}_found"] == 100 == figures[f"{name}_pretrained"]
        assert figures[f"{name}_excess"] == pytest.approx(100 - figures[f"{name}_gold"])
        assert 10 < figures[f"{name}_excess_low"] <= figures[f"{name}_excess"] < 90
    same = leak_figures(gold, after, gold)
    assert same["knn_excess"] == same["probe_excess"] == 0 and same["knn_excess_low"] < 0 < same["knn_excess_high"]
    alone = leak_figures(after, after, None)
    assert "knn_found" in alone and not any("gold" in name or "excess" in name for name in alone)


def test_without_forgotten_objects_nothing_is_asked():
    seen = Seen(made(8.0, 0).of((0, 1)), made(8.0, 1))
    assert attack(seen, (2,), CONFIG) == {} and leak_figures({}, {}, None) == {}


@pytest.mark.parametrize("wrong", [{"neighbours": 0}, {"penalty": 0.0}, {"images": -1}])
def test_an_audit_that_looks_at_nothing_is_refused(wrong):
    with pytest.raises(ConfigError, match="audit: expected neighbours"):
        check_box_audit(replace(CONFIG, **wrong))
