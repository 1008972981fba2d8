"""Certificates: they say what the ledger says, and any other text is found."""

import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from services import METRICS, TENSORS, apply_entry, identical, make_service, request, revoke_entry
from tampering import changed, keys, leaves, name, without

from postgrad.errors import ArtefactError, ConfigError
from postgrad.forgetting.certificate import LIMITS, certificate, check_certificate, write_certificate
from postgrad.forgetting.certificate_page import render_certificate
from postgrad.forgetting.entries import GENESIS, ApplyBody, Entry, digest, make_entry
from postgrad.forgetting.ledger import Ledger
from postgrad.forgetting.policy import PolicyConfig, policy_limits
from postgrad.forgetting.request import ForgetRequest, write_request

TIME = "2026-05-12T09:14:00Z"
ASKED = request("2041", "8", "9")
BODY = apply_entry(ASKED, digest("base"), {"adapter_config.json": digest("file")}, 1, 3)
ENTRY = make_entry(1, GENESIS, TIME, BODY)

with TemporaryDirectory() as _folder:
    LEDGER = make_service(Path(_folder))
    APPLIED = LEDGER.entries()[1]
    FILES = {
        path.relative_to(_folder).as_posix(): path.read_bytes()
        for path in (
            LEDGER.folder / "certificates/2041.json",
            LEDGER.folder / "certificates/2041.html",
            LEDGER.folder / "adapters/2041/request.json",
        )
    }
CONTENT = json.loads(FILES["certificates/2041.json"])
PAGE = FILES["certificates/2041.html"].decode()


def made(asked: ForgetRequest = ASKED, body: ApplyBody = BODY, named: bool = True) -> dict[str, Any]:
    return certificate(make_entry(1, GENESIS, TIME, body), asked, identical(body), named=named)


def page(content: dict[str, Any]) -> str:
    return render_certificate(content, digest("json"))


def lay(folder: Path, **change: bytes) -> Path:
    """Write the files of a certificate, one of them changed."""
    for file, data in FILES.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(change.get(path.suffix[1:] if "certificates" in file else "request", data))
    return folder


def test_it_holds_what_the_ledger_holds() -> None:
    content = made()
    assert content["request"]["hash"] == BODY.request_hash and content["entry"]["hash"] == ENTRY.hash
    assert content["forgotten"]["classes"][0] == {"fingerprint": BODY.class_prints[0], "name": "8"}
    assert content["forgotten"]["num_images"] == 284 and content["forgotten"]["manifest_hash"] == BODY.manifest_hash
    assert content["blocks"] == {"num": 4, "changed": ["vit.layers.1", "vit.layers.3"]}
    assert content["tensors"]["identical"] == dict(sorted(identical(BODY).items()))
    assert len(content["tensors"]["identical"]) + len(content["tensors"]["changed"]) == len(TENSORS)
    assert content["metrics"]["acc_r"] == {"value": 96.5, "low": 94.75, "high": 97.75}
    assert content["metrics"]["mia_auc"] == {"value": 0.5234, "low": None, "high": None}
    assert not any(key.endswith(("_low", "_high")) for key in content["metrics"])
    assert content["limits"] == list(LIMITS)


def test_verdicts_are_those_of_the_recorded_policy() -> None:
    verdicts = {each["name"]: each["outcome"] for each in made()["verdicts"]}
    assert verdicts["acc_f_max"] == "met" and verdicts["knn_excess_max"] == "failed"
    assert verdicts["probe_excess_max"] == "not measured" and "acc_o_max" not in verdicts
    strict = policy_limits(PolicyConfig(max_blocks=1))
    found = {each["name"]: each for each in made(body=replace(BODY, policy=strict))["verdicts"]}
    assert found["max_blocks"] == {"name": "max_blocks", "limit": 1.0, "found": 2.0, "outcome": "failed"}


def test_names_are_shown_only_where_the_caller_says_so() -> None:
    hidden = made(named=False)
    assert [each["name"] for each in hidden["forgotten"]["classes"]] == ["", ""]
    assert "class no. 1" in page(hidden) and "class 8" not in page(hidden) and "class 8" in page(made())


