"""`postgrad forget` on single images, from end to end, alone and among requests for whole classes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forget_runs import Done, at
from test_contract import Killed, contents, kill, run_until
from tiny_digits import DATA, MODEL, base_config, images

from postgrad.core.config import RuntimeConfig
from postgrad.core.report import Table
from postgrad.errors import ArtefactError, ConfigError, DataError
from postgrad.forgetting import forget as module
from postgrad.forgetting import verify
from postgrad.forgetting.bench import left
from postgrad.forgetting.entries import ApplyBody
from postgrad.forgetting.erase_config import PRESETS
from postgrad.forgetting.forget import ForgetConfig, check, plan, requests_of, run, scopes
from postgrad.forgetting.leakage_audit import AuditConfig
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.policy import judge, read_limits
from postgrad.forgetting.relearn import RelearnConfig
from postgrad.forgetting.revoke import RevokeConfig
from postgrad.forgetting.revoke import run as revoke
from postgrad.forgetting.verification import verify_service
from postgrad.forgetting.verify import VerifyConfig

OWN = replace(PRESETS["gs-lora"], train=replace(PRESETS["gs-lora"].train, epochs=10))
TRAIN = images()[0]
SOME = [row for row in range(len(TRAIN)) if int(TRAIN.labels[row]) in (3, 5)][:8]
OTHERS = [row for row in range(len(TRAIN)) if int(TRAIN.labels[row]) == 7][:3]
CONFIG = ForgetConfig(
    share=0.5, preset="own", gold=False, erase=OWN, base=base_config(), model=MODEL, data=DATA,
    audit=AuditConfig(svc=False, relearn=RelearnConfig(steps=2)),
)  # fmt: skip


def asked(folder: Path, name: str, rows: list[int] | None = None, **more: Any) -> str:
    """Write a request file for some training images."""
    path = folder / f"{name}.json"
    samples = {} if rows is None else {"samples": [TRAIN.hashes[row] for row in rows]}
    path.write_text(json.dumps({"id": name, "salt": "5a" * 16, **samples, **more}), encoding="utf-8")
    return str(path)


def bodies(service: Path) -> list[ApplyBody]:
    return [entry.body for entry in Ledger.open(service).entries() if isinstance(entry.body, ApplyBody)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Single images, then a whole class that some of them are of, then others; with gold."""
    folder = tmp_path_factory.mktemp("single")
    files = (asked(folder, "some", SOME), asked(folder, "class", classes=["3"]), asked(folder, "others", OTHERS))
    config = at(folder / "run", CONFIG, requests=files, gold=True)
    return Done(config, run(config), folder / "run")


def test_all_kinds_are_served_and_reported(done: Done) -> None:
    results = done.report.results
    assert {"acc_excess_worst", "mia_excess_worst", "h_mean", "acc_f_worst", "knn_excess_worst"} <= results.keys()
    assert float(results["acc_f_worst"]) <= 20 and results["requests_in_use"] == 3
    titles = [section.title for section in done.report.sections]
    assert titles[0] == "Requests" and "Single images beside unseen ones" in titles
    table = next(section for section in done.report.sections if section.title == "Single images beside unseen ones")
    assert isinstance(table, Table)
    names = [row[:2] for row in table.rows]
    assert names == [(each, model) for each in ("some", "others") for model in ("base", "gold", "own")]
    leaks = next(section for section in done.report.sections if section.title == "What was forgotten, and what leaks")
    assert isinstance(leaks, Table) and [row[0] for row in leaks.rows] == ["base", "gold", "own"]


def test_single_images_are_no_wrong_answers(done: Done) -> None:
    """They are still named about as often as gold names them, and the rest of their classes is kept."""
    some, whole, others = bodies(done.service)
    assert (some.num_forget, some.num_samples, some.class_prints) == (8, 8, ())
    assert some.metrics["num_single_images"] == 8 and some.metrics["acc_f_pretrained"] > 80
    assert some.metrics["acc_f"] > 30 and some.metrics["acc_h"] > 50 and some.metrics["acc_r"] > 75
    assert abs(some.metrics["acc_excess"]) <= 50 and "acc_f_gold" in some.metrics and "h" not in some.metrics
    assert whole.metrics["h"] > 50 and "num_single_images" not in whole.metrics
    assert others.metrics["num_earlier"] == 2 and others.metrics["acc_o"] <= 20
    names = [verdict.name for verdict in judge(read_limits(others.policy), others.metrics)]
    assert names == ["acc_r_min_drop", "acc_o_max", "acc_excess_max", "mia_excess_max"]


def test_gold_and_later_requests_never_see_them(done: Done) -> None:
    found = scopes(done.config, images(), requests_of(done.config, TRAIN))
    assert [set(each.rows) for each in found] == [set(SOME), set(), set(OTHERS)]
    assert [set(each.gone) for each in found] == [set(), set(SOME), set(SOME)]
    assert found[2].split.old == (3,) and 3 not in found[2].split.remain and 5 in found[0].split.remain
    for each, gone in zip(found, ([*SOME], [*SOME], [*SOME, *OTHERS]), strict=True):
        hashes = set(left(TRAIN, each).hashes)
        assert not hashes & {TRAIN.hashes[row] for row in gone}
    _, whole, others = bodies(done.service)
    half = [row for row in range(len(TRAIN)) if int(TRAIN.labels[row]) not in (3,)]
    assert whole.num_retain < len(half) and others.num_retain < whole.num_retain


