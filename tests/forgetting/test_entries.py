"""Entries: one canonical form, one hash, and bodies that hold nothing but what they may."""

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from services import apply_entry, bake_entry, request, revoke_entry

from postgrad.errors import ArtefactError
from postgrad.forgetting.entries import (
    GENESIS,
    ApplyBody,
    Entry,
    canonical,
    digest,
    entry_line,
    entry_problem,
    make_entry,
    read_entry,
)

TIME = "2026-05-12T09:14:00Z"
BODY = apply_entry(request("2041", "8", "9"), digest("base"), {"adapter_config.json": digest("file")}, 1, 3)
ENTRY = make_entry(4, GENESIS, TIME, BODY)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def test_the_canonical_form_by_hand() -> None:
    assert canonical({"b": [1, 2.0, None], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.0,null]}'
    assert digest([]) == hashlib.sha256(b"[]").hexdigest()
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 2.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(float("nan"))


@given(JSON)
def test_what_is_read_back_has_the_same_hash(value: Any) -> None:
    assert digest(json.loads(canonical(value))) == digest(value)


@pytest.mark.parametrize("body", [BODY, revoke_entry("2041", digest("b")), bake_entry(digest("b"), "2041", "2042")])
def test_a_line_is_read_back(body: Any) -> None:
    entry = make_entry(4, GENESIS, TIME, body)
    assert entry_problem(entry_line(entry), 4, GENESIS, "l") is None
    assert read_entry(entry_line(entry)) == entry
    table = json.loads(entry_line(entry))
    assert table.pop("hash") == digest(table) and table["kind"] == entry.kind


def line(**change: Any) -> bytes:
    """Write the entry with other fields and the hash they ask for."""
    table = {**json.loads(entry_line(ENTRY)), **change}
    table["hash"] = digest({key: value for key, value in table.items() if key != "hash"})
    return canonical(table)


def body_line(**change: Any) -> bytes:
    return line(body={**json.loads(entry_line(ENTRY))["body"], **change})


@pytest.mark.parametrize(
    ("text", "field", "expected"),
    [
        (b"{", "line", "one JSON object"),
        (b"\xff", "line", "one JSON object"),
        (b"[]", "line", "an object of index"),
        (line(extra=1), "line", "an object of index"),
        (line(index=5), "index", "4, its place in the file"),
        (line(index=4.0), "index", "4, its place in the file"),
        (line(index=True), "index", "4"),
        (line(previous=digest("x")), "previous", GENESIS),
        (line(time="2026-05-12 09:14"), "time", "a time such as"),
        (line(time="2026-13-12T09:14:00Z"), "time", "a time such as"),
        (line(kind="aply"), "kind", "one of base, apply"),
        (line(kind=1), "kind", "one of base, apply"),
        (line(body=[]), "body", "an object"),
        (line(body={}), "body.request", "a value"),
        (body_line(reqest="1"), "body.reqest", "'request'"),
        (body_line(zz="1"), "body.zz", "request, request_hash"),
        (body_line(request="../up"), "body.request", "ids of requests"),
        (body_line(request_hash="ab"), "body.request_hash", "SHA-256"),
        (body_line(seed="1"), "body.seed", "a whole number"),
        (body_line(seed=True), "body.seed", "a whole number"),
        (body_line(num_forget=-1), "body.num_forget", "a count"),
        (body_line(hardware=3), "body.hardware", "text"),
        (body_line(class_prints=["Ada"]), "body.class_prints", "a list of SHA-256"),
        (body_line(class_prints="Ada"), "body.class_prints", "a list of SHA-256"),
        (body_line(blocks=[1]), "body.blocks", "a list of texts"),
        (body_line(adapter_files={"a": "b"}), "body.adapter_files", "a SHA-256 for each name"),
        (body_line(metrics={"acc_f": True}), "body.metrics", "finite numbers"),
        (body_line(metrics={"Ada Lovelace": 1.0}), "body.metrics", "lower-case names"),
        (entry_line(ENTRY).replace(b'"seed":0', b'"seed":1'), "hash", "that of time, kind and body"),
        (entry_line(ENTRY).replace(b'"seed":0', b'"seed": 0'), "line", "canonical form"),
        (entry_line(ENTRY).replace(b'"seed":0', b'"seed":1,"seed":0'), "line", "canonical form"),
    ],
)
def test_each_fault_is_named(text: bytes, field: str, expected: str) -> None:
    finding = entry_problem(text, 4, GENESIS, "ledger.jsonl")
    assert finding is not None and finding.field == field and expected in finding.expected
    assert str(finding).startswith("ledger.jsonl, entry 4")


def test_a_number_that_json_cannot_say_is_a_fault() -> None:
    text = entry_line(ENTRY).replace(b'"acc_f":0.0', b'"acc_f":1e999')
    finding = entry_problem(text, 4, GENESIS, "l")
    assert finding is not None and finding.field == "body.metrics"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {"acc_f": float("nan")}}, r"body.metrics: expected finite numbers .*leave out what was not"),
        ({"adapter_files": {"a": "x"}}, "body.adapter_files: expected a SHA-256"),
        ({"request": ""}, "body.request: expected ids of requests"),
    ],
)
def test_what_may_not_be_recorded_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        make_entry(0, GENESIS, TIME, replace(BODY, **change))


def test_kinds_follow_from_the_body() -> None:
    assert ENTRY.kind == "apply" and isinstance(ENTRY.body, ApplyBody)
    assert Entry(0, GENESIS, TIME, revoke_entry("1", GENESIS), GENESIS).kind == "revoke"
