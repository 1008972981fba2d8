"""The report of unlearning: what is gone, what stayed, whether it shows, which blocks changed, what is on record."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from postgrad.core.metrics import paired_difference, wilson_interval
from postgrad.core.report import Cell, Note, Section, Table
from postgrad.forgetting.entries import Finding
from postgrad.forgetting.membership import Separation, loss_sides, separation
from postgrad.forgetting.text_measures import Known
from postgrad.forgetting.text_metrics import forget_quality, model_utility
from postgrad.forgetting.text_rows import NAMES
from postgrad.forgetting.unlearn_steps import Outcome
from postgrad.forgetting.verification import findings_section

AREAS: dict[Literal["loss", "greedy"], str] = {"loss": "mia_auc", "greedy": "greedy_auc"}
Parts = Mapping[str, Known]


class Tried(NamedTuple):
    """What another objective made of the same rows."""

    parts: Parts
    outcome: Outcome


class Record(NamedTuple):
    """What the service says."""

    undone: bool
    """Whether without its adapter the model answers bit for bit as before."""
    findings: Sequence[Finding]


@dataclass(frozen=True, eq=False)
class Found:
    """What models make of the rows, by part: forget, retain and, where there are such, held_out, earlier and others."""

    before: Parts
    after: Parts
    gold: Parts
    """Empty without a gold model."""
    outcome: Outcome
    num_earlier: int
    """Requests in use before this one."""

    @property
    def models(self) -> dict[str, Parts]:
        """Name the models."""
        named = {"before": self.before, "after": self.after, "gold": self.gold}
        return {name: rows for name, rows in named.items() if rows}

    def separations(self, by: Literal["loss", "greedy"]) -> dict[str, Separation]:
        """Say for each model how well rows to forget and rows never seen can be told apart."""
        return separations(self.models, by)

    def quality(self, parts: Parts) -> float | None:
        """Give TOFU's forget quality; None without gold or wrong answers."""
        return quality(parts, self.gold)


def separations(models: Mapping[str, Parts], by: Literal["loss", "greedy"]) -> dict[str, Separation]:
    """Say for each model how well rows to forget and rows never seen can be told apart; nothing without the latter.

    Args: by: the loss a token, or the share of tokens that are the likeliest ones.
    """
    sides = {}
    for name, rows in models.items():
        if "held_out" in rows:
            both = [rows[part].measured for part in ("forget", "held_out")]
            sides[name] = loss_sides(*(each.means if by == "loss" else -each.known for each in both))
    return {name: separation(each, sides.get("gold")) for name, each in sides.items()}


def quality(parts: Parts, gold: Parts) -> float | None:
    """Give TOFU's forget quality; None without gold or wrong answers."""
    if not gold or not gold["forget"].offered:
        return None
    return forget_quality(parts["forget"].ratios, gold["forget"].ratios)


def utility(parts: Parts) -> float:
    """Give TOFU's model utility: over rows to keep, and files of other rows where there are some."""
    kept = {name: known for name, known in parts.items() if name not in ("forget", "held_out", "earlier")}
    figures = [known.figures(options=name != "retain") for name, known in kept.items()]
    return model_utility([value for each in figures for value in each.values()])


def recorded(found: Found) -> dict[str, float]:
    """Give the figures that the ledger and the certificate hold."""
    counts = {"num_earlier": float(found.num_earlier), "steps": float(found.outcome.steps)}
    return {**measured(found.before, found.after, found.gold), **counts}


def measured(before: Parts, after: Parts, gold: Parts) -> dict[str, float]:
    """Give the figures of one model beside another; accuracy is the share of answers recited."""
    figures: dict[str, float] = {"num_target_tokens": float(after["forget"].measured.tokens.sum())}
    for key, part in (("acc_f", "forget"), ("acc_r", "retain"), ("acc_o", "earlier")):
        if part in after:
            now, was = after[part].measured, before[part].measured
            share = wilson_interval(now.num_recited, len(now.tokens))
            figures |= {key: now.recited, f"{key}_low": 100 * share.low, f"{key}_high": 100 * share.high}
            figures[f"{key}_pretrained"] = was.recited
    area = separations({"after": after}, "loss").get("after")
    if area is not None:
        figures |= {"mia_auc": area.auc.value, "mia_auc_low": area.auc.low, "mia_auc_high": area.auc.high}
    for part in ("forget", "retain"):
        now, was = after[part].measured, before[part].measured
        figures |= {f"{part}_loss": now.loss, f"{part}_loss_before": was.loss}
    for part in ("forget", "retain"):
        each = after[part].figures(forgotten=part == "forget")
        figures |= {f"{part}_{name}": value for name, value in each.items()}
    good = quality(after, gold)
    figures |= {} if good is None else {"forget_quality": good}
    return {**figures, "model_utility": utility(after), "model_utility_before": utility(before)}


