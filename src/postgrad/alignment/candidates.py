"""Prompts with two or more responses to compare, from any stage or file that holds some."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random

from postgrad.alignment.judge import Comparison
from postgrad.core.config import DataConfig
from postgrad.core.data import load_sets, load_table
from postgrad.core.formats import SETS, Row, Unusable, check_prompt, prompt_reader, text_of
from postgrad.core.items import Loaded, Message, content_hash, prompt_id
from postgrad.core.runtime import stage_seed
from postgrad.core.store import is_sealed, read_store, store_hash
from postgrad.errors import DataError


@dataclass(frozen=True)
class Candidates:
    """A prompt and its distinct responses, with the model each came from ("" = not known)."""

    id: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    models: tuple[str, ...]


def load_candidates(config: DataConfig) -> Loaded[Candidates]:
    """Load what is to be compared; prompts with fewer than two distinct responses are counted.

    Accepts the run folder of `sample`; the run folder of `annotate`, to judge its pairs anew; rows of prompt,
    response_a and response_b; and all that `load_sets` reads.

    Raises:  DataError: unreadable, columns of no known layout, or nothing to compare.
    """
    folder = Path(config.path).expanduser()
    sampled = next((path for path in (folder / "responses", folder) if is_sealed(path)), None)
    judged = folder / "pairs"
    path = str(judged) if is_sealed(judged) else config.path
    paired = is_sealed(judged) or (not sampled and {"response_a", "response_b"} <= set(_first_row(path, config)))
    counts: Counter[str] = Counter()
    if paired:
        rows = load_table(path, config.split, config.limit)
        found = _read_pairs(rows, path, counts)
    else:
        model = _policy(sampled) if sampled else ""
        loaded = load_sets(config)
        counts.update(loaded.counts)
        found = [Candidates(s.id, s.prompt, s.responses, (model,) * len(s.responses)) for s in loaded.items]
    items = []
    for item in map(_distinct, found):
        if len(item.responses) < 2:
            counts["dropped: fewer than two distinct responses"] += 1
        else:
            items.append(item)
    counts["kept"] = len(items)
    if not items:
        raise DataError(f"{path}: expected prompts with two unlike responses, found none ({dict(counts)}).")
    return Loaded(items, dict(counts))


def source_hash(config: DataConfig, items: Sequence[Candidates]) -> str:
    """Hash what is compared: the store it comes from, or its texts."""
    folder = Path(config.path).expanduser()
    for path in (folder / "pairs", folder / "responses", folder):
        if is_sealed(path):
            return store_hash(path)
    return content_hash([[item.id, *item.responses] for item in items])


def _first_row(path: str, config: DataConfig) -> Row:
    return load_table(path, config.split, 1)[0]


def _policy(store: Path) -> str:
    """Name the model that a store of responses was sampled from."""
    hashes = {row["policy_hash"] for row in read_store(store, ["policy_hash"])}
    return str(hashes.pop()) if len(hashes) == 1 else ""


def _read_pairs(rows: Sequence[Row], path: str, counts: Counter[str]) -> list[Candidates]:
    columns = {name for row in rows for name in row}
    reader = prompt_reader(columns - {"response_a", "response_b"})
    if reader is None:
        raise DataError(
            f"{path}: found columns {', '.join(sorted(columns))}; accepted: prompt + response_a + response_b "
            f"[+ model_a, model_b], {SETS}. Rename the columns."
        )
    found = []
    counts["read"] = len(rows)
    for number, row in enumerate(rows, start=1):
        try:
            prompt = check_prompt(reader(row))
            responses = text_of(row, "response_a"), text_of(row, "response_b")
            models = text_of(row, "model_a"), text_of(row, "model_b")
        except Unusable as reason:
            counts[f"dropped: {reason}"] += 1
        except DataError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        else:
            found.append(Candidates(prompt_id(prompt), prompt, responses, models))
    return found


def _distinct(item: Candidates) -> Candidates:
    """Keep the first of equal responses, and no empty one."""
    kept = {
        text: model for text, model in reversed(list(zip(item.responses, item.models, strict=True))) if text.strip()
    }
    order = [text for text in dict.fromkeys(item.responses) if text in kept]
    return Candidates(item.id, item.prompt, tuple(order), tuple(kept[text] for text in order))


@dataclass(frozen=True)
class Question:
    """One pair to be judged."""

    id: str
    prompt_id: str
    comparison: Comparison
    model_a: str
    model_b: str


def choose_pairs(num: int, pairing: str, limit: int, seed: int) -> list[tuple[int, int]]:
    """List which of `num` responses are compared; "random" also draws which of two comes first.

    Args:    limit: most pairs that "random" draws.   seed: of this prompt.
    """
    every = list(combinations(range(num), 2))
    if pairing != "random":
        return every if pairing == "all" else every[:1]
    rng = Random(seed)
    drawn = rng.sample(every, min(limit, len(every)))
    return [(a, b) if rng.random() < 0.5 else (b, a) for a, b in drawn]


def form_questions(items: Sequence[Candidates], pairing: str, limit: int, seed: int) -> list[list[Question]]:
    """Pair up each prompt's responses; the pairs of a prompt stand together."""
    return [
        [
            Question(
                id=content_hash([item.id, item.responses[a], item.responses[b]]),
                prompt_id=item.id,
                comparison=Comparison(item.prompt, item.responses[a], item.responses[b]),
                model_a=item.models[a],
                model_b=item.models[b],
            )
            for a, b in choose_pairs(len(item.responses), pairing, limit, stage_seed(seed, "pairs", item.id))
        ]
        for item in items
    ]
