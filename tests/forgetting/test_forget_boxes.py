"""Forgetting objects by the command: requests in, adapters, ledger, certificates and report out; revoked."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from cases import case
from cocos import write_coco

from postgrad.core.config import RuntimeConfig
from postgrad.core.layer_adapters import base_hashes
from postgrad.core.runtime import Job
from postgrad.errors import ArtefactError, ConfigError, DataError
from postgrad.forgetting.box_files import BoxesConfig
from postgrad.forgetting.boxes_bench import left
from postgrad.forgetting.boxes_leakage import BoxAuditConfig
from postgrad.forgetting.boxes_service import answers_to_noise, boxes_service
from postgrad.forgetting.detector import DetectorConfig, load_detector
from postgrad.forgetting.entries import ApplyBody, BaseBody, RevokeBody, digest
from postgrad.forgetting.forget_boxes import ForgetBoxesConfig, check, made_requests, plan, run, splits_of
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.request import ForgetRequest
from postgrad.forgetting.shapes import SHAPES, shapes
from postgrad.forgetting.verification import verify_service


@pytest.fixture(autouse=True)
def matcher():
    """transformers' matcher solves the assignment with scipy."""
    pytest.importorskip("scipy")


def job(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return Job("forget_boxes", folder, 3, torch.device("cpu"), torch.float32, 0, 1, True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Run the tiny case once, without its revocation."""
    pytest.importorskip("scipy")
    folder = tmp_path_factory.mktemp("forget_boxes")
    config = case("forget_boxes", folder)
    config = replace(config, revoke=(), runtime=replace(config.runtime, folder=str(folder / "run")))
    return config, run(config)


def later(made, folder, **changes):
    """Describe a run on a copy of the service of the first one."""
    config, report = made
    service = folder / "service"
    shutil.copytree(report.folder / "service", service)
    model, runtime = report.folder / "base" / "model", replace(config.runtime, folder=str(folder / "later"))
    return replace(
        config, model=DetectorConfig(path=str(model)), gold=False, service=str(service), runtime=runtime, **changes
    )


def bodies(report):
    return [entry.body for entry in Ledger(report.folder / "service").entries()]


def test_each_request_is_entered_certified_and_an_adapter_of_its_own(made):
    _, report = made
    service = report.folder / "service"
    base, first, second = bodies(report)
    assert isinstance(base, BaseBody) and isinstance(first, ApplyBody) and isinstance(second, ApplyBody)
    assert first.base_hash == second.base_hash == base.base_hash
    for body, old in ((first, False), (second, True)):
        assert {"ap_r", "ap_f", "ap_r_pretrained", "ap_f_pretrained", "h", "steps"} <= body.metrics.keys()
        assert {"ap_f_gold", "ap_r_gold", "ap_f_excess"} <= body.metrics.keys()
        for attack in ("knn", "probe", "knn_alone", "probe_alone"):
            names = {f"{attack}_{each}" for each in ("found", "pretrained", "gold", "excess", "excess_low")}
            assert names <= body.metrics.keys()
            gap = body.metrics[f"{attack}_found"] - body.metrics[f"{attack}_gold"]
            assert body.metrics[f"{attack}_excess"] == pytest.approx(gap)
        assert ("ap_o" in body.metrics) == old and body.num_blocks == 4 and len(body.blocks) == 1
        folder = service / "adapters" / body.request
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
        assert (service / "certificates" / f"{body.request}.json").is_file()
        assert not any(name in (service / "ledger.jsonl").read_text() for name in SHAPES)
    assert verify_service(service) == []
    assert report.results["requests_in_use"] == 2
    assert {"h_worst", "ap_f_worst", "ap_r", "ap_f_excess_worst", "knn_excess_worst"} <= report.results.keys()
    titles = {section.title for section in report.sections}
    assert titles >= {"Requests", "AP over the requests", "Classes", "What is still found of forgotten objects"}


def test_gold_takes_the_bases_steps_without_images_of_what_was_forgotten(made):
    folders = (made[1].folder / name / "checkpoints" for name in ("base", "gold-1", "gold-2"))
    base, *gold = (sorted(each.name for each in folder.iterdir()) for folder in folders)
    assert gold == [base, base]
    train = shapes(24, "train")
    for split in splits_of(made_requests(0), train, ()):
        kept = left(train, split)
        assert not {*split.forget, *split.old} & kept.counts.keys() and 0 < len(kept) < len(train)


def test_the_saved_base_is_the_one_on_record(made, tmp_path):
    _, report = made
    detector = load_detector(DetectorConfig(path=str(report.folder / "base" / "model")), (), job(tmp_path))
    assert digest(dict(sorted(base_hashes(detector.network).items()))) == bodies(report)[0].base_hash


def test_a_revocation_is_bit_exact_and_a_later_run_does_it(made, tmp_path):
    detector = load_detector(DetectorConfig(path=str(made[1].folder / "base" / "model")), (), job(tmp_path))
    untouched = answers_to_noise(detector.network)
    report = run(later(made, tmp_path, revoke=("request-1",)))
    copied = tmp_path / "service"
    entry = Ledger(copied).entries()[-1].body
    assert isinstance(entry, RevokeBody) and entry.bit_exact and {"ap_r", "ap_back", "ap_o"} <= entry.metrics.keys()
    assert report.results["requests_in_use"] == 1
    with boxes_service(copied, detector, "base").open() as service:
        assert service.active == ("request-2",) and not torch.equal(answers_to_noise(detector.network), untouched)
        with pytest.raises(ArtefactError, match="is revoked, not in use"):
            service.revoke("request-1", dict)
        service.show(())
        assert torch.equal(answers_to_noise(detector.network), untouched)


def test_a_later_request_on_the_same_service(made, tmp_path):
    copied, asked = tmp_path / "service", tmp_path / "bars.json"
    asked.write_text(json.dumps({"id": "bars", "classes": ["bar"]}))
    config = later(made, tmp_path, requests=(str(asked),))
    report = run(config)
    body = Ledger(copied).entries()[-1].body
    assert body.request == "bars" and body.metrics["num_earlier"] == 2 and report.results["requests_in_use"] == 3
    asked.write_text(json.dumps({"id": "rings", "classes": ["ring"]}))
    with pytest.raises(DataError, match=r"\['ring'\] was forgotten before"):
        run(replace(config, runtime=replace(config.runtime, folder=str(tmp_path / "again"))))
    asked.write_text(json.dumps({"id": "bars", "classes": ["cross"]}))
    with pytest.raises(ArtefactError, match="was applied with other content"):
        run(replace(config, runtime=replace(config.runtime, folder=str(tmp_path / "other"))))


def test_a_service_is_measured_anew_and_alterations_are_found(made, tmp_path):
    config = later(made, tmp_path)
    assert run(config).results["errors"] == 0
    place, kept = tmp_path / "service", made[1].folder / "service"
    with (place / "adapters" / "request-1" / "request.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ArtefactError, match="the SHA-256 in the ledger"):
        run(replace(config, runtime=replace(config.runtime, folder=str(tmp_path / "again"))))
    shutil.copy(kept / "adapters" / "request-1" / "request.json", place / "adapters" / "request-1" / "request.json")
    base = load_detector(config.model, (), job(tmp_path))
    with boxes_service(place, base, "base").open() as service:
        split = service.split_at(service.ledger.entries()[2])
        assert (split.forget, split.old, split.remain) == ((1,), (4,), (0, 2, 3, 5))


def test_another_base_is_refused(made, tmp_path):
    config = later(made, tmp_path, revoke=("request-1",))
    other = replace(config, model=made[0].model, runtime=replace(config.runtime, seed=4))
    with pytest.raises(ArtefactError, match="belongs to a base of hash"):
        run(other)


def test_images_of_ones_own(tmp_path):
    data = BoxesConfig(path=str(tmp_path), annotations=str(write_coco(tmp_path, twice)), test_share=0.5)
    asked = tmp_path / "request.json"
    asked.write_text(json.dumps({"id": "dogs", "classes": ["dog"]}))
    config = replace(
        case("forget_boxes", tmp_path), data=data, requests=(str(asked),), revoke=(), shots=1, gold=False,
        runtime=RuntimeConfig(folder=str(tmp_path / "run"), device="cpu", quiet=True),
    )  # fmt: skip
    assert plan(config)["request dogs"] == "dog"
    assert run(config).results["requests_in_use"] == 1
    again = replace(config, gold=True, runtime=replace(config.runtime, folder=str(tmp_path / "gold")))
    with pytest.raises(DataError, match=r"gold: every training image shows something of \['dog'\]"):
        run(again)
    assert not (tmp_path / "gold/base").exists(), "refused before anything is trained"


def twice(table):
    """Give each image both classes, so that every part has some."""
    table["annotations"] = [
        {"id": 10 * image + label, "image_id": 10 + image, "category_id": label, "bbox": [2, 1, 4 + label, 5]}
        for image in range(3)
        for label in (3, 7)
    ]


def test_what_a_request_may_not_ask_for():
    boxes = shapes(20, "train")

    def refused(said, *names, before=()):
        with pytest.raises(DataError, match=said):
            splits_of([ForgetRequest(id="one", classes=names)], boxes, before)

    refused("the detector has no class 'rings'. Nearest is 'ring'", "rings")
    refused("was forgotten before", "ring", before=(4,))
    refused("no box of another class is left to retain", *SHAPES)
    few = boxes.showing([0, 1])
    with pytest.raises(DataError, match="no training image shows a box of 'ring'"):
        splits_of([ForgetRequest(id="one", classes=("ring",))], few, ())
    split = splits_of([ForgetRequest(id="one", classes=("ring",))], boxes, (1,))[0]
    assert (split.remain, split.forget, split.old) == ((0, 2, 3, 5), (4,), (1,))


def test_settings_that_contradict_each_other(tmp_path):
    asked = tmp_path / "request.json"
    asked.write_text(json.dumps({"id": "one", "samples": ["0123456789abcdef"]}))
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"id": "one", "classes": ["ring"]}))
    usual = ForgetBoxesConfig()
    check(replace(usual, requests=(str(classes),), model=DetectorConfig(path="mine"), gold=False))
    for wrong, said in (
        (replace(usual, erase=replace(usual.erase, rank=4)), "preset"),
        (replace(usual, requests=(str(asked),)), "single images"),
        (replace(usual, data=BoxesConfig(path="somewhere")), "requests"),
        (replace(usual, revoke=("nobody",)), "revoke"),
        (replace(usual, model=DetectorConfig(width=48)), "multiple of 32"),
        (replace(usual, model=DetectorConfig(layers=1)), "at least 2 layers"),
        (replace(usual, shots=-1), "shots"),
        (replace(usual, audit=BoxAuditConfig(neighbours=0)), "audit"),
        (replace(usual, requests=(str(classes),), model=DetectorConfig(path="mine")), "gold: .* Set gold to false"),
    ):
        with pytest.raises(ConfigError, match=said):
            check(wrong)