def summary(found: Found, record: Record) -> dict[str, Cell]:
    """Give the key figures: losses in nats a token, recited and greedy in per cent, TOFU's from 0 to 1."""
    before, after = found.before, found.after
    results: dict[str, Cell] = {}
    for part, known in after.items():
        models = {"": known, "_before": before[part], **({"_gold": found.gold[part]} if found.gold else {})}
        results |= {f"{part}_loss{end}": each.measured.loss for end, each in models.items()}
        if part in ("forget", "retain"):
            results |= {f"{part}_recited{end}": each.measured.recited for end, each in models.items()}
            own = known.figures(forgotten=part == "forget")
            results |= {f"{part}_{name}": value for name, value in own.items()}
    results["forget_extraction"] = after["forget"].extraction
    rise = paired_difference(after["retain"].measured.means.numpy(), before["retain"].measured.means.numpy())
    results["retain_rise"] = rise.value
    if math.isfinite(rise.low):
        results |= {"retain_rise_low": rise.low, "retain_rise_high": rise.high}
    for end, parts in (("", after), ("_before", before), ("_gold", found.gold)):
        results |= {f"model_utility{end}": utility(parts)} if parts else {}
        good = found.quality(parts) if parts and end != "_gold" else None
        results |= {} if good is None else {f"forget_quality{end}": good}
    for by, key in AREAS.items():
        for name, each in found.separations(by).items():
            end = "" if name == "after" else f"_{name}"
            results[f"{key}{end}"] = each.auc.value
            results |= {f"{key}_low": each.auc.low, f"{key}_high": each.auc.high} if not end else {}
    norms = found.outcome.norms
    return {
        **results, "blocks_changed": sum(norm > 0 for norm in norms.values()), "blocks": len(norms),
        "steps": found.outcome.steps, "undone_bit_exact": int(record.undone), "findings": len(record.findings),
    }  # fmt: skip


def unlearn_sections(found: Found, others: Mapping[str, Tried], record: Record) -> tuple[Section, ...]:
    """Lay the report out."""
    compared = [_compared(found, others)] if others else []
    return (
        *_notes(found, record), _tofu(found), _losses(found), *_membership(found), *compared, _blocks(found),
        findings_section(record.findings),
    )  # fmt: skip


def _notes(found: Found, record: Record) -> list[Section]:
    notes: list[Section] = []
    more = "Train longer (train.epochs), or raise objective.beta or adapter.rank."
    if found.outcome.objective.kind == "matched":
        areas = [found.separations(by)["after"].auc for by in AREAS]
        if max(area.low for area in areas) > 0.5:
            notes.append(Note("Forgotten rows can still be told", f"An area below is above 0.5. {more}", "warning"))
        if min(area.high for area in areas) < 0.5:
            text = "An area below is under 0.5: they stand out. Lower objective.beta, or give more rows never seen."
            notes.append(Note("Forgotten rows are too unlikely", text, "warning"))
    elif missed := found.outcome.missed:
        num = len(found.after["forget"].measured.tokens)
        text = f"{missed} of {num} rows to forget stay below their bound. {more}"
        notes.append(Note("Not all rows are forgotten", text, "warning"))
    if "held_out" not in found.before:
        notes.append(Note(
            "Nothing to compare with",
            "No row is known that the model never saw, so whether the forgotten ones stand out cannot be told. Give "
            "some of the same kind with held_out.",
        ))  # fmt: skip
    if record.undone:
        text = "Without this request's adapter the model answers, bit for bit, as one that never had it."
        notes.append(Note("Can be undone", f"{text} `postgrad revoke` takes it out of use.", "good"))
    else:
        notes.append(Note("Cannot be undone", "The model's answers without the adapter differ from before.", "warning"))
    return notes