def test_the_service_is_sound_and_measured_the_same_anew(done: Done, tmp_path: Path) -> None:
    assert verify_service(done.service) == []
    config = VerifyConfig(
        service=str(done.service), model=replace(MODEL, path=str(done.folder / "base" / "model")), data=DATA,
        tolerance=1e-6, runtime=RuntimeConfig(folder=str(tmp_path / "verify"), device="cpu", quiet=True),
    )  # fmt: skip
    report = verify.run(config)
    assert report.results["errors"] == 0 and report.results["requests_measured"] == 3
    rows = next(vars(each)["rows"] for each in report.sections if each.title == "Figures measured anew")
    assert {row[1] for row in rows if row[0] == "some"} == {
        "acc_r", "acc_f", "acc_h", "acc_r_pretrained", "acc_f_pretrained", "acc_h_pretrained"
    }  # fmt: skip
    standing = next(vars(each)["rows"] for each in report.sections if each.title == "Requests of the service")
    assert [(row.request, row.what, row.state) for row in standing] == [
        ("some", "8 single images", "frozen"), ("class", f"1 class, {bodies(done.service)[1].num_forget} images",
        "frozen"), ("others", "3 single images", "active"),
    ]  # fmt: skip


def test_images_that_are_gone_are_not_measured_anew(done: Done, tmp_path: Path) -> None:
    """As after a purge: nothing is wrong, and the report says what it did not measure."""
    config = VerifyConfig(
        service=str(done.service), model=replace(MODEL, path=str(done.folder / "base" / "model")),
        data=replace(DATA, limit=120), tolerance=100.0,
        runtime=RuntimeConfig(folder=str(tmp_path / "verify"), device="cpu", quiet=True),
    )  # fmt: skip
    report = verify.run(config)
    assert report.results["errors"] == 0 and report.results["requests_measured"] == 1


def test_a_second_call_gives_the_same(done: Done) -> None:
    assert run(done.config).results == done.report.results


def test_a_request_for_single_images_is_revoked_bit_for_bit(done: Done, tmp_path: Path) -> None:
    config = RevokeConfig(
        service=str(done.service), requests=("some",), rehearse=True, data=DATA,
        model=replace(MODEL, path=str(done.folder / "base" / "model")),
        runtime=RuntimeConfig(folder=str(tmp_path / "revoke"), device="cpu", quiet=True),
    )  # fmt: skip
    report = revoke(config)
    assert report.results["not_bit_exact"] == 0 and report.results["requests_in_use"] == 2


def test_later_runs_know_of_them(done: Done, tmp_path: Path) -> None:
    model = replace(MODEL, path=str(done.folder / "base" / "model"))
    again = asked(tmp_path, "again", SOME[-1:])
    more = at(tmp_path / "more", CONFIG, model=model, service=str(done.service), requests=(again,))
    found = plan(more)
    assert str(found["service, others"]).startswith("active since ")
    assert f"image {TRAIN.hashes[SOME[-1]]} (request 'some')" in str(found["again: ! forgotten before"])
    with pytest.raises(DataError, match=f"image {TRAIN.hashes[SOME[-1]]} was asked for by request 'some' already"):
        run(more)
    with pytest.raises(ArtefactError, match="'others' was applied with other content"):
        other = (asked(tmp_path, "others", [0]),)
        run(at(tmp_path / "other", CONFIG, model=model, service=str(done.service), requests=other))


@contextmanager
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        yield


def test_killed_anywhere_it_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels are taken from the model as it was before the request, however often the run begins again."""
    config = at(Path("run"), CONFIG, requests=(asked(tmp_path, "some", SOME), asked(tmp_path, "others", OTHERS)))
    with inside(tmp_path / "straight", monkeypatch):
        straight = run(config)
    with inside(tmp_path / "killed", monkeypatch):
        for advances in (45, 8, 3):
            with pytest.raises(Killed):
                run_until("forget", config, advances, kill)
        assert run(config).results == straight.results
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    mixed, few = asked(tmp_path, "mixed", SOME, classes=["3"]), asked(tmp_path, "few", SOME, shots=4)
    plain = asked(tmp_path, "plain", SOME)
    for changes, message in (
        (
            {"requests": (mixed,)},
            r"classes or samples in one request, found both in \['mixed'\].*two requests",
        ),
        ({"requests": (few,)}, r"single images are all forgotten; expected no shots, found some in \['few'\]"),
        (
            {"requests": (plain,), "baselines": ("ssd",)},
            r"baselines: other methods .* single images in \['plain'\]",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            check(at(tmp_path / "run", CONFIG, **changes))
    unknown = tmp_path / "unknown.json"
    unknown.write_text(json.dumps({"id": "unknown", "samples": ["0123456789abcdef"]}), encoding="utf-8")
    whole = asked(tmp_path, "class", classes=["3"])
    for files, wrong in (
        ((str(unknown),), "request 'unknown': samples: no image with hash '0123456789abcdef'"),
        ((whole, plain), "request 'plain': image .* was asked for by request 'class' already"),
        ((plain, asked(tmp_path, "twice", SOME[:1])), "'twice': image .* was asked for by request 'plain' already"),
    ):
        for call in (plan, run):
            with pytest.raises(DataError, match=wrong):
                call(at(tmp_path / files[-1].replace("/", "-"), CONFIG, requests=files))
    assert not list(tmp_path.rglob("base")), "refused before anything is trained"
    assert module.LOSS is None
