"""Verification: a sound service has no finding, and whatever is changed in it has one."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from services import METRICS, TENSORS, apply_entry, bake_entry, base_entry, carry_out, make_service, request
from tampering import changed, leaves, name

from postgrad.core.sections import Note, Table
from postgrad.errors import ArtefactError, ConfigError
from postgrad.forgetting.entries import ApplyBody, Entry, Finding, canonical, digest
from postgrad.forgetting.ledger import Ledger, current_base, write_base
from postgrad.forgetting.signature import make_key, sign_file
from postgrad.forgetting.verification import findings_section, hash_files, verify_service

with TemporaryDirectory() as _folder:
    make_service(Path(_folder))
    BASE = json.loads((Path(_folder) / "base.json").read_bytes())
    LINES = (Path(_folder) / "ledger.jsonl").read_bytes().splitlines()
    CONFIG = json.loads((Path(_folder) / "adapters/2041/adapter_config.json").read_bytes())
    REQUEST = json.loads((Path(_folder) / "adapters/2041/request.json").read_bytes())
    FILES = sorted(p.relative_to(_folder).as_posix() for p in Path(_folder).rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("service")
    make_service(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Iterator[Path]:
    """Give each test a copy of its own."""
    shutil.copytree(original, tmp_path / "service")
    yield tmp_path / "service"


def places(folder: Path, **given: Any) -> set[str]:
    """List where something is wrong."""
    return {finding.place for finding in verify_service(folder, **given)}


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def test_a_sound_service_has_no_finding(folder: Path) -> None:
    before = hash_files(folder)
    known = [entry.hash for entry in Ledger.open(folder).entries()]
    assert verify_service(folder, tensors=TENSORS, measure=recorded, known=known) == []
    assert hash_files(folder) == before, "a verification writes nothing"
    note = findings_section([])
    assert isinstance(note, Note) and note.kind == "good"


def recorded(entry: Entry) -> dict[str, float]:
    assert isinstance(entry.body, ApplyBody)
    return dict(entry.body.metrics)


@pytest.mark.parametrize("file", FILES)
def test_every_file_deleted_is_found(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert verify_service(folder)


@pytest.mark.parametrize("file", FILES)
def test_a_bit_of_every_file_changed_is_found(folder: Path, file: str) -> None:
    for place in (0, (folder / file).stat().st_size // 2, -1):
        flip(folder / file, place)
        found = {finding.place.split(",")[0] for finding in verify_service(folder)}
        flip(folder / file, place)
        owner = "/".join(file.split("/")[:2])
        assert found & {file, owner} or (file == "ledger.jsonl" and "ledger.head" in found)
    assert verify_service(folder) == []


@pytest.mark.parametrize("index", range(len(LINES)))
def test_every_value_of_the_ledger_changed_is_found(folder: Path, index: int) -> None:
    for path in leaves(json.loads(LINES[index])):
        altered = canonical(changed(json.loads(LINES[index]), path))
        (folder / "ledger.jsonl").write_bytes(b"\n".join([*LINES[:index], altered, *LINES[index + 1 :], b""]))
        (finding,) = verify_service(folder)
        assert finding.place.startswith(f"ledger.jsonl, entry {index}") and finding.severity == "error", name(path)


@pytest.mark.parametrize("path", list(leaves(BASE)), ids=name)
def test_every_value_of_the_base_changed_is_found(folder: Path, path: Any) -> None:
    (folder / "base.json").write_text(json.dumps(changed(BASE, path), indent=2) + "\n")
    assert places(folder) == {"base.json"}


@pytest.mark.parametrize(
    ("file", "content", "path"),
    [("adapter_config.json", CONFIG, path) for path in leaves(CONFIG)]
    + [("request.json", REQUEST, path) for path in leaves(REQUEST)],
    ids=lambda value: name(value) if isinstance(value, tuple) else "",
)
def test_every_value_beside_an_adapter_changed_is_found(folder: Path, file: str, content: Any, path: Any) -> None:
    (folder / "adapters/2041" / file).write_text(json.dumps(changed(content, path)))
    findings = verify_service(folder)
    assert ("adapters/2041", file) in {(finding.place, finding.field) for finding in findings}


@pytest.mark.parametrize("place", range(0, 1280, 160))
def test_any_byte_of_an_adapter_changed_is_found(folder: Path, place: int) -> None:
    flip(folder / "adapters/2042/adapter_model.safetensors", place)
    (finding,) = verify_service(folder)
    assert (finding.place, finding.field) == ("adapters/2042", "adapter_model.safetensors")


def test_files_and_folders_that_are_too_many_are_found(folder: Path) -> None:
    shutil.copytree(folder / "adapters/2041", folder / "adapters/2043")
    (folder / "adapters/2041/more").mkdir()
    (folder / "adapters/2041/more/lora.bin").write_bytes(b"x")
    (folder / "certificates/2043.json").write_text("{}")
    (folder / "certificates/.2041.json.abc.tmp").write_text("{}")
    found = {(finding.place, finding.field) for finding in verify_service(folder)}
    assert found == {
        ("adapters/2043", "entry"),
        ("adapters/2041", "more/lora.bin"),
        ("certificates/2043.json", "entry"),
    }


def test_an_entry_without_its_folder_is_found(folder: Path) -> None:
    shutil.rmtree(folder / "adapters/2042")
    found = {(finding.place, finding.field) for finding in verify_service(folder)}
    assert ("adapters/2042", "folder") in found
    shutil.rmtree(folder / "adapters")
    shutil.rmtree(folder / "certificates")
    assert {"adapters/2041", "certificates/2041.json"} <= places(folder)


def test_adapters_exchanged_are_found(folder: Path) -> None:
    (folder / "adapters/2041").rename(folder / "adapters/x")
    (folder / "adapters/2042").rename(folder / "adapters/2041")
    (folder / "adapters/x").rename(folder / "adapters/2042")
    assert {"adapters/2041", "adapters/2042"} <= places(folder)


def test_a_link_is_no_file(folder: Path) -> None:
    path = folder / "adapters/2041/adapter_model.safetensors"
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    assert "adapters/2041" in places(folder)
    with pytest.raises(ArtefactError, match="found a link"):
        hash_files(folder)


@pytest.mark.parametrize("tensor", TENSORS)
def test_any_tensor_of_the_model_at_hand_is_compared(folder: Path, tensor: str) -> None:
    (finding,) = verify_service(folder, tensors={**TENSORS, tensor: digest("x")})
    assert (finding.place, finding.field, finding.expected) == ("base model", tensor, TENSORS[tensor])
    (missing,) = verify_service(folder, tensors={key: value for key, value in TENSORS.items() if key != tensor})
    assert (missing.field, missing.found) == (tensor, "none")


def test_another_model_is_told_in_few_lines(folder: Path) -> None:
    other = {f"layer.{i}.weight": digest(i) for i in range(40)}
    findings = verify_service(folder, tensors=other)
    assert len(findings) == 21 and findings[-1].found == "40 more that differ"


def test_pairs_left_in_a_base_are_found(folder: Path, tmp_path: Path) -> None:
    pair = "vit.layers.1.mlp.fc1.lora_A.2041.weight"
    findings = verify_service(folder, tensors={**TENSORS, pair: digest("a")})
    assert {finding.field for finding in findings} == {pair} and "merged twice" in findings[0].found
    base = write_base(tmp_path / "s", "m", {**TENSORS, pair: digest("a")}, ("x",))
    Ledger.open(tmp_path / "s").append(base_entry(base))
    (finding,) = verify_service(tmp_path / "s")
    assert finding.place == "base.json" and "merged twice" in finding.found


def test_a_base_that_does_not_fit_the_proof_is_found(tmp_path: Path) -> None:
    """The request claims tensors unchanged that are not those of the base, or one that the base lacks."""
    base = write_base(tmp_path, "m", {**TENSORS, "classifier.weight": digest("other")}, ("x",))
    ledger = Ledger.open(tmp_path)
    ledger.append(base_entry(base))
    carry_out(ledger, request("1", "8"), base.base_hash, 1)
    (finding,) = verify_service(tmp_path)
    assert finding.field == "body.identical_hash"


def test_a_new_base_is_checked_in_place_of_the_old(tmp_path: Path) -> None:
    ledger = make_service(tmp_path)
    old = current_base(ledger.entries())
    merged = {**TENSORS, "vit.layers.3.mlp.fc1.weight": digest("merged")}
    base = write_base(tmp_path, "digits-vit", merged, ("x",))
    assert places(tmp_path) == {"base.json"}
    bake = bake_entry(old.base_hash, "2042")
    ledger.append(replace(bake, new_base_hash=base.base_hash, record_hash=base.record_hash))
    assert verify_service(tmp_path, tensors=merged) == []
    assert places(tmp_path, tensors=TENSORS) == {"base model"}


def test_figures_are_compared_with_those_measured_anew(folder: Path) -> None:
    def worse(entry: Entry) -> dict[str, float]:
        return {**recorded(entry), "acc_f": 12.0}

    findings = verify_service(folder, measure=worse)
    assert {(f.place, f.field) for f in findings} == {
        ("ledger.jsonl, entry 1 (apply)", "body.metrics.acc_f"),
        ("ledger.jsonl, entry 2 (apply)", "body.metrics.acc_f"),
    }
    assert verify_service(folder, measure=worse, tolerance=12.0) == []
    nan = verify_service(folder, measure=lambda entry: {**recorded(entry), "acc_f": float("nan")}, tolerance=1e9)
    assert len(nan) == 2
    unknown = verify_service(folder, measure=lambda entry: {**recorded(entry), "acc_m": 1.0})
    assert {finding.found for finding in unknown} == {"none"}


def test_figures_that_nobody_measured_again_are_warned_of(folder: Path) -> None:
    findings = verify_service(folder, measure=lambda entry: {})
    judged = {"acc_f", "acc_r", "acc_r_pretrained", "mia_auc", "knn_excess"}
    assert {finding.severity for finding in findings} == {"warning"}
    assert {f.field.rpartition(".")[2] for f in findings if "entry 1 " in f.place} == judged & METRICS.keys()


def test_a_service_begun_anew_lacks_the_hash_on_an_old_certificate(folder: Path, tmp_path: Path) -> None:
    """Whoever writes all files anew cannot make the hash that somebody noted."""
    printed = Ledger.open(folder).entries()[2].hash
    make_service(tmp_path / "other")
    ledger = Ledger.open(tmp_path / "other")
    base = current_base(ledger.entries()).base_hash
    forged = [*ledger.path.read_bytes().splitlines()[:2]]
    entry = json.loads(forged[1])
    (tmp_path / "other/ledger.jsonl").write_bytes(b"\n".join([*forged, b""]))
    head = canonical({"num_entries": 2, "hash": entry["hash"]}) + b"\n"
    (tmp_path / "other/ledger.head").write_bytes(head)
    shutil.rmtree(tmp_path / "other/adapters/2042")
    for end in ("json", "html"):
        (tmp_path / f"other/certificates/2042.{end}").unlink()
    assert verify_service(tmp_path / "other") == [] and base
    (finding,) = verify_service(tmp_path / "other", known=[printed])
    assert finding.expected == f"the entry {printed}"


def test_signatures_are_asked_for_when_there_is_a_key(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    public = make_key(tmp_path / "key.pem")
    signed = ("ledger.head", "certificates/2041.json", "certificates/2042.json")
    assert places(folder, public_key=public) == set(signed)
    for file in signed:
        sign_file(folder / file, str(tmp_path / "key.pem"))
    assert verify_service(folder, public_key=public) == []
    flip(folder / "certificates/2041.json.sig")
    assert places(folder, public_key=public) == {"certificates/2041.json"}
    with pytest.raises(ConfigError, match="expected a key in PEM"):
        verify_service(folder, public_key=tmp_path / "none")


def test_an_empty_folder_is_no_service(tmp_path: Path) -> None:
    (finding,) = verify_service(tmp_path)
    assert "the ledger is empty" in finding.found


def test_half_a_line_is_only_a_warning(folder: Path) -> None:
    with (folder / "ledger.jsonl").open("ab") as file:
        file.write(b'{"body"')
    (finding,) = verify_service(folder)
    assert finding.severity == "warning"


def test_findings_are_shown() -> None:
    table = findings_section([Finding("base.json", "bytes", "a", "b")])
    assert isinstance(table, Table) and table.rows == (("error", "base.json", "bytes", "a", "b"),)


def test_the_sample_is_what_an_engine_would_record() -> None:
    body = apply_entry(request("2041", "8"), digest("base"), {}, 1)
    assert body.num_identical + len(body.tensors) == len(TENSORS)


def test_figures_that_are_no_per_cent_may_differ_by_a_hundredth(folder: Path) -> None:
    def moved(name: str, by: float) -> bool:
        def measure(entry: Entry) -> dict[str, float]:
            assert isinstance(entry.body, ApplyBody)
            return {**entry.body.metrics, name: entry.body.metrics[name] + by}

        return verify_service(folder, measure=measure, tolerance=1.0) == []

    assert moved("acc_r", 0.9) and not moved("acc_r", 1.1) and moved("h", -0.9)
    assert moved("mia_auc", 0.009) and not moved("mia_auc", 0.011)


def test_classes_are_held_against_the_record(folder: Path) -> None:
    assert verify_service(folder, classes=BASE["classes"]) == []
    (finding,) = verify_service(folder, classes=BASE["classes"][::-1])
    assert (finding.place, finding.field, finding.severity) == ("base model", "classes", "error")
