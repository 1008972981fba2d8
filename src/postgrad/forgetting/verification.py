"""Everything about a service folder that can be checked again, on any machine.

Without a model: the ledger and its chain, the states, base.json, the adapters' files, the certificates, and what lacks
an entry or a file. With the base's tensors: that the model at hand is the one on record and holds no pair of an
adapter, which would be merged a second time. With a function that measures: that the figures come out as recorded.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from postgrad.core.sections import Note, Section, Table
from postgrad.errors import ArtefactError
from postgrad.forgetting.certificate import check_certificate
from postgrad.forgetting.entries import ApplyBody, Entry, Finding, digest
from postgrad.forgetting.ledger import BASE, HEAD, LEDGER, BaseState, Ledger, current_base
from postgrad.forgetting.policy import JUDGED
from postgrad.forgetting.signature import verify_file

Measure = Callable[[Entry], Mapping[str, float]]
"""Measures a request anew, with the adapters that were in use when it was applied."""
PAIR = re.compile(r"(^|\.)lora_[AB](\.|$)")
"""In the names of an adapter's matrices."""
PER_CENT = re.compile(r"(acc|ap|h)(_|$)")
"""In the names of figures in per cent."""
UNMEASURED = "no measurement"
"""What is found where nobody measured a figure again."""
NUM_LISTED = 20
"""Tensors that are reported one by one."""


def verify_service(
    folder: Path,
    *,
    tensors: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    measure: Measure | None = None,
    tolerance: float = 0.0,
    public_key: Path | None = None,
    known: Sequence[str] = (),
) -> list[Finding]:
    """Check a service folder and list what is wrong; nothing is written.

    Args:
        tensors: name -> SHA-256 of each tensor of the base model at hand.  classes: what its answers mean.
        measure: gives the figures of a request; those that both it and the ledger have are compared.
        tolerance: how far a figure may differ, as another machine's arithmetic does: points of those in per cent, of
            others a hundredth of it.
        public_key: PEM file; then the head of the ledger and every certificate must be signed.
        known: hashes of entries noted elsewhere, as on a printed certificate; each must be in the ledger.
    """
    ledger = Ledger(folder)
    findings = ledger.problems()
    try:
        entries = ledger.entries()
        base = current_base(entries)
    except ArtefactError as error:
        # With a ledger that cannot be relied on, nothing can be compared.
        return findings or [Finding(LEDGER, "entries", "entries that follow from one another", str(error))]
    applied = {entry.body.request: entry for entry in entries if isinstance(entry.body, ApplyBody)}
    hashes = {entry.hash for entry in entries}
    findings += [Finding(LEDGER, "entries", f"the entry {each}", "none") for each in known if each not in hashes]
    record = _read_base(folder, base)
    if isinstance(record, Finding):
        findings.append(record)
    else:
        findings += [*_check_base(record, base, entries, tensors), *_check_classes(record, classes)]
    findings += _check_adapters(folder, applied)
    findings += _check_certificates(folder, applied)
    if public_key is not None:
        findings += _check_signatures(folder, applied, public_key)
    if measure is not None:
        findings += [each for entry in applied.values() for each in _check_metrics(entry, measure(entry), tolerance)]
    return findings


