"""Dry runs: each request's plan in lines, from the model where there is one, and nothing is trained or written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forgotten import forgotten
from tiny_digits import PLAIN, drawn, images, taught

from postgrad.core.vision import share
from postgrad.core.vision_models import classifier_hash
from postgrad.errors import DataError
from postgrad.forgetting.batches import PairBatches
from postgrad.forgetting.planning import Cost, Group, Neighbour, Plan
from postgrad.forgetting.preview import Outlook, cost, features, in_service, plan_lines, preview, seconds_each
from postgrad.forgetting.request import ForgetRequest
from postgrad.forgetting.sample_audit import Scope, rows_of
from postgrad.forgetting.schedules import TaskSplit

TRAIN = images()[0]
WORKING = share(TRAIN, 0.5, 3)
OUTLOOK = Outlook(TRAIN, WORKING, taught(), True, PLAIN, 4)
KEPT = TaskSplit((0, 1, 2, 3, 4, 5, 6, 7), (8, 9))
EIGHTS = ForgetRequest(id="a", classes=("8", "9"))


def test_a_request_is_planned_in_lines() -> None:
    hashes = classifier_hash(OUTLOOK.classifier)
    found = preview(OUTLOOK, [EIGHTS], [Scope(KEPT)], [])
    assert found["request a"] == "8, 9" and found["a: images"] == "24 to forget, 96 of 8 classes to keep"
    assert found["a: nearest kept"].startswith("8: ") and "; 9: " in found["a: nearest kept"]
    steps = 3 * (PLAIN.select_epochs + 40)  # 96 images to keep, 32 a step, with 24 to forget
    assert found["a: cost, at most"].startswith(f"{steps * (32 + 24):,} images in training, about ")
    assert classifier_hash(OUTLOOK.classifier) == hashes and all(
        p.grad is None for p in OUTLOOK.classifier.parameters()
    )


def test_pixels_stand_in_for_a_model_that_is_not_trained() -> None:
    found = preview(replace(OUTLOOK, classifier=drawn(), trained=False), [EIGHTS], [Scope(KEPT)], [])
    assert "a: nearest kept (by pixels)" in found
    shown = features(replace(OUTLOOK, trained=False), WORKING)
    assert torch.equal(shown, WORKING.images.float().flatten(1) / 255)


def test_shots_missing_classes_and_few_images_are_seen() -> None:
    found = preview(OUTLOOK, [replace(EIGHTS, shots=2)], [Scope(replace(KEPT, missing=(0,)))], [])
    assert found["a: images"] == "4 to forget, 14 of 8 classes to keep"
    assert found["a: ! retained without data"].startswith("No image of '0'")
    assert found["a: ! few images"].startswith("Fewer than the policy asks for: '8' (2)")


def test_what_was_forgotten_before_is_warned_of_and_left_out() -> None:
    earlier = [ForgetRequest(id="old", classes=("8",))]
    found = preview(OUTLOOK, [EIGHTS], [Scope(KEPT)], earlier)
    assert found["a: ! forgotten before"] == "class '8' (request 'old'). The request will be refused."
    second = preview(OUTLOOK, [ForgetRequest(id="b", classes=("0",)), EIGHTS], [Scope(KEPT), Scope(KEPT)], [])
    assert second["a: images"] == "24 to forget, 84 of 7 classes to keep"
    assert preview(OUTLOOK, [replace(EIGHTS, id="old")], [Scope(KEPT)], earlier) == {
        "request old": "carried out already"
    }


def test_single_images_are_planned_wherever_they_lie() -> None:
    outside = [row for row, each in enumerate(TRAIN.hashes) if each not in set(WORKING.hashes)][:2]
    asked = ForgetRequest(id="s", samples=tuple(TRAIN.hashes[row] for row in outside))
    scope = Scope(TaskSplit(tuple(range(10)), ()), rows_of(asked.samples, TRAIN))
    found = preview(OUTLOOK, [asked], [scope], [])
    assert found["request s"].startswith("single images, ") and found["s: images"].startswith("2 to forget, 120 of 10")
    assert "the others" in found["s: nearest kept"] and "s: ! near neighbours" not in found
    with pytest.raises(DataError, match="no class 'nine'"):
        preview(OUTLOOK, [ForgetRequest(id="n", classes=("nine",))], [Scope(KEPT)], [])


def test_the_cost_is_that_of_the_order_of_training() -> None:
    """A selection is on all blocks, what follows on the later half: (1 + 40 / 2) / 41 of a full step's time."""
    found = cost(EIGHTS, WORKING, [], PLAIN, 1.0)
    assert found.image_steps == len(PairBatches(96, 24, 32, 41, 0)) * 56
    assert found.seconds_each == pytest.approx(21 / 41)
    whole = cost(replace(EIGHTS, shots=3), WORKING, [], replace(PLAIN, select_epochs=0), 1.0)
    assert whole == Cost(len(PairBatches(24, 6, 32, 40, 0)) * 30, 1.0)
    assert 0 < seconds_each(OUTLOOK.classifier, TRAIN) < 1


def test_many_classes_are_counted() -> None:
    groups = tuple(Group(str(k), 9, 9, True, (Neighbour("x", 0.5, float("nan")),)) for k in range(6))
    plan = Plan("r", groups, 5, 5, 1, (), (), (), 0, Cost(10, 0.5))
    lines = plan_lines(plan, pixels=False)
    assert lines["r: nearest kept"] == "0: x (?); 1: x (?); 2: x (?); 3: x (?); and 2 more"
    assert lines["r: cost, at most"] == "10 images in training, about 5 s"


def test_a_service_is_read_without_its_model(tmp_path: Path) -> None:
    assert in_service(tmp_path) == []
    assert [each.id for each in in_service(forgotten(tmp_path).service)] == ["first", "second"]
