"""The certificate of a request: what was done, as the ledger records it, for a person to read and keep.

It is JSON, and a page of HTML made from nothing else. Both follow from the ledger's entry, the request's own file and
the list of unchanged tensors, whose hash the ledger holds: they can be made again byte for byte, and are, to check
them. The name of a class is shown only where the caller says that it is nobody's.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from postgrad.core.files import write_text
from postgrad.core.sections import is_interval_end
from postgrad.errors import ArtefactError, UserError
from postgrad.forgetting.certificate_page import render_certificate
from postgrad.forgetting.entries import ApplyBody, Entry, Finding, digest
from postgrad.forgetting.policy import SINGLE, judge, read_limits
from postgrad.forgetting.request import ForgetRequest, class_prints, read_request, request_hash

FORMAT = "postgrad certificate 1"
LIMITS = (
    "This is approximate unlearning. The model was changed until it behaved as recorded here; that is no proof that "
    "every trace of the data is gone from it.",
    "Low accuracy does not show that nothing is known: a model can fail to name a class and still tell it from others "
    "inside. What neighbours and a probe still find says more, and only beside a model that never saw the data.",
    "The membership figure comes from one attack on the model's loss. A stronger attack may find more.",
    "The change is an adapter beside the base model, which stays as it was. Whoever holds the base without the adapter "
    "holds the model as it was before.",
    "Nothing is said here of the data themselves, of copies and backups, or of other models trained on them.",
    "The figures were measured on test images like those that were forgotten, at the time of the entry. A request "
    "may have been revoked since: the ledger tells.",
    "Whoever controls all the files could write another set that agrees. A hash noted elsewhere, as on this page in "
    "print, or a signature brings that to light.",
)

TEXTS = "num_target_tokens"
"""A figure that only requests to a language model have: their rows are counted as rows, not as images."""
TEXT_LIMITS = (
    LIMITS[0],
    "An answer that is not given does not show that nothing is known: another question, a few steps of training or a "
    "look inside may bring it back. The figures say more beside a model that never saw the rows.",
    *LIMITS[2:5],
    "The figures were measured on the rows themselves, as answers to their own questions, at the time of the entry. A "
    "request may have been revoked since: the ledger tells.",
    LIMITS[-1],
)


SINGLE_LIMITS = (
    LIMITS[0],
    "A model that never saw an image may name it rightly, too, and so may this one. The images were forgotten when the "
    "model was no surer of them than of unseen images of their classes.",
    *LIMITS[2:5],
    "The figures were measured on the images themselves and on unseen images of their classes, at the time of the "
    "entry. A request may have been revoked since: the ledger tells.",
    LIMITS[-1],
)


def certificate(
    entry: Entry, request: ForgetRequest, identical: Mapping[str, str], *, named: bool = False
) -> dict[str, Any]:
    """Make the content of a certificate.

    Args:    identical: name -> SHA-256 of each tensor that is bit for bit that of the base.  named: show the names of
             the classes, which may be persons.
    Raises:  ArtefactError: the entry applies no request, or request or tensors are not those of the entry.
    """
    body = _applied(entry)
    _check_sources(entry.index, body, request, identical)
    return {
        "format": FORMAT,
        "request": {
            "id": body.request,
            "hash": body.request_hash,
            "requester_hash": request.requester_hash,
            "legal_basis": request.legal_basis,
            "deadline": request.deadline,
            "shots": request.shots,
        },
        "forgotten": _forgotten(body, request, named),
        "entry": {"index": entry.index, "time": entry.time, "hash": entry.hash, "previous": entry.previous},
        "run": {
            "base": body.base_name,
            "base_hash": body.base_hash,
            "config_hash": body.config_hash,
            "code_version": body.code_version,
            "seed": body.seed,
            "hardware": body.hardware,
        },
        "blocks": {"num": body.num_blocks, "changed": list(body.blocks)},
        "tensors": {
            "changed": list(body.tensors),
            "num_identical": body.num_identical,
            "identical_hash": body.identical_hash,
            "identical": dict(sorted(identical.items())),
        },
        "adapter_files": dict(sorted(body.adapter_files.items())),
        "metrics": _metrics(body.metrics),
        "policy": dict(sorted(body.policy.items())),
        "verdicts": _verdicts(body),
        "limits": list(_limits(body.metrics)),
    }


def write_certificate(
    folder: Path, entry: Entry, request: ForgetRequest, identical: Mapping[str, str], *, named: bool = False
) -> Path:
    """Write a request's certificate into a service folder, as JSON and HTML; give the path of the JSON.

    Raises:  ArtefactError: as `certificate`.
    """
    content = certificate(entry, request, identical, named=named)
    place = folder / "certificates" / _applied(entry).request
    path, page = Path(f"{place}.json"), Path(f"{place}.html")
    text = _text(content)
    write_text(path, text)
    write_text(page, render_certificate(content, hashlib.sha256(text.encode()).hexdigest()))
    return path


def check_certificate(folder: Path, entry: Entry) -> list[Finding]:
    """Compare a certificate, field by field, with what the ledger's entry makes it, and its page byte by byte."""
    body = _applied(entry)
    place = f"certificates/{body.request}"
    path, page = folder / f"{place}.json", folder / f"{place}.html"
    if not path.is_file():
        return [Finding(f"{place}.json", "file", f"the certificate of entry {entry.index}", "none")]
    data = path.read_bytes()
    try:
        found = json.loads(data)
        named, identical = found["forgotten"]["named"] is True, dict(found["tensors"]["identical"])
        actual = digest(identical)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return [Finding(f"{place}.json", "content", "a certificate", repr(error)[:120])]
    if actual != body.identical_hash:
        return [Finding(f"{place}.json", "tensors.identical", f"a list of hash {body.identical_hash}", actual)]
    try:
        request = read_request(folder / "adapters" / body.request / "request.json")
        expected = certificate(entry, request, identical, named=named)
    except UserError as error:
        return [Finding(f"{place}.json", "source", "the request on record, in adapters/", str(error))]
    findings = [Finding(f"{place}.json", *each) for each in _differences("", expected, found)]
    text = _text(expected)
    if not findings and data != text.encode():
        findings = [Finding(f"{place}.json", "bytes", "the text that the content is written as", "another text")]
    html = render_certificate(expected, hashlib.sha256(text.encode()).hexdigest())
    if not page.is_file():
        findings.append(Finding(f"{place}.html", "file", "the page of the certificate", "none"))
    elif page.read_bytes() != html.encode():
        line = _first_difference(html, page.read_bytes().decode("utf-8", "replace"))
        findings.append(Finding(f"{place}.html", f"line {line}", "the page made from the ledger", "another text"))
    return findings


