"""Verification of a detector's service: sound, altered in any one place, with forged figures, after a bake."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tampering
from cocos import write_coco
from forgotten_boxes import DATA, forgotten_boxes, job

from postgrad.core.config import RuntimeConfig
from postgrad.core.layer_adapters import base_hashes
from postgrad.core.report import Table
from postgrad.core.vision_models import ClassifierConfig
from postgrad.errors import ConfigError, DataError, GateError
from postgrad.forgetting.bake import BakeConfig
from postgrad.forgetting.bake import run as bake
from postgrad.forgetting.box_files import BoxesConfig
from postgrad.forgetting.boxes_service import boxes_service, load_boxes_base
from postgrad.forgetting.detector import save_detector
from postgrad.forgetting.entries import canonical, digest
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.revoke import RevokeConfig
from postgrad.forgetting.revoke import run as revoke
from postgrad.forgetting.verification import hash_files, verify_service
from postgrad.forgetting.verify import VerifyConfig, check, plan, run

FIGURES = {"ap_r", "ap_f", "ap_o", "ap_r_pretrained", "ap_f_pretrained", "h"}


@pytest.fixture(autouse=True)
def matcher():
    """transformers' matcher solves the assignment with scipy."""
    pytest.importorskip("scipy")


@pytest.fixture
def made(tmp_path):
    return forgotten_boxes(tmp_path)


@pytest.fixture
def config(made, tmp_path):
    return VerifyConfig(
        service=str(made.service), model=ClassifierConfig(path=str(made.model)), boxes=DATA,
        runtime=RuntimeConfig(folder=str(tmp_path / "run"), device="cpu", quiet=True),
    )  # fmt: skip


def contents(folder):
    return {name: value for name, value in hash_files(folder).items() if name != ".lock"}


def wrong(config, name):
    """Run a verification that fails, and list where and what is wrong."""
    folder = Path(f"{config.runtime.folder}-{name}")
    with pytest.raises(GateError, match="findings, listed in"):
        run(replace(config, runtime=replace(config.runtime, folder=str(folder))))
    sections = json.loads((folder / "sections.json").read_text())
    return {tuple(row[1:3]) for each in sections if each["title"] == "What is not as recorded" for row in each["rows"]}


def test_a_sound_service_passes_is_measured_anew_and_stays_as_it_is(config, made):
    before = contents(made.service), contents(made.model)
    assert plan(config)["requests to measure anew"] == 2
    report = run(config)
    assert (report.results["errors"], report.results["requests_measured"]) == (0, 2)
    assert report.results["largest_difference"] == 0
    (table,) = (each for each in report.sections if each.title == "Figures measured anew")
    assert isinstance(table, Table) and {row[1] for row in table.rows} == FIGURES
    assert (contents(made.service), contents(made.model)) == before


def test_revoked_requests_are_measured_as_they_were(config, made, tmp_path):
    runtime = replace(config.runtime, folder=str(tmp_path / "revoke"))
    revoke(RevokeConfig(service=config.service, requests=("request-1",), model=config.model, runtime=runtime))
    assert run(config).results["requests_measured"] == 2


def test_without_images_adapters_are_loaded_and_nothing_is_measured(config):
    report = run(replace(config, boxes=BoxesConfig(path="")))
    assert report.results["errors"] == report.results["requests_measured"] == 0
    note = next(each for each in report.sections if each.title == "Not measured anew")
    assert note.text.startswith("ap_f, ap_o, ap_r, ap_r_pretrained")


