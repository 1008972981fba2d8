"""A certificate as a page to read and print: one file, no script, no network, made from the JSON alone."""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

from postgrad.core.sections import format_column, format_number
from postgrad.forgetting.entries import digest

NUM_SHORT = 16
"""Digits of a hash in small lists; the JSON has all."""
MANY_BLOCKS = 48
"""A model of more blocks is not drawn."""
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
"""Not the system's: a page has the same bytes everywhere."""
SYMBOLS = {"met": "✓", "failed": "✗", "not measured": "–"}


class Check(NamedTuple):
    """How a limit of the policy is put in words."""

    question: str
    measure: str
    limit: str
    unit: str


CHECKS = {
    "acc_f_max": Check(
        "Does the model still name what it was to forget?", "accuracy on what was forgotten", "at most", "%"
    ),
    "acc_r_min_drop": Check("Is the rest as good as before?", "loss of accuracy on what is kept", "at most", "points"),
    "acc_o_max": Check("Do earlier requests stay forgotten?", "accuracy on what they forgot", "at most", "%"),
    "mia_auc_band": Check(
        "Can an outsider tell that the data were trained on?",
        "membership attack: distance of its AUC from 0.5",
        "at most",
        "",
    ),
    "knn_excess_max": Check(
        "Do neighbours still find it inside the model?", "above a model that never saw the data", "at most", "points"
    ),
    "probe_excess_max": Check(
        "Does a probe still find it inside the model?", "above a model that never saw the data", "at most", "points"
    ),
    "acc_excess_max": Check(
        "Are these images named more often than unseen ones?",
        "accuracy on them above a model that never saw them, or above unseen images",
        "at most",
        "points",
    ),
    "mia_excess_max": Check(
        "Can an outsider tell that these images were trained on?",
        "membership attack: distance of its AUC from a model's that never saw them, or from 0.5",
        "at most",
        "",
    ),
    "max_blocks": Check("Was little of the model changed?", "blocks changed", "at most", ""),
    "few_shot_min": Check("Were there images enough to work with?", "fewest images of a class", "at least", ""),
}
PAIRS = {
    "acc_f": ("Accuracy on what was forgotten, %", "acc_f_pretrained"),
    "acc_h": ("Accuracy on unseen images of the same classes, %", "acc_h_pretrained"),
    "acc_excess": ("Accuracy on the images, above a model or images unseen, points", ""),
    "acc_r": ("Accuracy on what is kept, %", "acc_r_pretrained"),
    "acc_o": ("Accuracy on what earlier requests forgot, %", ""),
    "ap_f": ("Average precision (AP) on what was forgotten, points", "ap_f_pretrained"),
    "ap_r": ("Average precision (AP) on what is kept, points", "ap_r_pretrained"),
    "ap_o": ("Average precision (AP) on what earlier requests forgot, points", ""),
    "acc_m": ("Accuracy on kept classes without training data, %", ""),
    "mia_auc": ("Membership attack, area under the curve (AUC)", "mia_pretrained"),
    "mia_excess": ("Membership attack, AUC above a model without the data, or 0.5", ""),
    "knn_excess": ("Neighbours find, above a model without the data, points", ""),
    "probe_excess": ("A probe finds, above a model without the data, points", ""),
}
OTHERS = {
    "acc_f_start": "forgotten: accuracy at the start, %",
    "acc_r_start": "kept: accuracy at the start, %",
    "drop": "drop since pretraining, points",
    "drop_start": "drop since the start, points",
    "h": "H, of kept and drop",
    "h_start": "H, of kept and drop since the start",
    "min_shots": "fewest images of a class",
    "num_changed_blocks": "blocks changed",
    "num_earlier": "earlier requests in use",
    "num_old_classes": "classes that those forgot",
    "steps": "training steps",
    "image_passes": "passes of images through the model",
    "ap_f_gold": "their AP in a model that never saw them, points",
    "ap_f_excess": "AP on what was forgotten, above that model's, points",
    "ap_r_gold": "AP of that model on what is kept, points",
    "acc_f_gold": "their accuracy in a model that never saw them, %",
    "mia_gold": "membership attack on a model without the data, AUC",
    "num_single_images": "single images to forget",
    "relearn_50": "training samples to half the accuracy again, over a model without the data",
    "relearn_90": "training samples to 90 % of the accuracy again, over a model without the data",
    "num_target_tokens": "tokens of the answers to forget",
}
"""Names for small print; others are shown as they are recorded."""


