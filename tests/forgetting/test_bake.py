"""Baking from the command line: a new base once, whatever stops the run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forgotten import DATA, Made, carry_out, forgotten, images, load, request

from postgrad.core.config import RuntimeConfig
from postgrad.core.vision import ImagesConfig
from postgrad.core.vision_models import ClassifierConfig, classifier_hash
from postgrad.errors import ArtefactError
from postgrad.forgetting import service as service_module
from postgrad.forgetting.bake import BakeConfig, plan, run
from postgrad.forgetting.entries import BakeBody
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.service import Service
from postgrad.forgetting.service_parts import answers
from postgrad.forgetting.verification import hash_files, verify_service


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return forgotten(tmp_path)


@pytest.fixture
def config(made: Made, tmp_path: Path) -> BakeConfig:
    return BakeConfig(
        service=str(made.service),
        model=ClassifierConfig(path=str(made.model)),
        data=DATA,
        runtime=RuntimeConfig(folder=str(tmp_path / "run"), device="cpu", quiet=True),
    )


def bakes(folder: Path) -> int:
    return sum(isinstance(entry.body, BakeBody) for entry in Ledger(folder).entries())


def test_the_service_goes_on_from_the_new_base(config: BakeConfig, made: Made, tmp_path: Path) -> None:
    with Service.open(made.service, load(made.model), "base") as service:
        before = answers(service.classifier, images()[1])
    report = run(config)
    assert report.results["requests_baked"] == 2 and report.results["same_answers"] == 100
    assert float(report.results["acc_o"]) < 10 < float(report.results["acc_r"])
    new = tmp_path / "run/model"
    assert verify_service(made.service, tensors=classifier_hash(load(new))) == []
    assert torch.allclose(answers(load(new), images()[1]), before, atol=1e-4)
    with Service.open(made.service, load(new), str(new)) as service:
        carry_out(service, request("third", "7"), load(made.model), tmp_path / "apply")
        assert service.active == ("third",)
    second = replace(
        config,
        model=ClassifierConfig(path=str(new)),
        data=ImagesConfig(path=""),
        runtime=replace(config.runtime, folder=str(tmp_path / "second")),
    )
    assert run(second).results["requests_baked"] == 1 and bakes(made.service) == 2
    with pytest.raises(ArtefactError, match="nothing to bake"):
        plan(second)


@pytest.mark.parametrize("at", ["save_classifier", "prepare_record", "enter", "install_record"])
def test_a_killed_run_ends_as_one_never_killed(
    config: BakeConfig, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(service_module, at, die)
        run(config)
    report = run(config)
    assert bakes(made.service) == 1
    assert verify_service(made.service, tensors=classifier_hash(load(tmp_path / "run/model"))) == []
    other = forgotten(tmp_path / "other")
    straight = run(
        replace(
            config,
            service=str(other.service),
            model=ClassifierConfig(path=str(other.model)),
            runtime=replace(config.runtime, folder=str(tmp_path / "straight")),
        )
    )
    assert dict(report.results) == dict(straight.results)
    assert hash_files(tmp_path / "run/model") == hash_files(tmp_path / "straight/model")


def test_a_rehearsal_leaves_service_and_base_alone(config: BakeConfig, made: Made, tmp_path: Path) -> None:
    before = {name: value for name, value in hash_files(tmp_path).items() if not name.endswith(".lock")}
    report = run(replace(config, rehearse=True))
    assert any(each.title == "A rehearsal" for each in report.sections)
    after = hash_files(tmp_path)
    assert {name: after[name] for name in before} == before and bakes(made.service) == 0
    assert verify_service(tmp_path / "run/service", tensors=classifier_hash(load(tmp_path / "run/model"))) == []


def test_with_nothing_in_use_there_is_nothing_to_bake(config: BakeConfig, made: Made, tmp_path: Path) -> None:
    assert plan(config) == {"requests to bake": 2, "requests in all": 2}
    with Service.open(made.service, load(made.model), "base") as service:
        for name in ("first", "second"):
            service.revoke(name, images()[1])
    for call in (plan, run):
        with pytest.raises(ArtefactError, match="nothing to bake"):
            call(config)
    Service.open(tmp_path / "new", load(made.model), "base").close()
    with pytest.raises(ArtefactError, match="nothing to bake"):
        run(replace(config, service=str(tmp_path / "new"), runtime=replace(config.runtime, folder=str(tmp_path / "n"))))
