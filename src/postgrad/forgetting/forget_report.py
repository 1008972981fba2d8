"""The report of a run of requests: what was forgotten, kept, undone, and what still leaks."""

import math
from collections.abc import Mapping, Sequence

from postgrad.core.report import Cell, Plot, Section, Series, Table
from postgrad.forgetting.bench import Outcome
from postgrad.forgetting.comparison import Served
from postgrad.forgetting.entries import ApplyBody
from postgrad.forgetting.leakage_audit import Audit
from postgrad.forgetting.leakage_report import RECOVERED, leakage_sections
from postgrad.forgetting.ledger import states
from postgrad.forgetting.ledger_report import limits_table, revocation_notes, verdicts
from postgrad.forgetting.relearn import Relearned
from postgrad.forgetting.sample_audit import Asked, SampleAudit
from postgrad.forgetting.sample_report import sample_sections
from postgrad.forgetting.service import Service


def summary(audits: Sequence[Outcome], service: Service) -> dict[str, Cell]:
    """Give the key figures: means and worst over the requests; those for classes apart from those for single images."""
    whole, single = by_kind(audits)
    rates = {
        name: value for name, value in audits[-1].figures().items() if name in ("acc_r", "acc_r_low", "acc_r_high")
    }
    found: dict[str, Cell] = {}
    if whole:
        tables = [audit.accuracy for audit in whole]
        found |= {"h_mean": sum(table.h for table in tables) / len(tables), "h_worst": min(table.h for table in tables)}
    found |= rates
    if whole:
        found |= _of_classes(whole)
    if single:
        found["acc_excess_worst"] = max(audit.acc_excess.value for audit in single)
        found["mia_excess_worst"] = max((audit.mia_excess.value for audit in single), key=abs)
    found["limits_missed"] = sum(not verdict.passed for _, verdict in verdicts(service.ledger.entries()))
    found["requests_in_use"] = len(service.active)
    return found


def by_kind(audits: Sequence[Outcome]) -> tuple[list[Audit], list[SampleAudit]]:
    """Part audits of requests for classes from those for single images."""
    whole = [audit for audit in audits if isinstance(audit, Audit)]
    return whole, [audit for audit in audits if isinstance(audit, SampleAudit)]


def _of_classes(whole: Sequence[Audit]) -> dict[str, Cell]:
    """Give the key figures of requests for classes."""
    tables, last = [audit.accuracy for audit in whole], whole[-1]
    old = [table.acc_o.value for table in tables if table.acc_o is not None]
    found: dict[str, Cell] = {
        "acc_f_worst": max(table.acc_f.value for table in tables), "acc_o_worst": max(old, default=0.0),
    }  # fmt: skip
    excess = [(audit.knn.excess, audit.probe.excess) for audit in whole]
    if all(knn is not None and probe is not None for knn, probe in excess):
        found["knn_excess_worst"] = max(knn.value for knn, _ in excess if knn is not None)
        found["probe_excess_worst"] = max(probe.value for _, probe in excess if probe is not None)
    found["mia_auc"] = last.membership.auc.value
    ratio = last.relearn(RECOVERED[-1])
    if ratio is not None and not math.isnan(ratio):
        found["relearn_90"] = ratio if math.isfinite(ratio) else "never"
    return found


def forget_sections(
    service: Service,
    audits: Sequence[Outcome],
    others: Sequence[Served],
    references: Sequence[Audit],
    single: Sequence[Asked] = (),
    *,
    names: Sequence[str] = (),
) -> tuple[Section, ...]:
    """Lay the report out: requests, limits, revocations, comparisons, leaks after the last request for classes.

    Args:   references: of that request.  single: the requests for single images, with theirs.  names: of the requests,
            to tell how fast the classes of each are learnt again.
    """
    ours, _ = by_kind(audits)
    entries = service.ledger.entries()
    comparison: list[Section] = [comparison_table(ours, others), comparison_plot(ours, others)] if others else []
    last = [*references, ours[-1], *(served.audits[-1] for served in others)] if ours else []
    return (
        requests_table(service), limits_table(entries), *revocation_notes(entries), *comparison,
        *sample_sections(single), *_relearning(dict(zip(names, audits, strict=False))),
        *(leakage_sections(last) if last else ()),
    )  # fmt: skip