def render_certificate(content: Mapping[str, Any], json_hash: str) -> str:
    """Write the page.

    Args:  content: of `certificate`.  json_hash: SHA-256 of the JSON file that belongs to it.
    """
    request = content["request"]["id"]
    style = files("postgrad.forgetting").joinpath("certificate.css").read_text(encoding="utf-8")
    body = "\n".join(
        (
            _header(content),
            _section("Checks", _verdicts(content["verdicts"])),
            _section("What was measured", _metrics(content["metrics"])),
            _section("What was forgotten", _forgotten(content["forgotten"], content["request"])),
            _section("What was changed, and what was not", _changed(content)),
            _section("What this page does not show", _limits(content)),
            _section("How to check this page", _proof(content, json_hash)),
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>Certificate {escape(request)}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _header(content: Mapping[str, Any]) -> str:
    """Say in two sentences what happened, and how it was judged."""
    forgotten, tensors, blocks = content["forgotten"], content["tensors"], content["blocks"]
    moment = datetime.fromisoformat(content["entry"]["time"])
    num_tensors = tensors["num_identical"] + len(tensors["changed"])
    one, many = _unit(forgotten)
    what = _counted(
        ((len(forgotten["classes"]), "class", "classes"), (forgotten["num_samples"], f"single {one}", f"single {many}"))
    )
    base, num_changed = escape(content["run"]["base"]), len(blocks["changed"])
    in_all = f", {_count(forgotten[f'num_{many}'], one, many)} in all" if forgotten["classes"] else ""
    summary = (
        f"On {_day(moment.date())} at {moment:%H:%M} UTC the model <b>{base}</b> was changed so as to forget {what}"
        f"{in_all}. {num_changed:,} of its "
        f"{_count(blocks['num'], 'block', 'blocks')} changed; {tensors['num_identical']:,} of its {num_tensors:,} "
        "tensors are, bit for bit, what they were."
    )
    tone, verdict = _overall([each["outcome"] for each in content["verdicts"]])
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in _facts(content))
    return (
        f'<header>\n<p class="kicker">Certificate of forgetting</p>\n'
        f"<h1>Request {escape(content['request']['id'])}</h1>\n"
        f'<p class="verdict {tone}">{escape(verdict)}</p>\n'
        f'<p class="summary">{summary}</p>\n<dl class="facts">{facts}</dl>\n</header>'
    )


def _unit(forgotten: Mapping[str, Any]) -> tuple[str, str]:
    """Say what the data are counted in, one and many."""
    return ("row", "rows") if "num_rows" in forgotten else ("image", "images")


def _facts(content: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """List what a reader looks for first."""
    request, entry = content["request"], content["entry"]
    yield "Legal basis", request["legal_basis"] or "not stated"
    yield "Carried out", _day(date.fromisoformat(entry["time"][:10]))
    kept = "kept" if entry["time"][:10] <= request["deadline"] else "missed"
    yield "Deadline", f"{_day(date.fromisoformat(request['deadline']))}, {kept}" if request["deadline"] else "none"
    requester = request["requester_hash"]
    yield "Asked by", f"{requester[:NUM_SHORT]}…" if requester else "not recorded"


def _overall(outcomes: Sequence[str]) -> tuple[str, str]:
    """Sum the verdicts up; what was not measured is said."""
    num, failed, unknown = len(outcomes), outcomes.count("failed"), outcomes.count("not measured")
    rest = f", {unknown} not measured" if unknown else ""
    if failed:
        return "bad", f"{failed} of {_count(num, 'check', 'checks')} failed{rest}"
    if unknown:
        return "open", f"{num - unknown} of {_count(num, 'check', 'checks')} met{rest}"
    return "good", f"All {_count(num, 'check', 'checks')} met"


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> str:
    rows = [_verdict_row(each, CHECKS[each["name"]]) for each in verdicts]
    return _table(("", "Check", "Limit", "Found"), rows, "checks")


def _verdict_row(verdict: Mapping[str, Any], check: Check) -> tuple[str, ...]:
    outcome = verdict["outcome"]
    found = "not measured" if verdict["found"] is None else _figure(verdict["found"], check.unit)
    tone = {"met": "good", "failed": "bad"}.get(outcome, "open")
    return (
        f'<span class="mark {tone}" title="{escape(outcome)}">{SYMBOLS[outcome]}</span>',
        f"{escape(check.question)}<small>{escape(check.measure)}</small>",
        f"{check.limit} {_figure(verdict['limit'], check.unit)}",
        f'<b class="{tone}">{escape(found)}</b>',
    )


def _metrics(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Set the figures with a meaning of their own in a table, and list the others below."""
    used = {other for name, (_, other) in PAIRS.items() if name in metrics and other}
    rows = [_metric_row(name, metrics) for name in PAIRS if name in metrics]
    others = [name for name in metrics if name not in PAIRS and name not in used]
    labels = {name: escape(OTHERS.get(name, name.replace("_", " "))) for name in others}
    listed = "".join(
        f"<div><dt>{label}</dt><dd>{_figure(metrics[name]['value'])}</dd></div>" for name, label in labels.items()
    )
    table = _table(("Figure", "Before", "After", "95 % interval"), rows, "figures") if rows else ""
    none = "" if metrics else "<p>Nothing was measured.</p>"
    more = '<p class="note">All other figures on record; their intervals are in the JSON.</p>\n' if listed else ""
    return none + table + more + (f'<dl class="others">{listed}</dl>' if listed else "")


def _metric_row(name: str, metrics: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    label, before = PAIRS[name]
    figure = metrics[name]
    ends = [each for each in (figure["low"], figure["high"]) if each is not None]
    if before not in metrics and not ends:
        return escape(label), "", _figure(figure["value"]), ""
    cells = [metrics[before]["value"] if before in metrics else "", figure["value"], *ends]
    texts = format_column([float(each) if each != "" else "" for each in cells])
    return escape(label), texts[0], texts[1], " to ".join(texts[2:])


def _forgotten(forgotten: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """Identify the data without showing them."""
    rows = [
        (f"class {escape(each['name']) or f'no. {number}'}", _hash(each["fingerprint"]))
        for number, each in enumerate(forgotten["classes"], start=1)
    ]
    one, many = _unit(forgotten)
    rows.append((_count(forgotten[f"num_{many}"], one, many), _hash(forgotten["manifest_hash"])))
    shots = f"at most {request['shots']} of each class" if request["shots"] else "all there are"
    note = (
        "Salted SHA-256 fingerprints. Whoever holds the request's file, with its secret salt, can make them again from "
        f"the names and {many}; nobody else can tell what they stand for. {many.capitalize()} worked with: {shots}. "
        f"{_count(forgotten[f'num_retained_{many}'], one, many)} held the rest in place."
    )
    return _table(("", "Fingerprint"), rows, "hashes") + f'<p class="note">{escape(note)}</p>'


def _changed(content: Mapping[str, Any]) -> str:
    """Draw the blocks, name the changed tensors, and list the unchanged ones by part of the model."""
    blocks, tensors = content["blocks"], content["tensors"]
    names = ", ".join(blocks["changed"]) or "none"
    changed = ", ".join(tensors["changed"]) or "none"
    parts = "".join(
        f"<div><dt>{escape(part)}</dt><dd>{len(hashes)}</dd><dd><code>{digest(hashes)[:NUM_SHORT]}</code></dd></div>"
        for part, hashes in _parts(tensors["identical"]).items()
    )
    return (
        f"{_strip(blocks)}<p>Changed blocks: <b>{escape(names)}</b>. An adapter beside them changes the effect of "
        f"{_count(len(tensors['changed']), 'tensor', 'tensors')}: <code>{escape(changed)}</code>.</p>\n"
        f'<p class="note">{_count(tensors["num_identical"], "tensor is", "tensors are")} bit for bit what they were. '
        f"Their list has the hash {_hash(tensors['identical_hash'])}. By part of the model, their number and the first "
        f'digits of their hash; the JSON lists each.</p>\n<dl class="parts">{parts}</dl>'
    )


def _strip(blocks: Mapping[str, Any]) -> str:
    """Draw one square a block, the changed ones filled; nothing when their places are not plain."""
    numbers = [[int(part) for part in name.split(".") if part.isdecimal()] for name in blocks["changed"]]
    places = {each[0] for each in numbers if len(each) == 1}
    if len(places) < len(numbers) or blocks["num"] > MANY_BLOCKS or any(place >= blocks["num"] for place in places):
        return ""
    squares = "".join(
        f'<li class="{"changed" if place in places else "same"}">{place}</li>' for place in range(blocks["num"])
    )
    return f'<ol class="strip" aria-label="blocks of the model, changed ones filled">{squares}</ol>\n'


def _parts(hashes: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Sort tensors by the part of the model they are in: up to the first number in the name, or all but its end."""
    parts: dict[str, dict[str, str]] = {}
    for name, value in hashes.items():
        numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
        part = numbered.group() if numbered else name.rpartition(".")[0] or name
        parts.setdefault(part, {})[name] = value
    return dict(sorted(parts.items(), key=lambda item: [(not p.isdecimal(), p.zfill(6)) for p in item[0].split(".")]))


def _limits(content: Mapping[str, Any]) -> str:
    missing = [each["name"] for each in content["verdicts"] if each["outcome"] == "not measured"]
    items = list(content["limits"])
    if {"knn_excess_max", "probe_excess_max"} <= set(missing):
        items.insert(
            2, "No model that never saw the data was at hand, so what is still found inside has no measure here."
        )
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _proof(content: Mapping[str, Any], json_hash: str) -> str:
    """List the hashes that tie the page to the ledger, and what to do with them."""
    entry, run, name = content["entry"], content["run"], content["request"]["id"]
    rows = [
        (f"{escape(name)}.json", _hash(json_hash)),
        (f"ledger, entry {entry['index']}", _hash(entry["hash"])),
        ("entry before it", _hash(entry["previous"])),
        ("request", _hash(content["request"]["hash"])),
        ("base model", _hash(run["base_hash"])),
        ("settings", _hash(run["config_hash"])),
        *((escape(file), _hash(value)) for file, value in content["adapter_files"].items()),
    ]
    how = (
        "Compare the first two hashes with those of the files: a page that does not carry them is another page. "
        "postgrad's verification of the service folder makes every hash and this page again. A file "
        f"<code>{escape(name)}.json.sig</code> is an Ed25519 signature of the JSON: "
        f"<code>openssl pkeyutl -verify -pubin -inkey key.pem -rawin -in {escape(name)}.json -sigfile "
        f"{escape(name)}.json.sig</code>"
    )
    made = f"postgrad {run['code_version']}, seed {run['seed']}, {run['hardware']}"
    return _table(("SHA-256 of", ""), rows, "hashes") + f'<p class="note">{how}</p>\n<p class="note">{escape(made)}</p>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> str:
    """Write a table of cells that are HTML."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'


def _hash(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _figure(value: float, unit: str = "") -> str:
    """Write a figure in four digits at most, with its unit."""
    small = 0 < abs(value) < 1e-3
    text = format_number(float(value), None) if small else f"{value:,.4g}".replace("-", "−")
    text = f"{value:,.0f}".replace("-", "−") if abs(value) >= 1e4 else text
    return text + (f" {'point' if (unit, text) == ('points', '1') else unit}" if unit else "")


def _count(num: int, one: str, many: str) -> str:
    return f"{num:,} {one if num == 1 else many}"


def _counted(counts: Iterable[tuple[int, str, str]]) -> str:
    return " and ".join(_count(num, one, many) for num, one, many in counts if num) or "nothing"


def _day(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"
