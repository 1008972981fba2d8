"""A request for single images in ledger and certificate: whatever is changed in either is found, field by field."""

import json
from html import unescape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from services import SAMPLE_METRICS, TENSORS, make_single
from tampering import changed, keys, leaves, name, without

from postgrad.errors import ArtefactError
from postgrad.forgetting.certificate import LIMITS, SINGLE_LIMITS, check_certificate
from postgrad.forgetting.entries import ApplyBody, canonical
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.policy import SINGLE, judge, read_limits
from postgrad.forgetting.verification import verify_service

with TemporaryDirectory() as _folder:
    make_single(Path(_folder))
    FIRST, LINE = (Path(_folder) / "ledger.jsonl").read_bytes().splitlines()
    ENTRY = json.loads(LINE)
    CONTENT = json.loads((Path(_folder) / "certificates/2043.json").read_bytes())
    PAGE = (Path(_folder) / "certificates/2043.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a service whose tests put back what they change."""
    made = tmp_path_factory.mktemp("service")
    make_single(made)
    return made


def test_it_is_sound_and_judged_by_what_is_above(folder: Path) -> None:
    assert verify_service(folder, tensors=TENSORS) == []
    _, entry = Ledger.open(folder).entries()
    assert isinstance(entry.body, ApplyBody) and entry.body.metrics[SINGLE] == entry.body.num_samples == 24
    names = [verdict.name for verdict in judge(read_limits(entry.body.policy), entry.body.metrics)]
    assert names == ["acc_r_min_drop", "acc_excess_max", "mia_excess_max"]
    assert {each["outcome"] for each in CONTENT["verdicts"]} == {"met"}


@pytest.mark.parametrize("path", list(leaves(ENTRY)), ids=name)
def test_any_value_of_the_entry_changed_is_found(folder: Path, path: Any) -> None:
    (folder / "ledger.jsonl").write_bytes(b"\n".join((FIRST, canonical(changed(ENTRY, path)), b"")))
    with pytest.raises(ArtefactError, match="entry 1"):
        Ledger(folder).entries()
    assert verify_service(folder)
    (folder / "ledger.jsonl").write_bytes(b"\n".join((FIRST, LINE, b"")))


@pytest.mark.parametrize("path", [path for path in keys(ENTRY) if path[0] == "body"], ids=name)
def test_any_key_of_the_entry_taken_out_is_found(folder: Path, path: Any) -> None:
    (folder / "ledger.jsonl").write_bytes(b"\n".join((FIRST, canonical(without(ENTRY, path)), b"")))
    with pytest.raises(ArtefactError, match="entry 1"):
        Ledger(folder).entries()
    (folder / "ledger.jsonl").write_bytes(b"\n".join((FIRST, LINE, b"")))


@pytest.mark.parametrize("path", list(leaves(CONTENT)), ids=name)
def test_any_value_of_the_certificate_changed_is_found(folder: Path, path: Any) -> None:
    file = folder / "certificates/2043.json"
    data = file.read_bytes()
    file.write_text(json.dumps(changed(CONTENT, path), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    found = check_certificate(folder, Ledger(folder).entries()[1])
    file.write_bytes(data)
    expected = ".".join(str(key) if isinstance(key, str) else f"[{key}]" for key in path).replace(".[", "[")
    # without classes nothing depends on whether they are named, but the page
    page = path == ("forgotten", "named") and found[0].place == "certificates/2043.html"
    assert page or {each.field for each in found} & {expected, "tensors.identical"}, found


def test_the_page_says_what_single_images_are_judged_by() -> None:
    text = unescape(PAGE)
    assert "24 single images" in text and "Accuracy on unseen images of the same classes" in text
    assert "Are these images named more often than unseen ones?" in text
    assert "Does the model still name what it was to forget?" not in text and "a probe" not in text.lower()
    assert CONTENT["limits"] == list(SINGLE_LIMITS) != list(LIMITS)
    assert CONTENT["metrics"]["mia_excess"] == {
        "value": SAMPLE_METRICS["mia_excess"], "low": SAMPLE_METRICS["mia_excess_low"],
        "high": SAMPLE_METRICS["mia_excess_high"],
    }  # fmt: skip
