"""The base's record through a bake: what is on disk follows the ledger, whatever stops the process."""

from pathlib import Path

import pytest
import torch
from forget_runs import Killed
from forgotten import Made, carry_out, forgotten, images, load, request
from torch import Tensor

from postgrad.core.vision_models import Classifier, classifier_hash
from postgrad.errors import ArtefactError, DataError
from postgrad.forgetting import service as module
from postgrad.forgetting.base_record import read_classes, read_name
from postgrad.forgetting.entries import BakeBody
from postgrad.forgetting.service import Service
from postgrad.forgetting.service_parts import answers
from postgrad.forgetting.verification import hash_files, verify_service


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return forgotten(tmp_path / "given")


@pytest.fixture
def service(made: Made) -> Service:
    return Service.open(made.service, load(made.model), "base")


def die(*_: object) -> None:
    raise Killed


def contents(folder: Path) -> dict[str, str]:
    """Hash what a service consists of; copies of the base's record are no part of it."""
    return {name: value for name, value in hash_files(folder).items() if name != ".lock" and "bases/" not in name}


def logits(classifier: Classifier) -> Tensor:
    return answers(classifier, images()[1])


def sound(made: Made, model: Path) -> bool:
    return verify_service(made.service, tensors=classifier_hash(load(model))) == []


def test_baking_goes_on_from_a_new_base(service: Service, made: Made, tmp_path: Path) -> None:
    untouched, both = service.classifier, logits(service.classifier)
    entry = service.bake(tmp_path / "baked", load, images()[1])
    assert isinstance(entry.body, BakeBody) and entry.body.requests == ("first", "second")
    assert service.active == () and service.forgotten == ("first", "second")
    assert service.classifier is not untouched and torch.equal(logits(untouched), both)
    assert torch.allclose(logits(service.classifier), both, atol=1e-4)
    found = entry.body.metrics
    assert found["same_answers"] == 100 and 0 < found["logit_difference"] < 1e-4 and found["acc_o"] < 10
    assert sound(made, tmp_path / "baked") and not sound(made, made.model)
    again = Service.open(made.service, load(tmp_path / "baked"), "baked")
    with pytest.raises(ArtefactError, match="belongs to a base"):
        Service.open(made.service, load(made.model), "base")
    with pytest.raises(ArtefactError, match="would be made twice"):
        again.show(["first"])
    with pytest.raises(ArtefactError, match="is baked"):
        again.revoke("first", images()[1])
    with pytest.raises(ArtefactError, match="nothing to bake"):
        again.bake(tmp_path / "twice", load)
    with pytest.raises(DataError, match="already"):
        again.material(request("third", "6"), images()[0])
    entry = carry_out(again, request("third", "7"), load(made.model), tmp_path / "run")
    assert again.active == ("third",) and sound(made, tmp_path / "baked")
    assert not {0, 4, 6} & set(again.material(request("fourth", "8"), images()[0]).retain.labels.tolist())
    assert again.split_at(entry).old == (0, 4, 6)


def test_revoked_requests_are_not_baked(service: Service, made: Made, tmp_path: Path) -> None:
    service.revoke("first", images()[1])
    left = logits(service.classifier)
    service.show(["first", "second"])
    entry = service.bake(tmp_path / "baked", load)
    assert isinstance(entry.body, BakeBody) and entry.body.requests == ("second",)
    assert torch.allclose(logits(service.classifier), left, atol=1e-4)
    assert entry.body.metrics.keys() == {"logit_difference", "same_answers"}


@pytest.mark.parametrize("at", ["save_classifier", "prepare_record", "enter", "install_record"])
def test_a_process_killed_while_baking_leaves_before_or_after(
    service: Service, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    old = contents(made.service)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, at, die)
        service.bake(tmp_path / "baked", load)
    if at == "install_record":
        assert {finding.place for finding in verify_service(made.service)} == {"base.json"}
        again = Service.open(made.service, load(tmp_path / "baked"), "baked")
        assert again.active == ()
    else:
        again = Service.open(made.service, load(made.model), "base")
        assert contents(made.service) == old
        again.bake(tmp_path / "baked", load)
    assert sound(made, tmp_path / "baked")
    names = {path.stem for path in (made.service / "bases").iterdir()}
    bodies = [vars(entry.body) for entry in again.ledger.entries()]
    assert names == {body["record_hash"] for body in bodies if "record_hash" in body}


def test_an_altered_record_of_the_base_is_not_mended(service: Service, made: Made, tmp_path: Path) -> None:
    service.bake(tmp_path / "baked", load)
    record = made.service / "base.json"
    good = record.read_bytes()
    record.unlink()
    Service.open(made.service, load(tmp_path / "baked"), "baked")
    assert record.read_bytes() == good
    record.write_bytes(good.replace(b"baked", b"other"))
    with pytest.raises(ArtefactError, match=r"base\.json: expected SHA-256 .* Restore it"):
        Service.open(made.service, load(tmp_path / "baked"), "baked")


def test_a_record_is_read_or_missed_by_name(made: Made, tmp_path: Path) -> None:
    assert read_classes(made.service) == tuple("0123456789") and read_name(made.service) == "base"
    assert read_name(tmp_path) == ""
    with pytest.raises(ArtefactError, match="which cannot be read"):
        read_classes(tmp_path)
    (made.service / "base.json").write_text("[]")
    with pytest.raises(ArtefactError, match="which cannot be read"):
        read_classes(made.service)