def requests_table(service: Service) -> Table:
    """Show each request: figures in per cent, blocks, steps."""
    state = states(service.ledger.entries())
    rows: list[tuple[Cell, ...]] = []
    for entry in service.ledger.entries():
        if isinstance(entry.body, ApplyBody):
            body, found = entry.body, entry.body.metrics
            rows.append((
                body.request, state[body.request], found["acc_r"], found["acc_r_pretrained"], found["acc_f"],
                found.get("acc_o", "–"), found.get("acc_m", "–"), found.get("h", "–"),
                f"{len(body.blocks)} of {body.num_blocks}", int(found["steps"]),
            ))  # fmt: skip
    columns = ("request", "state", "Acc_r", "before", "Acc_f", "Acc_o", "Acc_m", "H", "blocks changed", "steps")
    note = (
        "Per cent of test images: Acc_r kept classes, Acc_f this request's, Acc_o earlier ones', Acc_m kept classes "
        "without an image to learn from. H is the harmonic mean of Acc_r and what Acc_f lost. Single images' Acc_f is "
        "their own accuracy, which need not be 0."
    )
    return Table("Requests", columns, tuple(rows), note)


def _relearning(audits: Mapping[str, Outcome]) -> list[Section]:
    """Say of each request after how many images its classes are known again, beside gold."""
    rows: list[tuple[Cell, ...]] = []
    for name, audit in audits.items():
        if isinstance(audit, Audit) and audit.relearned is not None:
            before = audit.accuracy.acc_f_pretrained
            cells = [
                _needed(curve, share, before)
                for share in RECOVERED
                for curve in (audit.relearned, audit.relearned_gold)
            ]
            rows.append((name, *cells, audit.relearned.images[-1]))
    columns = ("request", *(f"{who} {share:.0%}" for share in RECOVERED for who in ("to", "gold to")), "shown at most")
    note = (
        "Training images, of forgotten and kept classes, until so much of the accuracy before is back, after each "
        "request. The base needs none. Far fewer than gold needs: the classes were hidden rather than forgotten."
    )
    return [Table("Taught again", columns, tuple(rows), note)] if rows else []


def _needed(curve: Relearned | None, share: float, before: float) -> Cell:
    if curve is None:
        return "–"
    found = curve.images_to(share, before)
    return "more" if found is None else found


def comparison_table(audits: Sequence[Audit], others: Sequence[Served]) -> Table:
    """Set all methods side by side: H after each request, the worst Acc_o, the leaks after the last."""
    rows: list[tuple[Cell, ...]] = []
    for served in (Served(audits[-1].name, tuple(audits)), *others):
        tables = [audit.accuracy for audit in served.audits]
        old = [table.acc_o.value for table in tables if table.acc_o is not None]
        final = served.audits[-1]
        leaks = [part.excess for part in (final.knn, final.probe)]
        rows.append((
            served.name, *(table.h for table in tables), tables[-1].acc_r.value, max(old, default=0.0),
            *("–" if leak is None else leak.value for leak in leaks),
        ))  # fmt: skip
    columns = (
        "method", *(f"H {number}" for number in range(1, len(audits) + 1)), "Acc_r at last", "worst Acc_o",
        "kNN excess", "probe excess",
    )  # fmt: skip
    return Table("Methods on the same requests", columns, tuple(rows))


def comparison_plot(audits: Sequence[Audit], others: Sequence[Served]) -> Plot:
    """Draw H over the requests."""
    lines = [Served(audits[-1].name, tuple(audits)), *others]
    series = tuple(
        Series(
            served.name, tuple(float(i) for i in range(1, len(served.audits) + 1)),
            tuple(audit.accuracy.h for audit in served.audits), dashed=i > 0,
        )
        for i, served in enumerate(lines)
    )  # fmt: skip
    return Plot("H over the requests", "request", "H", series)