def _applied(entry: Entry) -> ApplyBody:
    if not isinstance(entry.body, ApplyBody):
        raise ArtefactError(f"entry {entry.index}: expected one that applies a request, found {entry.kind}.")
    return entry.body


def _forgotten(body: ApplyBody, request: ForgetRequest, named: bool) -> dict[str, Any]:
    """Identify the data; a name that is not to be shown is empty."""
    names = sorted(request.classes) if named else [""] * len(body.class_prints)
    kind = "rows" if TEXTS in body.metrics else "images"
    prints = zip(body.class_prints, names, strict=True)
    return {
        "named": named,
        "classes": [{"fingerprint": fingerprint, "name": name} for fingerprint, name in prints],
        "num_samples": body.num_samples,
        f"num_{kind}": body.num_forget,
        f"num_retained_{kind}": body.num_retain,
        "manifest_hash": body.manifest_hash,
    }


def _check_sources(index: int, body: ApplyBody, request: ForgetRequest, identical: Mapping[str, str]) -> None:
    """Refuse a request or a list of tensors that is not the one on record."""
    for what, expected, found in (
        ("request", body.request_hash, request_hash(request)),
        ("fingerprints of classes", body.class_prints, class_prints(request)),
        ("list of unchanged tensors", body.identical_hash, digest(dict(identical))),
        ("number of unchanged tensors", body.num_identical, len(identical)),
        ("set of tensors both changed and unchanged", set(), {*body.tensors} & {*identical}),
    ):
        if expected != found:
            raise ArtefactError(
                f"entry {index}: the {what} given is not the one on record: expected {expected}, found {found}."
            )


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _metrics(metrics: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """Put each figure together with its interval; null where there is none."""
    return {
        name: {"value": value, "low": metrics.get(f"{name}_low"), "high": metrics.get(f"{name}_high")}
        for name, value in sorted(metrics.items())
        if not is_interval_end(name, metrics)
    }


def _verdicts(body: ApplyBody) -> list[dict[str, Any]]:
    metrics = {**body.metrics, "num_changed_blocks": float(len(body.blocks))}
    return [
        {"name": each.name, "limit": each.limit, "found": each.found, "outcome": each.outcome}
        for each in judge(read_limits(body.policy), metrics)
    ]


def _limits(metrics: Mapping[str, float]) -> Sequence[str]:
    """Choose what is said of the limits of the figures: of texts, single images or classes."""
    return TEXT_LIMITS if TEXTS in metrics else SINGLE_LIMITS if SINGLE in metrics else LIMITS


def _differences(key: str, expected: object, found: object) -> Iterator[tuple[str, str, str]]:
    """Name each value that is another, with its dotted key."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in expected | found:
            inner = f"{key}.{name}" if key else name
            if name not in found or name not in expected:
                yield inner, *(("a value", "none") if name in expected else ("no such key", repr(found[name])))
            else:
                yield from _differences(inner, expected[name], found[name])
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, pair in enumerate(zip(expected, found, strict=True)):
            yield from _differences(f"{key}[{index}]", *pair)
    elif type(expected) is not type(found) or expected != found:
        yield key, repr(expected), repr(found)


def _first_difference(expected: str, found: str) -> int:
    """Find the number of the first line that differs."""
    pairs = zip(expected.split("\n"), found.split("\n"), strict=False)
    same = next((number for number, (a, b) in enumerate(pairs, start=1) if a != b), 0)
    return same or min(expected.count("\n"), found.count("\n")) + 1