def test_every_value_of_every_file_is_watched(made, tmp_path):
    """Each value of base.json, certificates, requests and adapter configs, one after another; then files as a whole."""
    hashes = base_hashes(load_boxes_base(str(made.model), job(tmp_path)).network)
    assert verify_service(made.service, tensors=hashes) == []
    files = [path for path in sorted(made.service.rglob("*.json")) if path.is_file()]
    names = {path.relative_to(made.service).as_posix() for path in files}
    assert names >= {"base.json", "certificates/request-1.json", "adapters/request-2/request.json"}
    for path in files:
        good = path.read_bytes()
        table = json.loads(good)
        places = list(tampering.leaves(table))
        for place in places[:: max(1, len(places) // 12)]:
            path.write_text(json.dumps(tampering.changed(table, place)))
            found = verify_service(made.service, tensors=hashes)
            assert any(each.severity == "error" for each in found), (path, place)
        path.write_bytes(good)
    assert verify_service(made.service, tensors=hashes) == []


def test_every_field_of_an_entry_is_watched(made, tmp_path):
    """Altered, it does not fit its hash; with hash and head made anew, it does not fit the certificate or the files."""
    hashes, ledger = base_hashes(load_boxes_base(str(made.model), job(tmp_path)).network), made.service / "ledger.jsonl"
    entries, good, head = Ledger(made.service).entries(), ledger.read_bytes(), made.service / "ledger.head"
    lines, good_head = good.splitlines(), head.read_bytes()
    table, last = json.loads(lines[2]), entries[2]
    for place in tampering.leaves(table["body"]):
        altered = tampering.changed(table, ("body", *place))
        ledger.write_bytes(b"\n".join([*lines[:2], canonical(altered)]) + b"\n")
        assert any(each.field == "hash" or place[0] in each.field for each in verify_service(made.service)), place
        altered["hash"] = digest({key: value for key, value in altered.items() if key != "hash"})
        ledger.write_bytes(b"\n".join([*lines[:2], canonical(altered)]) + b"\n")
        head.write_bytes(good_head.replace(last.hash.encode(), altered["hash"].encode()))
        found = verify_service(made.service, tensors=hashes)
        assert any(each.severity == "error" for each in found), place
    ledger.write_bytes(good)
    head.write_bytes(good_head)
    assert verify_service(made.service, tensors=hashes) == []


@pytest.mark.parametrize("file", ["adapters/request-1/adapter_model.safetensors", "certificates/request-2.html"])
def test_altered_bytes_are_reported_and_nothing_is_measured(config, made, file):
    data = bytearray((made.service / file).read_bytes())
    data[len(data) // 2] ^= 1
    (made.service / file).write_bytes(bytes(data))
    places = {place for place, _ in wrong(config, "bytes")}
    assert len(places) == 1 and file.startswith(places.pop().split(".")[0])


def test_a_changed_weight_and_exchanged_names_are_reported(config, made, tmp_path):
    detector = load_boxes_base(str(made.model), job(tmp_path))
    good = dict(detector.network.config.id2label)
    detector.network.config.id2label = dict(enumerate(reversed(detector.classes)))
    save_detector(detector, made.model)
    assert wrong(config, "names") == {("base model", "classes")}
    detector.network.config.id2label = good
    detector.network.class_embed[-1].bias.data[0] += 1e-6
    save_detector(detector, made.model)
    assert {place for place, _ in wrong(config, "weight")} == {"base model"}


def test_a_forged_figure_is_found_by_measuring(config, made, tmp_path):
    """The whole service rewritten around another figure agrees with itself; the detector does not agree with it."""
    forge(made, tmp_path, "ap_r", 99.0)
    assert verify_service(made.service) == []
    assert wrong(config, "forged") == {("ledger.jsonl, entry 2 (apply)", "body.metrics.ap_r")}
    blind = replace(config, boxes=BoxesConfig(path=""), runtime=replace(config.runtime, folder=str(tmp_path / "no")))
    assert run(blind).results["errors"] == 0


def forge(made, tmp_path, name, value):
    """Write ledger and certificate of the last request anew, with another figure."""
    entries = Ledger(made.service).entries()
    body = replace(entries[2].body, metrics={**entries[2].body.metrics, name: value})
    for file in ("ledger.jsonl", "ledger.head"):
        (made.service / file).unlink()
    ledger = Ledger(made.service)
    for each in (entries[0].body, entries[1].body, body):
        ledger.append(each)
    for page in (made.service / "certificates").iterdir():
        page.unlink()
    with boxes_service(made.service, load_boxes_base(str(made.model), job(tmp_path)), "base").open():
        pass  # certificates that are missing are made


def test_after_a_bake_the_new_base_is_verified(config, made, tmp_path):
    runtime = replace(config.runtime, folder=str(tmp_path / "bake"))
    bake(BakeConfig(service=config.service, model=config.model, runtime=runtime))
    assert {place for place, _ in wrong(config, "old")} == {"base model"}
    report = run(replace(config, model=ClassifierConfig(path=str(tmp_path / "bake/model"))))
    assert report.results["errors"] == 0 and report.results["requests_measured"] == 0


def test_images_of_other_objects_and_settings_that_cannot_be_meant_are_refused(config, tmp_path):
    data = BoxesConfig(path=str(tmp_path), annotations=str(write_coco(tmp_path, one_class)), test_share=0.5)
    with pytest.raises(DataError, match="'cat', a class that the detector does not have"):
        run(replace(config, boxes=data))
    with pytest.raises(ConfigError, match="test_share"):
        check(replace(config, boxes=replace(DATA, test_share=2.0)))


def one_class(table):
    """Give each image a cat."""
    table["annotations"] = [{"id": i, "image_id": 10 + i, "category_id": 3, "bbox": [2, 1, 4, 5]} for i in range(3)]
