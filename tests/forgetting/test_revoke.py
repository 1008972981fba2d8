"""Revocation from the command line: each request once, whatever stops the run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forgotten import DATA, Made, forgotten, images, load

from postgrad.__main__ import main
from postgrad.core.config import RuntimeConfig, dump_config
from postgrad.core.report import Table
from postgrad.core.vision_models import ClassifierConfig, classifier_hash
from postgrad.errors import ArtefactError, ConfigError, GateError
from postgrad.forgetting import service as service_module
from postgrad.forgetting.entries import RevokeBody
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.revoke import RevokeConfig, check, plan, run
from postgrad.forgetting.service import Service
from postgrad.forgetting.service_parts import answers
from postgrad.forgetting.verification import hash_files, verify_service


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return forgotten(tmp_path)


@pytest.fixture
def config(made: Made, tmp_path: Path) -> RevokeConfig:
    return RevokeConfig(
        service=str(made.service),
        requests=("first", "second"),
        model=ClassifierConfig(path=str(made.model)),
        data=DATA,
        runtime=RuntimeConfig(folder=str(tmp_path / "run"), device="cpu", quiet=True),
    )


def revoked(folder: Path) -> list[str]:
    return [entry.body.request for entry in Ledger(folder).entries() if isinstance(entry.body, RevokeBody)]


def test_requests_are_revoked_and_measured(config: RevokeConfig, made: Made) -> None:
    report = run(replace(config, requests=("first",)))
    assert dict(report.results) == {"revoked": 1, "not_bit_exact": 0, "requests_in_use": 1}
    (table,) = (each for each in report.sections if isinstance(each, Table))
    ((name, back, _, old),) = table.rows
    assert name == "first" and isinstance(back, float) and isinstance(old, float) and back > 50 > old
    assert verify_service(made.service, tensors=classifier_hash(load(made.model))) == []
    with Service.open(made.service, load(made.model), "base") as service:
        assert service.active == ("second",)


def test_with_all_requests_revoked_the_model_is_the_base(config: RevokeConfig, made: Made) -> None:
    assert run(config).results["requests_in_use"] == 0
    with Service.open(made.service, load(made.model), "base") as service:
        test = images()[1]
        assert torch.equal(answers(service.classifier, test), answers(load(made.model), test))


@pytest.mark.parametrize("entered", [0, 1, 2])
def test_a_killed_run_revokes_each_request_once(
    config: RevokeConfig, made: Made, monkeypatch: pytest.MonkeyPatch, entered: int
) -> None:
    enter, left = service_module.enter, [entered]

    def die(ledger: Ledger, body: RevokeBody) -> object:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        entry = enter(ledger, body)
        if left[0] == 0:
            raise KeyboardInterrupt
        return entry

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(service_module, "enter", die)
        run(config)
    assert len(revoked(made.service)) == entered
    report = run(config)
    assert revoked(made.service) == ["first", "second"] and report.results["revoked"] == 2
    assert run(config).results == report.results


def test_requests_that_are_not_in_use_are_refused_before_any_is_revoked(config: RevokeConfig, made: Made) -> None:
    with pytest.raises(ArtefactError, match=r"'frist' is unknown\. None was revoked"):
        run(replace(config, requests=("second", "frist")))
    with Service.open(made.service, load(made.model), "base") as service:
        service.revoke("first", images()[1])
    with pytest.raises(ArtefactError, match=r"expected some of those in use, \['second'\]; 'first' is revoked"):
        run(replace(config, runtime=replace(config.runtime, folder=config.runtime.folder + "2")))
    with pytest.raises(ArtefactError, match="'first' is revoked"):
        plan(config)
    assert revoked(made.service) == ["first"]


def test_a_rehearsal_leaves_the_service_alone(config: RevokeConfig, made: Made) -> None:
    before = {name: value for name, value in hash_files(made.service).items() if name != ".lock"}
    report = run(replace(config, rehearse=True))
    assert report.results["revoked"] == 2 and any(each.title == "A rehearsal" for each in report.sections)
    assert {name: value for name, value in hash_files(made.service).items() if name != ".lock"} == before
    copied = Path(config.runtime.folder) / "service"
    assert revoked(copied) == ["first", "second"] and verify_service(copied) == []


def test_a_trace_makes_the_command_fail(
    config: RevokeConfig, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = iter(range(100))
    exact = service_module.answers
    monkeypatch.setattr(service_module, "answers", lambda *given: exact(*given) + 1e-7 * next(drawn))
    (tmp_path / "revoke.toml").write_text(dump_config(config))
    assert main(["revoke", str(tmp_path / "revoke.toml")]) == 2
    assert (tmp_path / "run/report.html").is_file() and revoked(made.service) == ["first", "second"]
    with pytest.raises(GateError, match="2 revocations left other outputs"):
        run(config)


def test_a_run_on_another_service_is_not_gone_on_with(config: RevokeConfig, made: Made, tmp_path: Path) -> None:
    run(replace(config, requests=("first",)))
    (tmp_path / "run/result.json").unlink()
    shorter = Ledger(tmp_path / "shorter")
    shorter.append(Ledger(made.service).entries()[0].body)
    for name in ("ledger.jsonl", "ledger.head"):
        (tmp_path / "shorter" / name).replace(made.service / name)
    with pytest.raises(ArtefactError, match="expected 3 entries or more, as when this run began, found 1"):
        run(replace(config, requests=("first",)))


def test_settings_that_cannot_be_meant_are_refused(config: RevokeConfig) -> None:
    for requests in ((), ("first", "first")):
        with pytest.raises(ConfigError, match="requests: expected one id or more"):
            check(replace(config, requests=requests))
    assert plan(config) == {"requests to revoke": 2, "left in use": 0}
