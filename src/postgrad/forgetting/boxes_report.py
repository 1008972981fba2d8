"""What a detector's requests did, in numbers: average precision of classes forgotten, kept, and forgotten earlier.

AP is COCO's, in points of 100, on the test images that show a class of the group: its mean over the group's classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from postgrad.core.report import Cell, Note, Plot, Section, Series, Table
from postgrad.forgetting.average_precision import Boxes, class_precision, present, split_precision
from postgrad.forgetting.boxes import BoxSet
from postgrad.forgetting.detector import Detector
from postgrad.forgetting.entries import ApplyBody, Finding
from postgrad.forgetting.ledger_report import limits_table, revocation_notes, verdicts
from postgrad.forgetting.metrics import h_mean
from postgrad.forgetting.network_service import NetworkService
from postgrad.forgetting.schedules import TaskSplit
from postgrad.forgetting.states import states
from postgrad.forgetting.verification import findings_section

LIMITS_NOTE = "Limits of accuracy are held against AP. Attacks on members are not measured for detectors."
NO_GOLD = "no gold reference"
FOUND = {
    "ap_f": "AP", "knn": "neighbours", "knn_alone": "neighbours, its class alone", "probe": "linear probe",
    "probe_alone": "linear probe, its class alone",
}  # fmt: skip
"""What is asked for forgotten objects."""
SHOWN = ("ap_r", "ap_r_pretrained", "ap_f", "ap_f_pretrained", "ap_o", "h")


@dataclass(frozen=True, eq=False)
class Found:
    """What a detector finds on test images, and what is there."""

    boxes: Sequence[Boxes]
    there: Sequence[Boxes]

    def of_groups(self, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """Give the AP of groups of classes, each on the images that show one of it; a group without any is left out."""
        found = split_precision(self.boxes, self.there, groups)
        return {name: 100.0 * value for name, value in found.items() if value is not None}

    @cached_property
    def of_classes(self) -> dict[int, float]:
        """Give the AP of each class that is there, on all images."""
        labels = sorted({int(label) for boxes in self.there for label in boxes.labels})
        return {label: 100.0 * (class_precision(self.boxes, self.there, label) or 0.0) for label in labels}


def look(detector: Detector, boxes: BoxSet) -> Found:
    """Have a detector find the objects on test images."""
    return Found(detector.find(boxes), present(boxes.targets))


def precisions(before: Found, after: Found, split: TaskSplit, gold: Found | None = None) -> dict[str, float]:
    """Give AP_r, AP_f, AP_o, the same of the base and gold, and H; what no test image shows is left out."""
    found = after.of_groups({"ap_r": split.remain, "ap_f": split.forget, "ap_o": split.old})
    found |= before.of_groups({"ap_r_pretrained": split.remain, "ap_f_pretrained": split.forget})
    if {"ap_r", "ap_f"} <= found.keys():
        found["h"] = h_mean(found["ap_r"], found["ap_f_pretrained"] - found["ap_f"])
    if gold is not None:
        found |= gold.of_groups({"ap_r_gold": split.remain, "ap_f_gold": split.forget})
        found |= {"ap_f_excess": found["ap_f"] - found["ap_f_gold"]} if "ap_f" in found else {}
    return found


def applied(service: NetworkService) -> list[ApplyBody]:
    """List what was applied, in order."""
    return [entry.body for entry in service.ledger.entries() if isinstance(entry.body, ApplyBody)]


def summary(service: NetworkService, before: Found, after: Found) -> dict[str, Cell]:
    """Give the key figures: of the requests one by one, and of the detector as it is now."""
    bodies = applied(service)
    gone = service.labels(service.forgotten)
    kept = [label for label in after.of_classes if label not in gone]
    found: dict[str, Cell] = {}
    worst = (("h", min), *((name, max) for name in ("ap_f", "ap_o", "ap_f_excess", "knn_excess", "probe_excess")))
    for name, choose in worst:
        values = [body.metrics[name] for body in bodies if name in body.metrics]
        if values:
            found[f"{name}_worst"] = choose(values)
    found |= {**after.of_groups({"ap_r": kept}), **before.of_groups({"ap_r_base": kept})}
    judged = verdicts(service.ledger.entries())
    found["limits_failed"] = sum(verdict.outcome == "failed" for _, verdict in judged)
    found["requests_in_use"] = len(service.active)
    return found


def boxes_sections(
    service: NetworkService, before: Found, after: Found, findings: Sequence[Finding]
) -> tuple[Section, ...]:
    """Lay the report out: requests, AP over them, classes, limits, revocations, and what is not as recorded."""
    bodies = applied(service)
    parts: list[Section] = [requests_table(service)] if bodies else []
    parts += [precision_plot(bodies)] if len(bodies) > 1 else []
    parts += [classes_table(service, before, after)]
    parts += [leak_note(bodies), leak_table(bodies)] if bodies else []
    entries = service.ledger.entries()
    parts += [limits_table(entries, LIMITS_NOTE)] if bodies else []
    return (*parts, *revocation_notes(entries, "detector"), findings_section(findings))


def requests_table(service: NetworkService) -> Table:
    """Show each request."""
    state = states(service.ledger.entries())
    rows = tuple(
        (
            body.request, state[body.request],
            *(body.metrics.get(name, "–") for name in SHOWN),
            f"{len(body.blocks)} of {body.num_blocks}", int(body.metrics["steps"]),
        )
        for body in applied(service)
    )  # fmt: skip
    columns = ("request", "state", "AP_r", "before", "AP_f", "before", "AP_o", "H", "blocks changed", "steps")
    note = (
        "COCO's AP of test images, in points: AP_r kept classes, AP_f this request's, AP_o earlier ones'; before: of "
        "the base. H is the harmonic mean of AP_r and what AP_f lost."
    )
    return Table("Requests", columns, rows, note)


def precision_plot(bodies: Sequence[ApplyBody]) -> Plot:
    """Draw AP over the requests, and the base's of the kept classes beside it."""
    lines = (("AP_r", "ap_r", False), ("AP_r of the base", "ap_r_pretrained", True), ("AP_f", "ap_f", False),
             ("AP_f of the base", "ap_f_pretrained", True), ("AP_o", "ap_o", False))  # fmt: skip
    series = []
    for title, name, dashed in lines:
        points = [(float(i), body.metrics[name]) for i, body in enumerate(bodies, 1) if name in body.metrics]
        if points:
            x, y = zip(*points, strict=True)
            series.append(Series(title, tuple(x), tuple(y), dashed=dashed))
    return Plot("AP over the requests", "request", "AP", tuple(series))


