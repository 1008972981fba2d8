"""`postgrad forget` from end to end on a few digits, and every refusal with what to do."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cases import write
from forget_runs import Done, at
from tiny_digits import DATA, MODEL, base_config, images

from postgrad.core.config import RuntimeConfig, load_config
from postgrad.core.vision_models import Classifier, ClassifierConfig
from postgrad.errors import ArtefactError, ConfigError, DataError, GateError
from postgrad.forgetting import service, verify
from postgrad.forgetting.entries import ApplyBody, RevokeBody
from postgrad.forgetting.erase import Erased, Material, erase
from postgrad.forgetting.erase_config import PRESETS, EraseConfig, preset_of
from postgrad.forgetting.forget import (
    ForgetConfig,
    check,
    plan,
    requests_of,
    run,
    splits_of,
    working,
)
from postgrad.forgetting.leakage_audit import AuditConfig
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.policy import read_policy
from postgrad.forgetting.request import ForgetRequest
from postgrad.forgetting.schedules import class_order
from postgrad.forgetting.verification import verify_service
from postgrad.forgetting.verify import VerifyConfig

OWN = replace(PRESETS["gs-lora"], train=replace(PRESETS["gs-lora"].train, epochs=10))
CONFIG = ForgetConfig(
    tasks=(9, 1, 2), share=1.0, preset="own", gold=False, erase=OWN, base=base_config(), model=MODEL, data=DATA,
    audit=AuditConfig(svc=False),
)  # fmt: skip
ORDER = class_order(10)


def asked(folder: Path, name: str, *classes: str, **more: Any) -> str:
    """Write a request file."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"id": name, "classes": classes, **more}), encoding="utf-8")
    return str(path)