@pytest.mark.parametrize(
    ("asked", "body", "message"),
    [
        (replace(ASKED, classes=("7",)), BODY, "the request given is not the one on record"),
        (ASKED, replace(BODY, class_prints=(digest("x"),)), "fingerprints of classes given"),
        (ASKED, replace(BODY, identical_hash=digest("x")), "list of unchanged tensors given"),
        (ASKED, replace(BODY, num_identical=1), "number of unchanged tensors given"),
        (ASKED, replace(BODY, policy={}), "expected the limits"),
    ],
)
def test_what_is_not_on_record_is_not_certified(asked: ForgetRequest, body: ApplyBody, message: str) -> None:
    with pytest.raises((ArtefactError, ConfigError), match=message):
        made(asked, body)


def test_a_changed_tensor_is_not_called_unchanged() -> None:
    body = replace(BODY, identical_hash=digest(TENSORS), num_identical=len(TENSORS))
    with pytest.raises(ArtefactError, match="set of tensors both changed and unchanged"):
        certificate(make_entry(1, GENESIS, TIME, body), ASKED, TENSORS)
    other = Entry(3, GENESIS, TIME, revoke_entry("2041", digest("base")), GENESIS)
    with pytest.raises(ArtefactError, match="expected one that applies a request, found revoke"):
        certificate(other, ASKED, {})


def test_it_is_written_and_found_right(tmp_path: Path) -> None:
    ledger = make_service(tmp_path)
    for entry in ledger.entries():
        if isinstance(entry.body, ApplyBody):
            assert check_certificate(tmp_path, entry) == []
    text = (tmp_path / "certificates/2041.json").read_bytes()
    assert hashlib.sha256(text).hexdigest() in (tmp_path / "certificates/2041.html").read_text()


def test_it_is_made_again_byte_for_byte(tmp_path: Path) -> None:
    make_service(tmp_path)
    (entry,) = [each for each in Ledger.open(tmp_path).entries() if each.index == 1]
    before = [path.read_bytes() for path in sorted((tmp_path / "certificates").iterdir())]
    write_certificate(tmp_path, entry, ASKED, CONTENT["tensors"]["identical"], named=True)
    assert before == [path.read_bytes() for path in sorted((tmp_path / "certificates").iterdir())]


@pytest.mark.parametrize("path", list(leaves(CONTENT)), ids=name)
def test_any_value_changed_is_found(tmp_path: Path, path: Any) -> None:
    altered = json.dumps(changed(CONTENT, path), indent=2, ensure_ascii=False) + "\n"
    findings = check_certificate(lay(tmp_path, json=altered.encode()), APPLIED)
    assert findings and findings[0].place == "certificates/2041.json"
    expected = ".".join(str(key) if isinstance(key, str) else f"[{key}]" for key in path).replace(".[", "[")
    fields = {each.field for each in findings}
    assert fields & {expected, "tensors.identical", "forgotten.classes[0].name"}


@pytest.mark.parametrize("path", list(keys(CONTENT)), ids=name)
def test_any_key_taken_out_is_found(tmp_path: Path, path: Any) -> None:
    altered = json.dumps(without(CONTENT, path), indent=2, ensure_ascii=False) + "\n"
    assert check_certificate(lay(tmp_path, json=altered.encode()), APPLIED)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"forgotten": 1}',
        json.dumps(CONTENT),
        json.dumps({**CONTENT, "extra": 1}, indent=2),
        '{"forgotten": {"named": true}, "tensors": {"identical": {"a": NaN}}}',
        "[" * 100_000,
    ],
    ids=range(8),
)
def test_any_other_text_is_found(tmp_path: Path, text: str) -> None:
    assert check_certificate(lay(tmp_path, json=text.encode()), APPLIED)


