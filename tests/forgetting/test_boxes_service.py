"""A detector's service: its requests revoked and baked by the commands that do so for classifiers."""

import json
from dataclasses import replace

import pytest
import torch
from forgotten_boxes import DATA, forgotten_boxes, job

from postgrad.core.config import RuntimeConfig
from postgrad.core.layer_adapters import base_hashes
from postgrad.core.report import Table
from postgrad.core.vision_models import ClassifierConfig
from postgrad.errors import ArtefactError
from postgrad.forgetting import network_service as network_module
from postgrad.forgetting.bake import BakeConfig
from postgrad.forgetting.bake import run as bake
from postgrad.forgetting.base_record import read_kind
from postgrad.forgetting.boxes_service import answers_to_noise, boxes_service, load_boxes_base
from postgrad.forgetting.detector import DetectorConfig, load_detector, save_detector
from postgrad.forgetting.entries import BakeBody, PurgeBody, RevokeBody
from postgrad.forgetting.forget_boxes import ForgetBoxesConfig
from postgrad.forgetting.forget_boxes import run as forget_boxes
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.purge import PurgeConfig
from postgrad.forgetting.purge import run as purge
from postgrad.forgetting.revoke import RevokeConfig
from postgrad.forgetting.revoke import run as revoke
from postgrad.forgetting.shapes import SHAPES, shapes
from postgrad.forgetting.verification import hash_files, verify_service


@pytest.fixture(autouse=True)
def matcher():
    """transformers' matcher solves the assignment with scipy."""
    pytest.importorskip("scipy")


@pytest.fixture
def made(tmp_path):
    return forgotten_boxes(tmp_path)


def settings(made, tmp_path, name="run"):
    runtime = RuntimeConfig(folder=str(tmp_path / name), device="cpu", quiet=True)
    return {"service": str(made.service), "model": ClassifierConfig(path=str(made.model)), "runtime": runtime}


def last(made):
    return Ledger(made.service).entries()[-1].body


def opened(made, path, tmp_path):
    return boxes_service(made.service, load_boxes_base(str(path), job(tmp_path)), str(path)).open()


@pytest.mark.parametrize("kind", ["deformable", "conditional", "detr"])
def test_a_detectors_record_is_known_by_its_layers(kind, tmp_path):
    detector = load_detector(DetectorConfig(kind=kind, width=32, queries=4), SHAPES, job(tmp_path))
    with boxes_service(tmp_path / "service", detector, "drawn").open():
        assert read_kind(tmp_path / "service") == "boxes"


def test_a_request_is_revoked_bit_for_bit_and_measured(made, tmp_path):
    with opened(made, made.model, tmp_path) as service:
        service.show(["request-2"])
        alone = answers_to_noise(service.network)
    config = RevokeConfig(requests=("request-1",), boxes=DATA, **settings(made, tmp_path))
    report = revoke(config)
    body = last(made)
    assert isinstance(body, RevokeBody) and body.bit_exact and body.metrics.keys() == {"ap_r", "ap_back", "ap_o"}
    assert dict(report.results) == {"revoked": 1, "not_bit_exact": 0, "requests_in_use": 1}
    (table,) = (each for each in report.sections if isinstance(each, Table))
    assert table.rows == (("request-1", body.metrics["ap_back"], body.metrics["ap_r"], body.metrics["ap_o"]),)
    with opened(made, made.model, tmp_path) as service:
        assert service.active == ("request-2",) and torch.equal(answers_to_noise(service.network), alone)
        assert service.findings() == []


def test_without_images_a_revocation_measures_nothing(made, tmp_path):
    revoke(RevokeConfig(requests=("request-2", "request-1"), **settings(made, tmp_path)))
    assert last(made).metrics == {} and last(made).bit_exact
    base = load_boxes_base(str(made.model), job(tmp_path))
    bare = answers_to_noise(base.network)
    with opened(made, made.model, tmp_path) as service:
        assert torch.equal(answers_to_noise(service.network), bare)