def hash_files(folder: Path) -> dict[str, str]:
    """Hash every file in a folder and below: relative name -> SHA-256, as `ApplyBody.adapter_files` records them.

    Raises:  ArtefactError: a link, which may lead elsewhere tomorrow.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ArtefactError(f"{path}: expected a file, found a link. Put the file itself there.")
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def findings_section(findings: Sequence[Finding]) -> Section:
    """Show the findings, or that there are none."""
    if not findings:
        return Note("Everything is as recorded", "Ledger, base, adapters and certificates agree.", "good")
    rows = tuple((each.severity, each.place, each.field, each.expected, each.found) for each in findings)
    return Table("What is not as recorded", ("", "where", "what", "expected", "found"), rows)


def _read_base(folder: Path, base: BaseState) -> dict[str, Any] | Finding:
    """Read base.json when its bytes are those on record."""
    path = folder / BASE
    if not path.is_file():
        return Finding(BASE, "file", "the record of the base", "none")
    data = path.read_bytes()
    actual = hashlib.sha256(data).hexdigest()
    if actual != base.record_hash:
        return Finding(BASE, "bytes", f"SHA-256 {base.record_hash}, as in {LEDGER}", actual)
    record: dict[str, Any] = json.loads(data)
    return record


def _check_base(
    record: Mapping[str, Any], base: BaseState, entries: Sequence[Entry], tensors: Mapping[str, str] | None
) -> Iterator[Finding]:
    """Compare base.json with the ledger, and the model at hand with base.json."""
    recorded: dict[str, str] = record["tensors"]
    if digest(recorded) != base.base_hash:
        yield Finding(BASE, "tensors", f"hash {base.base_hash}, as in {LEDGER}", digest(recorded))
    yield from _pairs(BASE, recorded)
    for entry in entries:
        if isinstance(entry.body, ApplyBody) and entry.body.base_hash == base.base_hash:
            yield from _check_identical(entry.index, entry.body, recorded)
    if tensors is None:
        return
    yield from _pairs("base model", tensors)
    different = [name for name in sorted({**recorded, **tensors}) if recorded.get(name) != tensors.get(name)]
    for name in different[:NUM_LISTED]:
        yield Finding("base model", name, recorded.get(name, "no such tensor"), tensors.get(name, "none"))
    if len(different) > NUM_LISTED:
        more = f"{len(different) - NUM_LISTED} more that differ"
        yield Finding("base model", "tensors", f"the {len(recorded)} on record", more)


def _check_classes(record: Mapping[str, Any], classes: Sequence[str] | None) -> Iterator[Finding]:
    """Compare what the answers of the model at hand mean with what they meant: no weight tells of names exchanged."""
    if classes is not None and list(classes) != record["classes"]:
        yield Finding("base model", "classes", ", ".join(record["classes"]), ", ".join(classes))


def _pairs(place: str, names: Iterable[str]) -> Iterator[Finding]:
    """Find what is left of an adapter in a base: with the change merged in, it would be added twice."""
    for name in names:
        if PAIR.search(name):
            yield Finding(place, name, "a base without adapters", "a matrix of an adapter, to be merged twice")


def _check_identical(index: int, body: ApplyBody, recorded: Mapping[str, str]) -> Iterator[Finding]:
    """Hold the tensors that a request left alone against the base."""
    place = f"{LEDGER}, entry {index} (apply)"
    for name in body.tensors:
        if name not in recorded:
            yield Finding(place, "body.tensors", "tensors of the base", name)
    identical = {name: value for name, value in recorded.items() if name not in body.tensors}
    if (digest(identical), len(identical)) != (body.identical_hash, body.num_identical):
        expected = f"{len(identical)} tensors of hash {digest(identical)}"
        yield Finding(place, "body.identical_hash", expected, f"{body.num_identical} of hash {body.identical_hash}")


def _check_adapters(folder: Path, applied: Mapping[str, Entry]) -> Iterator[Finding]:
    """Compare each request's folder with its entry, file by file."""
    place = folder / "adapters"
    present = {path.name for path in place.iterdir()} if place.is_dir() else set()
    for name in sorted(present - applied.keys()):
        yield Finding(f"adapters/{name}", "entry", f"an entry in {LEDGER} that applies it", "none")
    for name, entry in applied.items():
        if not (place / name).is_dir():
            yield Finding(f"adapters/{name}", "folder", f"the files of entry {entry.index}", "none")
            continue
        try:
            found = hash_files(place / name)
        except ArtefactError as error:
            yield Finding(f"adapters/{name}", "files", "files", str(error))
            continue
        assert isinstance(entry.body, ApplyBody), "only entries that apply are asked for"
        expected = entry.body.adapter_files
        for file in sorted({**expected, **found}):
            if expected.get(file) != found.get(file):
                on_record = f"SHA-256 {expected[file]}" if file in expected else "no such file"
                yield Finding(f"adapters/{name}", file, on_record, found.get(file, "none"))


def _check_certificates(folder: Path, applied: Mapping[str, Entry]) -> Iterator[Finding]:
    """Make each certificate again, and find those of no request."""
    for entry in applied.values():
        yield from check_certificate(folder, entry)
    place = folder / "certificates"
    known = {f"{name}{end}" for name in applied for end in (".json", ".html", ".json.sig", ".html.sig")}
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        leftover = path.name.startswith(".") and path.suffix == ".tmp"  # of a killed writer
        if path.name not in known and not leftover:
            yield Finding(f"certificates/{path.name}", "entry", f"an entry in {LEDGER} that applies it", "none")


def _check_signatures(folder: Path, applied: Mapping[str, Entry], public_key: Path) -> Iterator[Finding]:
    """Check the signature of the ledger's head and of each certificate."""
    for name in (HEAD, *(f"certificates/{request}.json" for request in applied)):
        try:
            verify_file(folder / name, public_key)
        except ArtefactError as error:
            yield Finding(name, "signature", f"a signature by {public_key.name}", str(error))


def _check_metrics(entry: Entry, found: Mapping[str, float], tolerance: float) -> Iterator[Finding]:
    """Compare figures measured anew; warn of those that the policy judges and nobody measured again."""
    assert isinstance(entry.body, ApplyBody), "only entries that apply are asked for"
    place, recorded = f"{LEDGER}, entry {entry.index} (apply)", entry.body.metrics
    for name, value in found.items():
        allowed = tolerance if PER_CENT.match(name) else tolerance / 100
        if name not in recorded:
            yield Finding(place, f"body.metrics.{name}", f"{value!r}, measured anew", "none")
        elif not abs(value - recorded[name]) <= allowed:  # a NaN differs
            expected = f"{value!r}, measured anew, give or take {allowed:g}"
            yield Finding(place, f"body.metrics.{name}", expected, repr(recorded[name]))
    for name in recorded:
        if name in JUDGED and name not in found:
            yield Finding(place, f"body.metrics.{name}", "the figure measured anew", UNMEASURED, "warning")
