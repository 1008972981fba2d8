"""Verification of a language model's requests: figures anew from the rows, forged ones found, other rows passed by."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from texts import job, unlearning, write

from postgrad.core.config import DataConfig, RuntimeConfig
from postgrad.core.vision_models import ClassifierConfig
from postgrad.errors import ConfigError, DataError, GateError
from postgrad.forgetting.anew_texts import RowsConfig
from postgrad.forgetting.entries import ApplyBody
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.text_service import load_text_base, text_service
from postgrad.forgetting.unlearn import run as unlearn
from postgrad.forgetting.verification import verify_service
from postgrad.forgetting.verify import VerifyConfig, check, plan, run

COMPARED = {
    "acc_f", "acc_r", "mia_auc", "forget_loss", "retain_loss", "forget_probability", "retain_probability",
    "forget_truth_ratio", "model_utility", "model_utility_before", "num_target_tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unlearn some facts, then others on top of them."""
    folder = tmp_path_factory.mktemp("unlearn")
    config = unlearning(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("postgrad.core.runtime.write_report", lambda report, title: None)
        unlearn(config)
        facts = [json.loads(line) for line in Path(config.retain).read_text().splitlines()]
        split(folder, "second", facts[:4])
        split(folder, "rest", facts[4:])
        unlearn(replace(
            config, forget=str(folder / "second.jsonl"), retain=str(folder / "rest.jsonl"), request="request-2",
            model=replace(config.model, path=str(folder / "run/base/model")), service=str(folder / "run/service"),
            runtime=replace(config.runtime, folder=str(folder / "again")),
        ))  # fmt: skip
    return folder


def split(folder: Path, name: str, rows: list[object]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def made(done: Path, tmp_path: Path) -> Path:
    shutil.copytree(done / "run/service", tmp_path / "service")
    shutil.copytree(done / "run/base/model", tmp_path / "model")
    return tmp_path


def asking(done: Path, made: Path, name: str = "verify", **rows: object) -> VerifyConfig:
    facts = done / "facts"
    given = {"forget": facts / "forget.jsonl", "retain": facts / "retain.jsonl", "held_out": facts / "held_out.jsonl"}
    config = RowsConfig(**{**{key: str(path) for key, path in given.items()}, **rows})
    return VerifyConfig(
        service=str(made / "service"), model=ClassifierConfig(path=str(made / "model")), rows=config,
        runtime=RuntimeConfig(folder=str(made / name), device="cpu", quiet=True),
    )  # fmt: skip


def measured(config: VerifyConfig) -> dict[str, set[str]]:
    report = run(config)
    assert report.results["errors"] == 0
    rows = [row for each in report.sections if each.title == "Figures measured anew" for row in each.rows]
    return {str(row[0]): {str(other[1]) for other in rows if other[0] == row[0]} for row in rows}


def test_each_request_is_measured_anew_from_its_own_rows(done: Path, made: Path) -> None:
    first = asking(done, made)
    assert plan(first)["requests to measure anew"] == 2
    found = measured(first)
    assert found.keys() == {"request-1"} and found["request-1"] >= COMPARED
    second = asking(done, made, "second", forget=str(done / "second.jsonl"), retain=str(done / "rest.jsonl"))
    found = measured(second)
    assert found.keys() == {"request-2"} and found["request-2"] >= COMPARED


def test_without_rows_adapters_are_loaded_and_nothing_is_measured(done: Path, made: Path) -> None:
    config = replace(asking(done, made), rows=RowsConfig())
    report = run(config)
    assert report.results["errors"] == report.results["requests_measured"] == 0
    assert report.results["figures_not_measured"] == 8 and plan(config)["requests to measure anew"] == 0


def test_rows_of_no_request_measure_nothing_and_missing_ones_are_refused(done: Path, made: Path) -> None:
    other = write(made / "other.jsonl", 4)
    assert measured(asking(done, made, forget=other)) == {}
    with pytest.raises(DataError):
        run(asking(done, made, "missing", forget=str(made / "nowhere.jsonl")))


def test_settings_that_contradict_each_other_are_refused(done: Path, made: Path) -> None:
    for rows in (RowsConfig(forget="a"), RowsConfig(forget="a", retain="b", data=DataConfig(path="c"))):
        with pytest.raises(ConfigError, match="expected forget and retain, or data"):
            check(replace(asking(done, made), rows=rows))


@pytest.mark.parametrize(("name", "by"), [("acc_r", 5.0), ("retain_loss", 0.05), ("mia_auc", 0.05)])
def test_a_forged_figure_is_found_by_measuring(done: Path, made: Path, name: str, by: float) -> None:
    """The whole service rewritten around another figure agrees with itself; the model does not agree with it."""
    service = made / "service"
    entries = Ledger(service).entries()
    assert isinstance(entries[1].body, ApplyBody)
    metrics = entries[1].body.metrics
    forged = replace(entries[1].body, metrics={**metrics, name: metrics[name] - by})
    for file in ("ledger.jsonl", "ledger.head"):
        (service / file).unlink()
    for body in (entries[0].body, forged, entries[2].body):
        Ledger(service).append(body)
    shutil.rmtree(service / "certificates")
    base = load_text_base(str(made / "model"), job(made))
    with text_service(service, base, "base").open():
        pass  # certificates that are missing are made
    assert verify_service(service) == []
    with pytest.raises(GateError):
        run(asking(done, made, "forged"))
    sections = json.loads((made / "forged/sections.json").read_text())
    (table,) = (each for each in sections if each["title"] == "What is not as recorded")
    assert [row[1:3] for row in table["rows"]] == [["ledger.jsonl, entry 1 (apply)", f"body.metrics.{name}"]]