def test_a_baked_detector_is_transformers_own_and_finds_the_same(made, tmp_path):
    from transformers import AutoModelForObjectDetection

    images = shapes(6, "test")
    before = hash_files(made.model)
    detector = load_boxes_base(str(made.model), job(tmp_path))
    with boxes_service(made.service, detector, "base").open() as service:
        answers, found = answers_to_noise(service.network), detector.find(images)
        base_before = base_hashes(service.network)
    report = bake(BakeConfig(boxes=DATA, **settings(made, tmp_path)))
    new, body = tmp_path / "run/model", last(made)
    assert isinstance(body, BakeBody) and body.requests == ("request-1", "request-2")
    assert report.results["requests_baked"] == 2 and 0 <= report.results["largest_difference"] < 1e-4
    assert {"ap_r", "ap_o"} <= report.results.keys() and hash_files(made.model) == before
    loaded = AutoModelForObjectDetection.from_pretrained(new)
    torch.testing.assert_close(answers_to_noise(loaded), answers, atol=1e-5, rtol=1e-4)
    baked = load_boxes_base(str(new), job(tmp_path))
    assert baked.classes == SHAPES and baked.sides == detector.sides
    for one, other in zip(found, baked.find(images), strict=True):
        torch.testing.assert_close(one.scores, other.scores)
        torch.testing.assert_close(one.corners, other.corners)
    assert verify_service(made.service, tensors=base_hashes(baked.network), classes=baked.classes) == []
    changed = {name for name, value in base_hashes(baked.network).items() if base_before[name] != value}
    ledger = [entry.body for entry in Ledger(made.service).entries()]
    assert changed == {*ledger[1].tensors, *ledger[2].tensors}
    with pytest.raises(ArtefactError, match="belongs to a base of hash"):
        opened(made, made.model, tmp_path)
    with opened(made, new, tmp_path) as service:
        assert service.active == () and service.forgotten == ("request-1", "request-2")
        with pytest.raises(ArtefactError, match="nothing to bake"):
            service.bake(tmp_path / "twice", lambda made: None, lambda: service.network, lambda made: {})


@pytest.mark.parametrize("at", ["save_pretrained", "prepare_record", "enter", "install_record"])
def test_a_killed_bake_ends_as_one_never_killed(made, tmp_path, monkeypatch, at):
    config = BakeConfig(**settings(made, tmp_path))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        place = "transformers.PreTrainedModel.save_pretrained" if at == "save_pretrained" else None
        patch.setattr(place, die) if place else patch.setattr(network_module, at, die)
        bake(config)
    report = bake(config)
    other = forgotten_boxes(tmp_path / "other")
    straight = bake(BakeConfig(**settings(other, tmp_path, "straight")))
    assert dict(report.results) == dict(straight.results)
    assert hash_files(tmp_path / "run/model") == hash_files(tmp_path / "straight/model")
    bakes = [entry for entry in Ledger(made.service).entries() if isinstance(entry.body, BakeBody)]
    baked = load_boxes_base(str(tmp_path / "run/model"), job(tmp_path))
    assert len(bakes) == 1 and verify_service(made.service, tensors=base_hashes(baked.network)) == []


def test_what_was_baked_is_neither_learnt_nor_forgotten_again(made, tmp_path):
    """A later request counts the baked classes as forgotten before: they are not kept, but measured."""
    bake(BakeConfig(**settings(made, tmp_path)))
    asked = tmp_path / "bars.json"
    asked.write_text(json.dumps({"id": "bars", "classes": ["bar"]}))
    usual = ForgetBoxesConfig().erase
    quick = replace(
        usual, blocks=1, early=False, floor=100.0, snap=0.0, least_steps=0, train=replace(usual.train, epochs=1)
    )
    config = ForgetBoxesConfig(
        requests=(str(asked),), preset="own", erase=quick, data=DATA, gold=False, service=str(made.service),
        model=DetectorConfig(path=str(tmp_path / "run/model")), runtime=settings(made, tmp_path, "later")["runtime"],
    )  # fmt: skip
    report = forget_boxes(config)
    body = last(made)
    assert body.metrics["num_earlier"] == 2 and "ap_o" in body.metrics and report.results["requests_in_use"] == 1
    classes = next(each for each in report.sections if each.title == "Classes")
    assert {row[0]: row[1] for row in classes.rows} == {
        "bar": "bars", "ring": "request-1", "square": "request-2", "circle": "kept", "triangle": "kept", "cross": "kept"
    }  # fmt: skip


def test_names_exchanged_in_the_models_config_are_refused(made, tmp_path):
    """No weight tells: the base's hash is the same."""
    detector = load_boxes_base(str(made.model), job(tmp_path))
    names = dict(enumerate(reversed(detector.classes)))
    detector.network.config.id2label = names
    save_detector(detector, made.model)
    with pytest.raises(ArtefactError, match="belongs to a base of the classes circle, square"):
        opened(made, made.model, tmp_path)


def test_the_data_of_a_request_are_purged(made, tmp_path):
    image = tmp_path / "ring.png"
    image.write_bytes(b"an image")
    runtime = settings(made, tmp_path)["runtime"]
    report = purge(
        PurgeConfig(service=str(made.service), request="request-1", files=(str(image),), delete=True, runtime=runtime)
    )
    assert report.results["files_deleted"] == 1 and not image.exists() and isinstance(last(made), PurgeBody)
    assert verify_service(made.service) == []
