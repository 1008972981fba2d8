"""What a reader should see of leakage audits: a note in plain words, tables of all models, one plot a claim."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from postgrad.core.metrics import Interval
from postgrad.core.sections import Cell, Note, Plot, Section, Series, Table, format_number
from postgrad.forgetting.leakage import Recovery
from postgrad.forgetting.leakage_audit import Audit
from postgrad.forgetting.membership import Separation

NO_GOLD = "no gold reference"
NOT_MEASURED = "not measured"
RECOVERED = (0.5, 0.9)
"""Shares of the original accuracy whose return is timed."""
# In the note: who finds.
_ATTACKS = {
    "knn": "nearest neighbours find",
    "probe": "a linear probe finds",
    "swap": "a head refitted for the forgotten classes finds",
}


def leakage_sections(audits: Sequence[Audit]) -> tuple[Section, ...]:
    """Show the audits of all models, presets and baselines, in the order given; "base" and "gold" may be among them."""
    return (
        leakage_note(audits),
        summary_table(audits),
        attack_table(audits),
        membership_table(audits),
        answers_table(audits),
        *_collateral_tables(audits),
        *leakage_plots(audits),
    )


def leakage_note(audits: Sequence[Audit]) -> Note:
    """Say in plain words what each model still gives away."""
    judged = [audit for audit in audits if audit.name not in ("base", "gold")]
    texts = [_sentence(audit) for audit in judged]
    leaks = any(_leaks(audit) for audit in judged)
    unknown = any(audit.knn.excess is None for audit in judged)
    kind: Literal["warning", "info", "good"] = "warning" if leaks else "info" if unknown or not judged else "good"
    title = "What still leaks" if leaks else "Leaks cannot be judged without gold" if unknown else "No leak found"
    opening = "Gold is a model that never saw the forgotten classes."
    closing = "No attack proves that nothing is left: these are the ones that were tried."
    return Note(title, " ".join([opening, *texts, closing]), kind)


def summary_table(audits: Sequence[Audit]) -> Table:
    """Set what was kept and forgotten beside what leaks, one row a model."""
    columns = (
        "model",
        "Acc_r",
        "Acc_f",
        "H",
        "kNN excess",
        "probe excess",
        "MIA AUC",
        *(f"relearn {share:.0%}" for share in RECOVERED),
        "Streisand AUC",
    )
    rows = tuple(
        (
            audit.name,
            audit.accuracy.acc_r.value,
            audit.accuracy.acc_f.value,
            audit.accuracy.h,
            _excess(audit.knn),
            _excess(audit.probe),
            _text(audit.membership.auc, 3),
            *(_relearn(audit, share) for share in RECOVERED),
            _text(audit.streisand.auc, 3),
        )
        for audit in audits
    )
    note = (
        "Accuracies in per cent; excess over gold in points with 95 % intervals, best 0. MIA AUC: best 0.5. Relearn: "
        "training samples needed over those gold needs, best 1 or more. Streisand AUC: best gold's."
    )
    return Table("What was forgotten, and what leaks", columns, rows, note)


def attack_table(audits: Sequence[Audit]) -> Table:
    """Give the per cent of forgotten test samples each attack on the features recognises."""
    names = {
        "knn": "kNN",
        "knn_alone": "kNN, one class alone",
        "probe": "probe",
        "probe_alone": "probe, one class alone",
        "swap": "head refitted",
    }
    rows: list[tuple[Cell, ...]] = []
    for audit in audits:
        shares = [_text(_recovery(audit, name).share, 1) for name in names]
        rows.append((audit.name, *shares, audit.cka, audit.cosine.value))
    columns = ("model", *names.values(), "CKA to base", "cosine to base")
    note = (
        "Per cent of the forgotten test samples given their class, with 95 % intervals; meaningful only beside gold. "
        "One class alone: no other forgotten class may be answered."
    )
    return Table("Recognised from features", columns, tuple(rows), note)


def membership_table(audits: Sequence[Audit]) -> Table:
    """Give the per cent of forgotten training samples that trained attacks take for members, and the attacks' power."""
    rows: list[tuple[Cell, ...]] = []
    for audit in audits:
        for name, attack in audit.svc.items():
            gold = audit.svc_gold.get(name)
            shown = NO_GOLD if gold is None else _text(gold.members, 1)
            rows.append((audit.name, name, _text(attack.members, 1), shown, _text(attack.power, 1)))
    columns = ("model", "looks at", "taken for members", "gold's", "attack's power")
    note = "In per cent. The power is how often the attack is right about kept samples: at 50 it says nothing."
    return Table("Trained membership attacks", columns, tuple(rows), note)


def answers_table(audits: Sequence[Audit]) -> Table:
    """Compare the answers on forgotten test samples with gold's and with an untrained model's."""
    rows = tuple(
        (
            audit.name,
            _figure(audit.js_gold, NO_GOLD),
            _figure(audit.activation_gold, NO_GOLD),
            _figure(audit.zrf, NOT_MEASURED),
            _difference(audit.streisand),
            _difference(audit.streisand_entropy),
            _difference(audit.membership),
        )
        for audit in audits
    )
    columns = (
        "model",
        "JS to gold",
        "activation distance",
        "ZRF",
        "Streisand AUC over gold, max logit",
        "by entropy",
        "MIA AUC over gold",
    )
    return Table("Answers on forgotten inputs", columns, rows, "JS in nats; 95 % intervals, paired over samples.")