@pytest.mark.parametrize("place", range(0, len(PAGE.encode()), 499))
def test_any_byte_of_the_page_changed_is_found(tmp_path: Path, place: int) -> None:
    data = bytearray(PAGE.encode())
    data[place] ^= 1
    (finding,) = check_certificate(lay(tmp_path, html=bytes(data)), APPLIED)
    line = PAGE.encode()[:place].count(b"\n") + 1
    assert finding.place == "certificates/2041.html"
    assert finding.field in (f"line {line}", f"line {line + 1}"), "a newline taken away joins two lines"


@pytest.mark.parametrize("data", [b"", PAGE.encode() + b"\n", PAGE.encode()[:-1], PAGE.replace("\n", "\r\n").encode()])
def test_a_page_cut_or_drawn_out_is_found(tmp_path: Path, data: bytes) -> None:
    (finding,) = check_certificate(lay(tmp_path, html=data), APPLIED)
    assert finding.place == "certificates/2041.html"


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_found(tmp_path: Path, file: str) -> None:
    (lay(tmp_path) / file).unlink()
    assert check_certificate(tmp_path, APPLIED)


def test_another_request_is_found(tmp_path: Path) -> None:
    write_request(lay(tmp_path) / "adapters/2041/request.json", replace(ASKED, classes=("8",)))
    (finding,) = check_certificate(tmp_path, APPLIED)
    assert "the request given is not the one on record" in finding.found


class Outline(HTMLParser):
    """Checks that every element is closed, and collects what must not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
        self.links += [str(value) for key, value in attrs if key in ("src", "href") or key.startswith("on")]
        assert tag not in ("script", "link", "img", "iframe", "form")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone() -> None:
    outline = Outline()
    outline.feed(PAGE)
    assert outline.open == [] and outline.links == []
    assert "url(" not in PAGE and "@import" not in PAGE and "http" not in PAGE


def test_the_page_says_what_counts() -> None:
    text = re.sub(r"<[^>]+>", " ", PAGE.partition("</style>")[2])
    for words in (
        "Request 2041",
        "1 of 6 checks failed, 1 not measured",
        "On 12 May 2026 at 09:15 UTC",
        "2 classes, 284 images in all",
        "2 of its 4 blocks changed; 16 of its 20 tensors are, bit for bit, what they were",
        "1 June 2026, kept",
        "18.4 points",
        "94.75 to 97.75",
        "approximate unlearning",
        "vit.layers.3.mlp.fc2.weight",
        APPLIED.hash,
    ):
        assert words in " ".join(text.split()), words


def test_the_page_is_honest_about_other_outcomes() -> None:
    good = replace(BODY, metrics={**METRICS, "knn_excess": 1.0, "probe_excess": 1.0})
    assert '"verdict good">All 6 checks met' in page(made(body=good))
    no_gold = {key: value for key, value in METRICS.items() if not key.startswith("knn")}
    text = page(made(body=replace(BODY, metrics=no_gold)))
    assert '"verdict open">4 of 6 checks met, 2 not measured' in text and "No model that never saw the data" in text
    assert "Nothing was measured" in page(made(body=replace(BODY, metrics={})))
    late = replace(ASKED, deadline="2026-05-11", requester_hash="", legal_basis="")
    text = page(made(late, apply_entry(late, digest("base"), {}, 1)))
    assert "11 May 2026, missed" in text and "not recorded" in text and "not stated" in text
    open_end = replace(ASKED, deadline="")
    assert "<dd>none</dd>" in page(made(open_end, apply_entry(open_end, digest("base"), {})))


def test_what_a_request_says_is_text_and_no_markup() -> None:
    asked = replace(ASKED, classes=("<b>Ada</b>",), legal_basis="<script>alert(1)</script>")
    text = page(made(asked, apply_entry(asked, digest("base"), {"<i>": digest("f")}, 1)))
    assert "<script>" not in text and "<b>Ada" not in text and "<i>" not in text and "&lt;b&gt;Ada" in text


def test_a_model_without_plain_numbers_is_not_drawn() -> None:
    assert 'class="strip"' in page(made())
    for blocks in (("stages.0.blocks.1",), ("vit.layers.9",), ("encoder",)):
        assert 'class="strip"' not in page(made(body=replace(BODY, blocks=blocks)))
