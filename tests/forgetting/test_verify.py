"""Verification from the command line: a sound service passes and stays as it is, whatever was altered is reported."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forgotten import CONFIGS, DATA, Made, forgotten, images, job, load, measured, request

from postgrad.__main__ import main
from postgrad.core.config import RuntimeConfig, dump_config
from postgrad.core.report import Note, Report, Table
from postgrad.core.runtime import progress
from postgrad.core.vision import ImagesConfig
from postgrad.core.vision_models import ClassifierConfig, save_classifier
from postgrad.errors import ArtefactError, ConfigError, DataError, GateError, ModelError, UserError
from postgrad.forgetting import verify as module
from postgrad.forgetting.anew_classes import COMPARED
from postgrad.forgetting.entries import VerifyBody
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.service import Service
from postgrad.forgetting.service_lock import LOCK
from postgrad.forgetting.signature import make_key, sign_file
from postgrad.forgetting.verification import hash_files
from postgrad.forgetting.verify import VerifyConfig, check, plan, run


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return forgotten(tmp_path)


@pytest.fixture
def config(made: Made, tmp_path: Path) -> VerifyConfig:
    return VerifyConfig(
        service=str(made.service),
        model=ClassifierConfig(path=str(made.model)),
        data=DATA,
        runtime=RuntimeConfig(folder=str(tmp_path / "run"), device="cpu", quiet=True),
    )


def refused(config: VerifyConfig) -> Report:
    """Run a verification that fails, and give the report that was written before."""
    with pytest.raises(GateError, match=r"findings, listed in .*report\.html"):
        run(config)
    result = json.loads((Path(config.runtime.folder) / "result.json").read_text())["results"]
    assert result["errors"] > 0
    found = json.loads((Path(config.runtime.folder) / "sections.json").read_text())
    notes = tuple(Note(each["title"], each["text"]) for each in found if each["type"] == "Note")
    tables = tuple(Table(each["title"], (), tuple(map(tuple, each["rows"]))) for each in found if "rows" in each)
    return Report("verify", Path(config.runtime.folder), result, (*notes, *tables))


def wrong(report: Report) -> set[tuple[str, str]]:
    """List where and what is wrong."""
    tables = [each for each in report.sections if isinstance(each, Table) and each.title == "What is not as recorded"]
    return {(str(row[1]), str(row[2])) for table in tables for row in table.rows}


def contents(folder: Path) -> dict[str, str]:
    return {name: value for name, value in hash_files(folder).items() if name != LOCK}


def test_a_sound_service_passes_and_stays_as_it_is(config: VerifyConfig, made: Made) -> None:
    before = contents(made.service)
    report = run(config)
    found = report.results
    assert (found["errors"], found["warnings"], found["requests"], found["requests_measured"]) == (0, 0, 2, 2)
    assert found["largest_difference"] == 0 and contents(made.service) == before
    standing, table = (each for each in report.sections if isinstance(each, Table))
    assert [row[0] for row in standing.rows] == ["first", "second"] and standing.title == "Requests of the service"
    assert {row[1] for row in table.rows} == set(COMPARED) - {"acc_h", "acc_h_pretrained"}
    assert "mia_auc" not in str(report.sections)


def test_without_images_adapters_are_loaded_and_nothing_is_measured(config: VerifyConfig) -> None:
    report = run(replace(config, data=ImagesConfig(path="")))
    assert report.results["requests_measured"] == 0 and report.results["figures_not_measured"] == 7
    assert any(each.title == "Not measured anew" for each in report.sections)


def test_revoked_requests_are_measured_as_they_were(config: VerifyConfig, made: Made) -> None:
    with Service.open(made.service, load(made.model), "base") as service:
        service.revoke("first", images()[1])
    assert run(config).results["requests_measured"] == 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "file", ["adapters/first/adapter_model.safetensors", "certificates/second.html", "ledger.jsonl", "base.json"]
)
def test_what_is_altered_is_reported(config: VerifyConfig, made: Made, file: str) -> None:
    flip(made.service / file)
    report = refused(config)
    assert any(place.split(",")[0] in file for place, _ in wrong(report))
    assert report.results["requests_measured"] == 0
    assert any(each.title == "No figure was measured anew" for each in report.sections)


def test_what_is_missing_is_reported_and_not_mended(config: VerifyConfig, made: Made) -> None:
    (made.service / "certificates/first.html").unlink()
    shutil.copytree(made.service / "adapters/first", made.service / "adapters/third")
    assert wrong(refused(config)) == {("certificates/first.html", "file"), ("adapters/third", "entry")}
    assert not (made.service / "certificates/first.html").exists() and (made.service / "adapters/third").is_dir()


def test_another_base_is_reported(config: VerifyConfig, made: Made) -> None:
    other = load(made.model)
    with torch.no_grad():
        other.head().bias.add_(1e-6)
    save_classifier(other, made.model)
    assert {place for place, _ in wrong(refused(config))} == {"base model"}


def test_a_forged_figure_is_found_by_measuring(config: VerifyConfig, made: Made, tmp_path: Path) -> None:
    with Service.open(made.service, load(made.model), "base") as service:
        asked = request("third", "7")

        def forged() -> dict[str, float]:
            return {**measured(service, asked, load(made.model)), "acc_r": 99.0}

        material = service.material(asked, images()[0])
        service.apply(asked, material, CONFIGS, job(tmp_path / "apply"), forged)
    report = refused(config)
    assert wrong(report) == {("ledger.jsonl, entry 3 (apply)", "body.metrics.acc_r")}
    assert float(report.results["largest_difference"]) > 10
    lenient = replace(config, tolerance=100.0, runtime=replace(config.runtime, folder=str(tmp_path / "lenient")))
    assert run(lenient).results["errors"] == 0
    blind = replace(lenient, data=ImagesConfig(path=""), runtime=replace(config.runtime, folder=str(tmp_path / "no")))
    assert run(blind).results["errors"] == 0


def test_an_adapter_that_cannot_be_loaded_is_reported(config: VerifyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    show = Service.show

    def fail(self: Service, requests: tuple[str, ...]) -> None:
        if "second" in requests:
            raise ModelError("no such layer")
        show(self, requests)

    monkeypatch.setattr(Service, "show", fail)
    report = refused(config)
    assert wrong(report) == {("adapters/second", "adapter")} and report.results["requests_measured"] == 1


def test_after_a_bake_the_new_base_is_verified(config: VerifyConfig, made: Made, tmp_path: Path) -> None:
    with Service.open(made.service, load(made.model), "base") as service:
        service.bake(tmp_path / "baked", load)
    assert {place for place, _ in wrong(refused(config))} == {"base model"}
    report = run(replace(config, model=ClassifierConfig(path=str(tmp_path / "baked")), runtime=RuntimeConfig(
        folder=str(tmp_path / "again"), device="cpu", quiet=True)))  # fmt: skip
    assert report.results["errors"] == 0 and report.results["requests_measured"] == 0


def test_signatures_and_noted_hashes(config: VerifyConfig, made: Made, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    public = make_key(tmp_path / "key.pem")
    noted = Ledger(made.service).entries()[-1].hash
    config = replace(config, public_key=str(public), known=(noted, "0" * 64))
    files = ("ledger.head", "certificates/first.json", "certificates/second.json")
    assert wrong(refused(config)) == {*((file, "signature") for file in files), ("ledger.jsonl", "entries")}
    for file in files:
        sign_file(made.service / file, str(tmp_path / "key.pem"))
    config = replace(config, known=(noted,), runtime=replace(config.runtime, folder=str(tmp_path / "signed")))
    assert run(config).results["errors"] == 0


def test_the_outcome_is_recorded_once(config: VerifyConfig, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, record=True)
    assert plan(config)["entries to add to the ledger"] == 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "finish", interrupt)
        run(config)
    assert bodies(made) == [(2, 0)]
    run(config)
    run(config)
    (made.service / "certificates/first.html").unlink()
    refused(config)
    assert bodies(made) == [(2, 0), (2, 1)]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def bodies(made: Made) -> list[tuple[int, int]]:
    found = [entry.body for entry in Ledger(made.service).entries()]
    return [(body.num_requests, body.num_findings) for body in found if isinstance(body, VerifyBody)]


def test_an_unsound_ledger_is_not_written_to(config: VerifyConfig, made: Made) -> None:
    flip(made.service / "ledger.jsonl")
    before = contents(made.service)
    refused(replace(config, record=True))
    assert contents(made.service) == before


def test_a_finished_verification_begins_anew_when_something_changed(config: VerifyConfig, made: Made) -> None:
    assert run(config).results["errors"] == 0
    page = made.service / "certificates/first.html"
    good = page.read_bytes()
    flip(page)
    refused(config)
    with pytest.raises(GateError):
        run(config)
    page.write_bytes(good)
    assert run(config).results["errors"] == 0


def test_where_nobody_can_write_nothing_is_held(
    config: VerifyConfig, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made.service / LOCK).unlink(missing_ok=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != made.service and access(path, mode))
    assert run(config).results["errors"] == 0 and not (made.service / LOCK).exists()


def test_a_stop_changes_nothing(config: VerifyConfig, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(made.service)
    monkeypatch.setattr(progress, "advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(replace(config, record=True))
    assert contents(made.service) == before


def test_the_command_fails_when_anything_is_wrong(
    config: VerifyConfig, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "verify.toml").write_text(dump_config(config))
    assert main(["verify", str(tmp_path / "verify.toml")]) == 0
    flip(made.service / "adapters/second/request.json")
    assert main(["verify", str(tmp_path / "verify.toml")]) == 2
    assert "do not rely on the service" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: replace(c, service="nowhere"), ConfigError, "expected a service folder with ledger.jsonl"),
        (lambda c: replace(c, model=ClassifierConfig()), ConfigError, "'tiny', which is drawn anew"),
        (lambda c: replace(c, tolerance=-1.0), ConfigError, "tolerance: expected 0 points or more"),
        (lambda c: replace(c, known=("ab",)), ConfigError, "known: expected hashes"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    config: VerifyConfig, change: Callable[[VerifyConfig], VerifyConfig], error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message):
        check(change(config))


def test_other_images_are_refused(config: VerifyConfig, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), 30 * number).save(tmp_path / "pets" / name / f"{number}.png")
    with pytest.raises(DataError, match="of the service's classes, 0, 1, 2, 3, 4 and 5 more; found 2 of cat, dog"):
        run(replace(config, data=ImagesConfig(path=str(tmp_path / "pets"))))


def test_a_service_in_use_is_waited_for(config: VerifyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(folder: Path) -> None:
        raise ArtefactError(f"{folder} is in use by process 7")

    monkeypatch.setattr(module, "hold", held)
    with pytest.raises(ArtefactError, match="in use by process 7"):
        run(config)
