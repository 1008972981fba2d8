"""What a service claims, looked at again: files, base, each adapter loaded, each figure measured anew.

What is particular to a network comes from a `Subject`: of classifiers in anew_classes.py, of detectors in
anew_boxes.py, of language models in anew_texts.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from postgrad.errors import ArtefactError, ModelError
from postgrad.forgetting.entries import ApplyBody, Entry, Finding
from postgrad.forgetting.ledger import Ledger, current_base
from postgrad.forgetting.verification import verify_service


@runtime_checkable
class Subject(Protocol):
    """The base of a service, and what its requests are measured with."""

    def hashes(self) -> dict[str, str]:
        """Hash each tensor of the base."""
        ...

    def classes(self) -> tuple[str, ...]:
        """Name what the base's answers mean."""
        ...

    def show(self, entry: Entry) -> None:
        """Have the network answer as it did right after an entry; nothing is written.

        Raises: ArtefactError, ModelError: an adapter cannot be loaded.
        """
        ...

    def figures(self, entry: Entry) -> Mapping[str, float]:
        """Measure the request that was shown; empty where that cannot be."""
        ...


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What to hold a service against."""

    public_key: Path | None = None
    """PEM file; then the ledger's head and every certificate must be signed."""
    known: Sequence[str] = ()
    """Hashes of entries noted elsewhere."""
    tolerance: float = 1.0
    """Points that a figure may differ; a hundredth of that for figures that are no per cent."""


@dataclass
class Examination:
    """What was found."""

    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, Mapping[str, float]] = field(default_factory=dict)
    """Request -> figures measured anew."""

    @property
    def wrong(self) -> bool:
        """Say whether anything is an error."""
        return any(finding.severity == "error" for finding in self.findings)


def examine(
    folder: Path, subject: Subject | None, expected: Expected, advance: Callable[[], object] = lambda: None
) -> Examination:
    """Check the files and the base; where all is well, load each adapter and measure each request.

    Args: subject: None = neither base nor images are looked at.  advance: called after each piece of work.
    """
    found, tensors = Examination(), None if subject is None else subject.hashes()
    found.findings = verify_service(
        folder, tensors=tensors, public_key=expected.public_key, known=expected.known,
        classes=None if subject is None else subject.classes(),
    )  # fmt: skip
    advance()
    if subject is None or found.wrong:
        return found

    def again(entry: Entry) -> Mapping[str, float]:
        figures = _figures(folder, subject, entry, found)
        advance()
        return figures

    more = verify_service(folder, measure=again, tolerance=expected.tolerance)
    found.findings += [finding for finding in more if finding not in found.findings]
    return found


def _figures(folder: Path, subject: Subject, entry: Entry, found: Examination) -> Mapping[str, float]:
    """Measure a request as it was when it was applied; note an adapter that cannot be loaded.

    None are measured on a base before the one at hand.
    """
    body = entry.body
    assert isinstance(body, ApplyBody), "only requests that were applied are measured"
    if body.base_hash != current_base(Ledger(folder).entries()).base_hash:
        return {}
    try:
        subject.show(entry)
    except (ArtefactError, ModelError) as error:
        found.findings.append(Finding(f"adapters/{body.request}", "adapter", "one that can be loaded", str(error)))
        return {}
    figures = {name: value for name, value in subject.figures(entry).items() if name in body.metrics}
    if figures:
        found.measured[body.request] = figures
    return figures