def leak_note(bodies: Sequence[ApplyBody]) -> Note:
    """Say in plain words what is surely found more often than in gold."""
    opening = "Gold is a detector that never saw an image of the forgotten classes."
    leaks = [
        f"{FOUND[name]} finds {body.metrics[f'{name}_excess']:.1f} points more after {body.request}"
        for body in bodies
        for name in FOUND
        if body.metrics.get(f"{name}_excess_low", 0.0) > 0
    ]
    closing = "No attack proves that nothing is left: these are the ones that were tried."
    if leaks:
        return Note("What still leaks", f"{opening} Above it, {'; '.join(leaks)}. {closing}", "warning")
    if not all("knn_excess" in body.metrics for body in bodies):
        text = f"{opening} There is none for every request: what is found below may be no more than it would show."
        return Note("Leaks cannot be judged without gold", text)
    return Note("No leak found", f"{opening} Nothing is surely found more often than in gold. {closing}", "good")


def leak_table(bodies: Sequence[ApplyBody]) -> Table:
    """Show what is still found of forgotten objects, beside base and gold."""
    rows = []
    for body in bodies:
        for name, title in FOUND.items():
            now = name if name in body.metrics else f"{name}_found"
            if now in body.metrics:
                base, gold = (body.metrics.get(f"{name}_{end}", NO_GOLD) for end in ("pretrained", "gold"))
                rows.append((body.request, title, body.metrics[now], base, gold, _excess(body, name)))
    note = (
        "Of test objects of the request's classes: AP in points; per cent that neighbours or a linear probe on the "
        "decoder's embeddings give their class, the place of each object being known. Alone: no other forgotten class "
        "may be answered. Excess over gold in points, with 95 % intervals; best 0."
    )
    columns = ("request", "asked", "found", "of the base", "of gold", "excess")
    return Table("What is still found of forgotten objects", columns, tuple(rows), note)


def _excess(body: ApplyBody, name: str) -> str:
    value, low, high = (body.metrics.get(f"{name}_excess{end}") for end in ("", "_low", "_high"))
    if value is None:
        return NO_GOLD
    return f"{value:.1f}" if low is None else f"{value:.1f} ({low:.1f} to {high:.1f})"


def classes_table(service: NetworkService, before: Found, after: Found) -> Table:
    """Show every class: of the base, and of the detector with the requests in use."""
    by_label = {label: name for name in service.forgotten for label in service.labels([name])}
    was, now = before.of_classes, after.of_classes
    order = sorted(now, key=lambda label: (label not in by_label, now[label] - was[label]))
    rows = tuple((service.classes[label], by_label.get(label, "kept"), was[label], now[label]) for label in order)
    note = "On all test images. Forgotten classes first, then those that lost most."
    return Table("Classes", ("class", "request", "AP of the base", "AP now"), rows, note)