def leakage_plots(audits: Sequence[Audit]) -> tuple[Plot, ...]:
    """Draw one plot a claim; gold is dashed."""
    plots = [
        Plot(
            "Neighbours in feature space find the forgotten classes",
            "neighbours asked",
            "% of forgotten test samples",
            _series(audits, lambda audit: (tuple(audit.knn_curve), tuple(audit.knn_curve.values()))),
            log_x=True,
        ),
        Plot(
            "The loss tells what was trained on",
            "forgotten test samples taken for training samples",
            "forgotten training samples caught",
            _series(audits, lambda audit: audit.member_curve),
            note="The diagonal tells nothing.",
        ),
        Plot(
            "Forgotten inputs stand out",
            "retained inputs flagged",
            "forgotten inputs flagged by a small largest logit",
            _series(audits, lambda audit: audit.outlier_curve),
            note="Best is gold's line: what was never seen stands out a little.",
        ),
    ]
    relearned = [(audit.name, audit.relearned) for audit in audits if audit.relearned is not None]
    if relearned:
        lines = [
            Series(name, tuple(map(float, each.images)), each.accuracy, dashed=name == "gold")
            for name, each in relearned
        ]
        plots.append(Plot("Relearning from a few shots", "training samples seen", "Acc_f in %", tuple(lines)))
    return tuple(plots)


Line = Callable[[Audit], tuple[Sequence[float], Sequence[float]]]


def _series(audits: Sequence[Audit], line: Line) -> tuple[Series, ...]:
    lines = [(audit.name, *line(audit)) for audit in audits]
    return tuple(
        Series(name, tuple(map(float, x)), tuple(map(float, y)), dashed=name == "gold") for name, x, y in lines
    )


def _collateral_tables(audits: Sequence[Audit]) -> list[Table]:
    """List the retained classes that lost most, and those without training data."""
    kinds = {
        "Collateral damage: the retained classes that lost most": [audit.drops for audit in audits],
        "Retained classes without training data": [audit.unseen for audit in audits],
    }
    tables = []
    for title, drops in kinds.items():
        rows: list[tuple[Cell, ...]] = []
        for audit, classes in zip(audits, drops, strict=True):
            rows += [(audit.name, one.label, one.before, one.after, one.drop) for one in classes]
        if rows:
            tables.append(Table(title, ("model", "class", "before", "after", "points lost"), tuple(rows)))
    return tables


def _recovery(audit: Audit, name: str) -> Recovery:
    found: Recovery = vars(audit)[name]
    return found


def _leaks(audit: Audit) -> list[str]:
    """Name in words every attack that surely does better than on gold."""
    leaks = []
    for name, words in _ATTACKS.items():
        found = _recovery(audit, name)
        if found.excess is not None and found.excess.low > 0:
            leaks.append(
                f"{words} {_number(found.share.value)} % of them, {_text(found.excess, 1)} points more than in gold"
            )
    auc = audit.membership.auc
    if auc.low > 0.5 or auc.high < 0.5:
        leaks.append(f"its loss tells training samples of the forgotten classes from others (AUC {_text(auc, 3)})")
    apart = audit.streisand.difference
    if apart is not None and (apart.low > 0 or apart.high < 0):
        more = "more" if apart.low > 0 else "less"
        leaks.append(f"forgotten inputs stand out {more} than in gold (AUC {_text(apart, 3)} from gold's)")
    ratio = audit.relearn(RECOVERED[-1])
    if ratio is not None and ratio < 1:
        leaks.append(f"the classes come back after {ratio:.0%} of the samples gold needs")
    return leaks


def _sentence(audit: Audit) -> str:
    """Write one model's verdict."""
    start = f"{audit.name} names {_number(audit.accuracy.acc_f.value)} % of the forgotten test samples rightly"
    leaks = _leaks(audit)
    if leaks:
        return f"{start}, but {'; '.join(leaks)}."
    if audit.knn.excess is None:
        return (
            f"{start}; neighbours in its features find {_number(audit.knn.share.value)} % of them. Gold might find as "
            "many: without it that says nothing."
        )
    return f"{start}, and no attack surely does better than on gold."


def _text(value: Interval, decimals: int) -> str:
    ends = "" if math.isnan(value.low) else f" ({_number(value.low, decimals)} to {_number(value.high, decimals)})"
    return f"{_number(value.value, decimals)}{ends}"


def _number(value: float, decimals: int = 1) -> str:
    return format_number(value, decimals)


def _excess(found: Recovery) -> str:
    return NO_GOLD if found.excess is None else _text(found.excess, 1)


def _difference(found: Separation) -> str:
    return NO_GOLD if found.difference is None else _text(found.difference, 3)


def _figure(value: float | None, missing: str) -> Cell:
    return missing if value is None else value


def _relearn(audit: Audit, share: float) -> Cell:
    if audit.relearned is None:
        return NOT_MEASURED
    ratio = audit.relearn(share)
    return NO_GOLD if ratio is None else _number(ratio, 2)
