"""The report of unlearning: what is gone, what stayed, whether it shows, which blocks changed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from postgrad.core.metrics import paired_difference
from postgrad.core.report import Cell, Note, Section, Table
from postgrad.forgetting.membership import Separation, loss_sides, separation
from postgrad.forgetting.text_rows import Measured

AREAS: dict[Literal["loss", "greedy"], str] = {"loss": "mia_auc", "greedy": "greedy_auc"}
WORDS = {"forget": "to forget", "retain": "to keep", "held_out": "never seen"}


@dataclass(frozen=True, eq=False)
class Found:
    """What models make of the rows; each mapping has forget, retain and, where there are such, held_out."""

    before: Mapping[str, Measured]
    after: Mapping[str, Measured]
    gold: Mapping[str, Measured]
    """Empty without a gold model."""
    missed: int
    """Rows to forget that are not forgotten."""
    norms: Mapping[str, float]
    """Of every block's group; 0 = the block is as it was."""

    @property
    def models(self) -> dict[str, Mapping[str, Measured]]:
        """Name the models."""
        named = {"before": self.before, "after": self.after, "gold": self.gold}
        return {name: rows for name, rows in named.items() if rows}

    def separations(self, by: Literal["loss", "greedy"]) -> dict[str, Separation]:
        """Say for each model how well rows to forget and rows never seen can be told apart.

        Args: by: the loss a token, or the share of tokens that are the likeliest ones.
        """
        if "held_out" not in self.before:
            return {}
        sides = {
            name: loss_sides(
                *(rows[part].means if by == "loss" else -rows[part].known for part in ("forget", "held_out"))
            )
            for name, rows in self.models.items()
        }
        return {name: separation(each, sides.get("gold")) for name, each in sides.items()}


def summary(found: Found, steps: int) -> dict[str, Cell]:
    """Give the key figures: losses in nats a token, shares in per cent."""
    before, after = found.before, found.after
    results: dict[str, Cell] = {}
    for name, rows in after.items():
        results |= {f"{name}_loss": rows.loss, f"{name}_loss_before": before[name].loss}
        results |= {f"{name}_loss_gold": found.gold[name].loss} if found.gold else {}
    rise = paired_difference(after["retain"].means.numpy(), before["retain"].means.numpy())
    results |= {"retain_rise": rise.value}
    if math.isfinite(rise.low):
        results |= {"retain_rise_low": rise.low, "retain_rise_high": rise.high}
    for name in ("forget", "retain"):
        results |= {f"{name}_greedy": after[name].greedy, f"{name}_recited": after[name].recited}
    for by, key in AREAS.items():
        for name, each in found.separations(by).items():
            if name == "after":
                results |= {key: each.auc.value, f"{key}_low": each.auc.low, f"{key}_high": each.auc.high}
            else:
                results[f"{key}_{name}"] = each.auc.value
    changed = sum(norm > 0 for norm in found.norms.values())
    return {**results, "blocks_changed": changed, "blocks": len(found.norms), "steps": steps}


def unlearn_sections(found: Found) -> tuple[Section, ...]:
    """Lay the report out."""
    return (*_notes(found), _losses(found), *_membership(found), _blocks(found))


def _notes(found: Found) -> list[Section]:
    notes: list[Section] = []
    if found.missed:
        num = len(found.after["forget"].tokens)
        notes.append(Note(
            "Not all rows are forgotten",
            f"{found.missed} of {num} rows to forget stay below their bound. Train longer (train.epochs), raise "
            "objective.beta or rank.",
            "warning",
        ))  # fmt: skip
    if "held_out" not in found.before:
        notes.append(Note(
            "Nothing to compare with",
            "No row is known that the model never saw, so whether the forgotten ones stand out cannot be told. Give "
            "some of the same kind with held_out.",
        ))  # fmt: skip
    return notes


def _losses(found: Found) -> Table:
    rows = tuple(
        (
            WORDS[name], model, each.loss, math.exp(min(each.loss, 700.0)), each.greedy,
            each.recited, len(each.tokens),
        )
        for name in found.before
        for model, parts in found.models.items()
        for each in (parts[name],)
    )  # fmt: skip
    note = (
        "Nats a token of the answers, and perplexity. Greedy: per cent of tokens that are the likeliest ones after the "
        "right ones before them. Recited: per cent of answers that greedy decoding gives whole and exact. Gold learnt "
        "without the rows to forget."
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


def _blocks(found: Found) -> Table:
    rows = tuple((name, norm, "changed" if norm else "as it was") for name, norm in found.norms.items())
    note = "Norm of all of a block's low-rank matrices together. Blocks as they were are not in the adapter's file."
    return Table("Blocks", ("block", "norm", "state"), rows, note)


def counts_table(counts: Mapping[str, int]) -> Table:
    """Show what became of the rows read: nothing is dropped silently."""
    return Table("Data", ("rows", "number"), tuple(counts.items()))