def bodies(service: Path) -> list[ApplyBody]:
    return [entry.body for entry in Ledger.open(service).entries() if isinstance(entry.body, ApplyBody)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Two made requests with gold, a preset and a baseline beside; the second is revoked."""
    folder = tmp_path_factory.mktemp("forget") / "run"
    config = at(folder, CONFIG, gold=True, baselines=("gs-lora++", "ssd"))
    return Done(config, run(config), folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """One request from a file."""
    folder = tmp_path_factory.mktemp("served")
    config = at(folder / "run", CONFIG, requests=(asked(folder, "a", "8", "3"),))
    return Done(config, run(config), folder / "run")


def test_the_requests_are_served_and_reported(done: Done) -> None:
    results = done.report.results
    assert float(results["acc_f_worst"]) <= 10 and float(results["acc_r"]) > 80 and float(results["h_worst"]) > 70
    assert results["requests_in_use"] == 1 and "knn_excess_worst" in results and "probe_excess_worst" in results
    titles = [section.title for section in done.report.sections]
    assert titles[:5] == [
        "Requests", "Limits of the policy", "Request request-2 was revoked", "Methods on the same requests",
        "H over the requests",
    ]  # fmt: skip
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    for name in ("gold", "base", "own", "gs-lora++", "ssd", "request-1"):
        assert name in page


def test_the_service_is_sound(done: Done) -> None:
    assert verify_service(done.service) == []
    first, second = bodies(done.service)
    assert (first.request, second.request) == ("request-1", "request-2")
    assert first.metrics["num_earlier"] == 0 and second.metrics["num_earlier"] == 1 and "acc_o" in second.metrics
    assert [e.body.request for e in Ledger.open(done.service).entries() if isinstance(e.body, RevokeBody)] == [
        "request-2"
    ]
    assert (done.service / "certificates" / "request-1.html").is_file()


def test_gold_never_saw_the_forgotten_classes(done: Done) -> None:
    """Its answers are never those classes, and it is good at the others."""
    first, second = bodies(done.service)
    for body in (first, second):
        assert body.metrics["knn_gold"] < 100 and body.metrics["js_gold"] >= 0
    table = next(section for section in done.report.sections if section.title == "What was forgotten, and what leaks")
    gold = next(row for row in vars(table)["rows"] if row[0] == "gold")
    assert gold[1] > 80 and gold[2] == 0.0


def test_a_second_call_gives_the_same(done: Done) -> None:
    again = run(done.config)
    assert again.results == done.report.results and again.sections == done.report.sections


def test_verify_measures_the_same_anew(done: Done, tmp_path: Path) -> None:
    model = replace(MODEL, path=str(done.folder / "base" / "model"))
    config = VerifyConfig(
        service=str(done.service), model=model, data=DATA, tolerance=1e-6,
        runtime=RuntimeConfig(folder=str(tmp_path / "verify"), device="cpu", quiet=True),
    )  # fmt: skip
    report = verify.run(config)
    assert report.results["errors"] == 0 and report.results["requests_measured"] == 2


def test_a_later_run_goes_on_with_the_service(served: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs before have forgotten is neither kept nor learnt from, and is measured apart."""
    learnt: list[Material] = []

    def noted(classifier: Classifier, material: Material, *rest: Any) -> Erased:
        learnt.append(material)
        return erase(classifier, material, *rest)

    monkeypatch.setattr(service, "erase", noted)
    model = replace(MODEL, path=str(served.folder / "base" / "model"))
    more = at(
        tmp_path / "more", CONFIG, model=model, service=str(served.service), requests=(asked(tmp_path, "b", "1"),)
    )
    report = run(more)
    first, second = bodies(served.service)
    assert (first.request, second.request) == ("a", "b") and second.metrics["num_earlier"] == 1
    assert second.metrics["acc_o"] <= 20 and second.num_retain == first.num_retain - 24
    assert report.results["requests_in_use"] == 2
    assert [(set(each.old), each.task) for each in learnt] == [({8, 3}, 1)]
    test_verify_measures_the_same_anew(served, tmp_path)
    with pytest.raises(ConfigError, match=r"baselines: expected a service without requests of earlier runs.*'a', 'b'"):
        run(at(tmp_path / "c", more, requests=(asked(tmp_path, "c", "2"),), baselines=("ssd",)))
    with pytest.raises(DataError, match=r"request 'd': \['8'\] was forgotten before"):
        run(at(tmp_path / "d", more, requests=(asked(tmp_path, "d", "8"),)))
    with pytest.raises(ArtefactError, match="'a' was applied with other content"):
        run(at(tmp_path / "e", more, requests=(asked(tmp_path, "a", "2"),)))


def test_limits_that_are_not_kept_make_the_command_fail_after_the_report(tmp_path: Path) -> None:
    """Without gold no excess is measured, and what is not measured is not kept."""
    policy = tmp_path / "policy.toml"
    policy.write_text("knn_excess_max = 50.0\n", encoding="utf-8")
    config = at(tmp_path / "run", CONFIG, policy=str(policy), tasks=(9, 1, 1), base=base_config(2))
    for _ in range(2):
        with pytest.raises(GateError, match=r"limits of .*policy\.toml are not kept; .*report\.html"):
            run(config)
        assert (tmp_path / "run" / "report.html").is_file()
    results = json.loads((tmp_path / "run" / "result.json").read_bytes())["results"]
    assert results["limits_missed"] >= 2 and results["requests_in_use"] == 1
    assert bodies(tmp_path / "run" / "service")[0].policy["knn_excess_max"] == 50.0


def test_a_request_below_the_floor_changes_nothing(tmp_path: Path) -> None:
    optim = replace(OWN.train.optim, lr=1.0)
    harsh = replace(OWN, floor=0.0, patience=0, train=replace(OWN.train, epochs=1, optim=optim))
    config = at(tmp_path / "run", CONFIG, erase=harsh, base=base_config(10))
    with pytest.raises(GateError, match=r"request 'request-1': .* the floor is 0\.0"):
        run(config)
    assert bodies(tmp_path / "run" / "service") == [] and verify_service(tmp_path / "run" / "service") == []
    assert not list((tmp_path / "run" / "service").glob("adapters/*"))


def test_requests_are_made_where_there_are_no_files() -> None:
    """The last classes of the shuffled order, the salt from the seed."""
    first, second = requests_of(at(Path("x"), CONFIG), images()[0])
    assert (first.id, second.id) == ("request-1", "request-2")
    assert first.classes == (str(ORDER[9]),) and second.classes == (str(ORDER[8]),)
    assert first.salt == second.salt == f"{3:032x}"


def test_requests_are_read_in_order_and_salted(tmp_path: Path) -> None:
    files = (asked(tmp_path, "b", "7"), asked(tmp_path, "a", "1", salt="5a" * 16))
    config = at(tmp_path, CONFIG, requests=files)
    first, second = requests_of(config, images()[0])
    assert (first.id, first.classes, second.id, second.salt) == ("b", ("7",), "a", "5a" * 16)
    assert len(first.salt) == 32 and requests_of(config, images()[0])[0].salt != first.salt
    splits = splits_of(config, images()[0], (first, second))
    assert [(split.forget, split.old) for split in splits] == [((7,), ()), ((1,), (7,))]
    assert splits[0].remain == (0, 1, 2, 3, 4, 5, 6, 8, 9) and splits[1].remain == (0, 2, 3, 4, 5, 6, 8, 9)
    earlier = splits_of(config, images()[0], (first, second), (9, 0))
    assert earlier[1].remain == (2, 3, 4, 5, 6, 8) and set(earlier[1].old) == {9, 0, 7}


def test_made_splits_follow_the_order_and_leave_the_missing_out() -> None:
    splits = splits_of(at(Path("x"), CONFIG, missing=2), images()[0], ())
    assert [set(split.forget) for split in splits] == [{ORDER[9]}, {ORDER[8]}]
    assert splits[1].old == (ORDER[9],) and splits[1].remain == ORDER[:8]
    for split in splits:
        assert split.missing == ORDER[:2] and set(split.replayed) == set(split.remain) - set(ORDER[:2])
    later = splits_of(at(Path("x"), CONFIG), images()[0], (), (ORDER[0],))
    assert ORDER[0] not in later[0].remain and set(later[1].old) == {ORDER[0], ORDER[9]}


@pytest.mark.parametrize(
    ("classes", "message"),
    (
        (("nine",), r"request 'r': no class 'nine' among 10\. There are 0, 1"),
        (("7", "10"), r"request 'r': no class '10' among 10\. Nearest is"),
        (tuple("0123456789"), r"request 'r': no class would be left to keep"),
    ),
)
def test_requests_that_do_not_fit_the_data_are_refused(classes: tuple[str, ...], message: str, tmp_path: Path) -> None:
    config = at(tmp_path, CONFIG, requests=(asked(tmp_path, "r", *classes),))
    with pytest.raises(DataError, match=message):
        plan(config)


def test_a_class_cannot_be_forgotten_twice(tmp_path: Path) -> None:
    config = at(tmp_path, CONFIG, requests=(asked(tmp_path, "one", "7"), asked(tmp_path, "two", "1", "7")))
    with pytest.raises(DataError, match=r"request 'two': \['7'\] was forgotten before"):
        plan(config)


def test_few_images_are_worked_with(tmp_path: Path) -> None:
    few = working(at(tmp_path, CONFIG, shots=4), images()[0])
    assert few.labels.bincount().tolist() == [4] * 10
    assert len(working(at(tmp_path, CONFIG, share=0.25), images()[0])) == 60
    assert plan(at(tmp_path, CONFIG, shots=4))["images to work with"] == 40


def test_shots_of_a_request_and_missing_classes_reach_the_training(tmp_path: Path) -> None:
    config = at(tmp_path / "run", CONFIG, tasks=(9, 1, 1), missing=2, shots=5, base=base_config(2))
    config = replace(config, erase=replace(OWN, patience=0, train=replace(OWN.train, epochs=1)))
    run(config)
    (body,) = bodies(tmp_path / "run" / "service")
    assert (body.num_forget, body.num_retain) == (5, 7 * 5) and body.metrics["min_shots"] == 5
    assert "acc_m" in body.metrics


def test_the_plan_counts_what_would_be_done(tmp_path: Path) -> None:
    found = plan(at(tmp_path, CONFIG, gold=True, baselines=("all",)))
    assert found["classes"] == 10 and found["models trained"] == 3 and found["baselines"] == 6 + 18
    assert found["request request-1"] == str(ORDER[9])
    assert not list(tmp_path.iterdir())


def test_presets_are_looked_up() -> None:
    assert preset_of("own", OWN, PRESETS) == OWN
    assert preset_of("paper", OWN, PRESETS) == PRESETS["paper"]
    assert read_policy("").acc_f_max == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"preset": "safe"}, r"erase: settings are given, but preset is 'safe'; set preset to 'own'"),
        ({"erase": replace(OWN, rank=0)}, "rank must be at least 1"),
        ({"share": 0.0}, "share above 0 and at most 1"),
        ({"share": 1.5}, "share above 0 and at most 1"),
        ({"shots": -1}, "shots and missing at least 0"),
        ({"missing": -1}, "shots and missing at least 0"),
        ({"revoke": ("request-3",)}, r"revoke: no request \['request-3'\] among \['request-1', 'request-2'\]"),
        ({"baselines": ("ssb",)}, r"baselines: expected names among safe, .* found \['ssb'\]"),
        ({"audit": AuditConfig(neighbours=0)}, "neighbours: expected 1 or more"),
        ({"data": replace(DATA, limit=-1)}, "limit: expected 0 or more"),
        ({"requests": ("nowhere.json",)}, r"nowhere\.json"),
        ({"policy": "nowhere.toml"}, r"nowhere\.toml"),
        ({"gold": True, "model": ClassifierConfig(path="a/model")}, r"gold: .* found 'a/model'\. Set gold to false"),
    ),
)
def test_settings_that_make_no_sense_are_refused(changes: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    check(at(tmp_path, CONFIG))
    with pytest.raises(ConfigError, match=message):
        check(at(tmp_path, CONFIG, **changes))


def test_tasks_must_be_about_all_classes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks: .* must be all 10 classes, found 8 and 1"):
        plan(at(tmp_path, CONFIG, tasks=(8, 1, 2)))
    with pytest.raises(ConfigError, match="12 requests of 1 classes"):
        plan(at(tmp_path, CONFIG, tasks=(9, 1, 12)))


def test_files_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    one, same_id = asked(tmp_path, "one", "1"), tmp_path / "other.json"
    same_id.write_text(json.dumps({"id": "one", "classes": ["2"]}), encoding="utf-8")
    samples = write(tmp_path / "samples.json", [{"id": "s", "samples": ["0123456789abcdef"]}])
    policy = tmp_path / "policy.toml"
    policy.write_text("acc_g_max = 1.0\n", encoding="utf-8")
    for changes, message in (
        ({"requests": (one, str(same_id))}, "'one' is that of"),
        ({"requests": (one,), "revoke": ("two",)}, r"revoke: no request \['two'\] among \['one'\]"),
        ({"requests": (str(samples),), "baselines": ("ssd",)}, r"found single images in \['s'\]"),
        ({"policy": str(policy)}, "acc_g_max.*acc_f_max"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(at(tmp_path, CONFIG, **changes))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('preset = "fast"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"recipe\.toml: preset: .*'safe'.*'fast'"):
        load_config(ForgetConfig, recipe)


def test_a_made_request_has_the_form_of_a_file(tmp_path: Path) -> None:
    (made, _) = requests_of(at(tmp_path, CONFIG), images()[0])
    assert isinstance(made, ForgetRequest) and made.shots == 0 and made.samples == ()
    assert EraseConfig() == PRESETS["safe"]