def _name(part: str) -> str:
    return NAMES.get(part, part)


def _tofu(found: Found) -> Table:
    rows = []
    for part in found.before:
        for model, parts in found.models.items():
            known = parts[part]
            figures = known.figures(forgotten=part == "forget", options=part not in (*NAMES,))
            rows.append((
                _name(part), model, figures["probability"], figures["rouge_l"], figures.get("truth_ratio", "–"),
                known.extraction,
            ))  # fmt: skip
    whole = [
        f"Model utility {utility(parts):.3f} {model}" + ("" if q is None else f", forget quality {q:.2g}")
        for model, parts in found.models.items()
        for q in (found.quality(parts) if model != "gold" else None,)
    ]
    note = (
        "TOFU's figures, 0 to 1: probability of the answer to the power 1 / length, ROUGE-L recall of the greedy "
        "answer, truth ratio (to forget: 1 = right and wrong answers equally likely; others: 1 = wrong ones have no "
        f"probability), extraction strength. {'; '.join(whole)}."
    )
    columns = ("rows", "model", "probability", "ROUGE-L", "truth ratio", "extraction")
    return Table("Answers", columns, tuple(rows), note)


def _losses(found: Found) -> Table:
    rows = tuple(
        (
            _name(part), model, each.loss, math.exp(min(each.loss, 700.0)), each.greedy, each.recited, len(each.tokens),
        )
        for part in found.before
        for model, parts in found.models.items()
        for each in (parts[part].measured,)
    )  # fmt: skip
    note = (
        "Nats a token of the answers, and perplexity. Greedy: per cent of tokens that are the likeliest ones after the "
        "right ones before them. Recited: per cent of answers that greedy decoding gives whole and exact. Gold never "
        "saw the rows to forget."
    )
    return Table(
        "What the model still knows", ("rows", "model", "loss", "perplexity", "greedy", "recited", "number"), rows, note
    )


def _membership(found: Found) -> list[Section]:
    rows = tuple(
        (
            by, name, each.auc.value, each.auc.low, each.auc.high,
            "–" if each.difference is None or name == "gold" else each.difference.value,
        )
        for by in AREAS
        for name, each in found.separations(by).items()
    )  # fmt: skip
    note = (
        "Chance that a row to forget has a lower loss a token, or a larger share of tokens that are the likeliest "
        "ones, than a row never seen; with its 95 % interval. 0.5: they cannot be told apart; 1: the model remembers; "
        "0: they stand out by being too unlikely."
    )
    columns = ("by", "model", "area", "low", "high", "minus gold's")
    return [Table("Do forgotten rows stand out?", columns, rows, note)] if rows else []


def _compared(found: Found, others: Mapping[str, Tried]) -> Table:
    tried = {found.outcome.objective.kind: Tried(found.after, found.outcome), **others}
    rows = []
    for name, (parts, outcome) in tried.items():
        good, one = found.quality(parts), Found(found.before, parts, found.gold, outcome, 0)
        area = one.separations("loss").get("after")
        forget, retain = parts["forget"].measured, parts["retain"].measured
        rows.append((
            name, forget.loss, retain.loss, retain.recited, utility(parts),
            "–" if good is None else good, "–" if area is None else area.auc.value,
            sum(norm > 0 for norm in outcome.norms.values()), outcome.steps,
        ))  # fmt: skip
    note = (
        "Loss a token of rows to forget and of those kept, per cent of kept answers recited, model utility, forget "
        "quality, area as above. The same adapter, rows and steps at most; published ones on all blocks, not tuned."
    )
    columns = (
        "objective", "loss", "kept", "recited", "utility", "quality", "area", "blocks", "steps",
    )  # fmt: skip
    return Table("Other objectives", columns, tuple(rows), note)


def _blocks(found: Found) -> Table:
    rows = tuple((name, norm, "changed" if norm else "as it was") for name, norm in found.outcome.norms.items())
    note = "Norm of all of a block's low-rank matrices together. Blocks as they were are not in the adapter's file."
    return Table("Blocks", ("block", "norm", "state"), rows, note)


def counts_table(counts: Mapping[str, int]) -> Table:
    """Show what became of the rows read: nothing is dropped silently."""
    return Table("Data", ("rows", "number"), tuple(counts.items()))
