"""Load conversations, prompts, preference pairs and response sets; count what is left out and why."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from postgrad.core import formats
from postgrad.core.config import DataConfig
from postgrad.core.formats import Messages, Row, Unusable
from postgrad.core.items import Example, Loaded, Message, Pair, Prompt, ResponseSet, content_hash, prompt_id
from postgrad.core.store import is_sealed, read_store
from postgrad.core.tables import load_table
from postgrad.errors import DataError

__all__ = [
    "Example",
    "Loaded",
    "Message",
    "Pair",
    "Prompt",
    "ResponseSet",
    "hold_out",
    "load_examples",
    "load_pairs",
    "load_prompts",
    "load_sets",
    "load_table",
    "prompt_id",
]

Item = TypeVar("Item", Example, Prompt, Pair, ResponseSet)
Made = TypeVar("Made")


def load_examples(config: DataConfig) -> Loaded[Example]:
    """Load conversations to imitate.

    Raises:
        DataError: unreadable, columns of no known layout, a cell of a wrong type, or nothing left.
    """
    path = _stage_folder(config.path, "selected")
    rows = load_table(path, config.split, config.limit)
    columns = _columns(rows)
    reader = formats.conversation_reader(columns)
    if reader is None:
        raise _unknown(path, columns, formats.CONVERSATIONS)
    read = reader

    def example(row: Row) -> Example:
        messages = formats.check_conversation(read(row))
        return Example(prompt_id(messages), messages, formats.number_of(row, "weight", 1.0))

    return _collect(rows, example, path)


def load_prompts(config: DataConfig) -> Loaded[Prompt]:
    """Load prompts, each once: columns of prompts, or conversations without their last answer."""
    path = _stage_folder(config.path, "responses")
    rows = load_table(path, config.split, config.limit)
    columns = _columns(rows)
    reader = formats.prompt_reader(columns)
    if reader is None:
        raise _unknown(path, columns, formats.PROMPTS)
    read = reader
    seen: set[str] = set()

    def prompt(row: Row) -> Prompt:
        messages = formats.check_prompt(read(row))
        name = prompt_id(messages)
        if name in seen:
            raise Unusable("same prompt again")
        seen.add(name)
        return Prompt(name, messages)

    return _collect(rows, prompt, path)


def load_pairs(config: DataConfig) -> Loaded[Pair]:
    """Load preference pairs: data sets of chosen and rejected answers, or judged ones of `postgrad annotate`."""
    path = _stage_folder(config.path, "pairs")
    rows = load_table(path, config.split, config.limit)
    columns = _columns(rows)
    if {"prompt_messages", "response_a", "response_b", "p_a"} <= columns:
        return _collect(rows, _judged_pair, path)
    reader = formats.pair_reader(columns)
    if reader is None:
        raise _unknown(path, columns, formats.PAIRS)
    read = reader

    def pair(row: Row) -> Pair:
        prompt, chosen, rejected = read(row)
        p = formats.number_of(row, "p", 1.0)
        return _make_pair(prompt, chosen, rejected, p, formats.number_of(row, "margin", 0.0))

    return _collect(rows, pair, path)


def _judged_pair(row: Row) -> Pair:
    p = formats.number_of(row, "p_a", math.nan)
    if not 0 <= p <= 1:
        raise Unusable("no preference")
    prompt = formats.messages_of(row, "prompt_messages")
    answers = [formats.text_of(row, "response_a"), formats.text_of(row, "response_b")]
    if answers[0] == answers[1]:
        raise Unusable("chosen equals rejected")
    chosen, rejected = answers if p >= 0.5 else answers[::-1]
    return _make_pair(prompt, chosen, rejected, max(p, 1 - p), abs(formats.number_of(row, "margin", 0.0)))


def _make_pair(prompt: Messages, chosen: str, rejected: str, p: float, margin: float) -> Pair:
    formats.check_prompt(prompt)
    for answer in (chosen, rejected):
        formats.check_response(answer)
    if not 0 <= p <= 1 or not math.isfinite(margin):
        raise DataError(f"expected p from 0 to 1 and a finite margin, found p {p} and margin {margin}")
    turn = sum(message["role"] == "user" for message in prompt)
    return Pair(content_hash([list(prompt), chosen, rejected]), prompt, chosen, rejected, p, margin, turn)


def load_sets(config: DataConfig) -> Loaded[ResponseSet]:
    """Load sets of responses, with scores where there are any; ``limit`` counts prompts.

    The responses of a store of `postgrad sample` keep their numbers: place k is response k, empty ones included.
    """
    path = _stage_folder(config.path, "responses")
    rows = load_table(path, config.split)
    columns = _columns(rows)
    if {"prompt_id", "prompt_messages", "k", "response"} <= columns:
        return _limited(_sampled_sets(rows, Path(path)), config.limit)
    reader = formats.prompt_reader(columns - {"response", "responses"})
    if reader is None or not columns & {"response", "responses"}:
        raise _unknown(path, columns, formats.SETS)
    read = reader
    listed = "responses" in columns

    def answers(row: Row) -> tuple[Messages, list[str], list[Any]]:
        prompt = formats.check_prompt(read(row))
        if listed:
            texts, scores = _list(row, "responses"), _list(row, "scores")
        else:
            texts, scores = [row.get("response")], [row["score"]] if row.get("score") is not None else []
        responses = [formats.text_of({"responses": text}, "responses") for text in texts]
        if scores and len(scores) != len(responses):
            raise DataError(f"expected {len(responses)} scores, as many as responses, found {len(scores)}")
        return prompt, responses, scores

    return _limited(_grouped(_collect(rows, answers, path), path), config.limit)


def _grouped(loaded: Loaded[tuple[Messages, list[str], list[Any]]], path: str) -> Loaded[ResponseSet]:
    """Gather the responses to each prompt."""
    counts = Counter(loaded.counts)
    groups: dict[str, tuple[Messages, list[str], list[float]]] = {}
    for prompt, responses, scores in loaded.items:
        _, all_responses, all_scores = groups.setdefault(prompt_id(prompt), (prompt, [], []))
        for k, response in enumerate(responses):
            if not response.strip():
                counts["dropped: empty response"] += 1
                continue
            all_responses.append(response)
            all_scores += [_score(scores[k], path)] if scores else []
    sets = []
    for name, (prompt, responses, scores) in groups.items():
        if scores and len(scores) != len(responses):
            raise DataError(f"{path}: expected a score for each response, found some without, to {_ask(prompt)}")
        if responses:
            sets.append(ResponseSet(name, prompt, tuple(responses), tuple(scores)))
    return _counted(sets, counts, path)


def _sampled_sets(rows: Sequence[Row], folder: Path) -> Loaded[ResponseSet]:
    """Join the stores of responses and scores, by prompt and number."""
    scores: dict[tuple[str, int], float] = {}
    beside = folder.parent / "scores"
    if is_sealed(beside):
        for scored in read_store(beside, ["prompt_id", "k", "score"]):
            scores[scored["prompt_id"], scored["k"]] = _score(scored["score"], str(beside))
    groups: dict[str, dict[int, Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], {})[row["k"]] = row
    sets = []
    for name, responses in groups.items():
        order = sorted(responses)
        found = [scores[name, k] for k in order if (name, k) in scores]
        if order != list(range(len(order))) or (scores and len(found) != len(order)):
            raise DataError(
                f"{folder}: expected responses 0 to {len(order) - 1} to prompt {name}, each with a score, found "
                f"responses {order[:10]} and {len(found)} scores. Run `postgrad sample` again."
            )
        prompt = formats.messages_of(responses[0], "prompt_messages")
        texts = tuple(formats.text_of(responses[k], "response") for k in order)
        sets.append(ResponseSet(name, prompt, texts, tuple(found)))
    return _counted(sets, Counter(read=len(rows)), str(folder))


def _limited(loaded: Loaded[ResponseSet], limit: int) -> Loaded[ResponseSet]:
    items = loaded.items[:limit] if limit else loaded.items
    return Loaded(items, {**loaded.counts, "kept": len(items)})


def hold_out(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Split items into those to train on and those held out, by a hash of how their conversation opens.

    All answers to a prompt, and all later turns of its conversation, fall on one side; the side does not depend on
    what else is in the data, so every stage with this seed holds out the same prompts. Where chance would leave a
    side empty, the prompt nearest to the border moves there.
    """
    places = {item.id: _place(_messages(item), seed) for item in items}
    values = sorted(set(places.values()))
    border = share
    if share > 0 and len(values) > 1:
        border = min(max(share, math.nextafter(values[0], 1.0)), values[-1])
    return (
        [item for item in items if places[item.id] >= border],
        [item for item in items if places[item.id] < border],
    )


def _place(messages: Sequence[Message], seed: int) -> float:
    """Hash the opening of a conversation, its system text and first question, to [0, 1)."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    text = json.dumps([seed, [[m["role"], m["content"]] for m in messages[: first + 1]]])
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:6], "big") / 2**48


def _messages(item: Example | Prompt | Pair | ResponseSet) -> Sequence[Message]:
    return item.messages if isinstance(item, Example | Prompt) else item.prompt


def _collect(rows: Sequence[Row], make: Callable[[Row], Made], path: str) -> Loaded[Made]:
    """Make an item of every row; count those left out, name the row of a wrong type."""
    counts: Counter[str] = Counter(read=len(rows))
    items = []
    for number, row in enumerate(rows, start=1):
        try:
            items.append(make(row))
        except Unusable as reason:
            counts[f"dropped: {reason}"] += 1
        except DataError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
    return _counted(items, counts, path)


def _counted(items: list[Made], counts: Counter[str], path: str) -> Loaded[Made]:
    if not items:
        reasons = ", ".join(f"{name[9:]}: {n}" for name, n in counts.items() if name.startswith("dropped: "))
        raise DataError(f"{path}: expected rows to learn from, found none among {counts['read']} ({reasons})")
    return Loaded(items, {"read": counts["read"], "kept": len(items), **counts})


def _stage_folder(path: str, store: str) -> str:
    """Find the store in the run folder of an earlier stage."""
    return str(Path(path) / store) if path and is_sealed(Path(path) / store) else path


def _columns(rows: Iterable[Row]) -> set[str]:
    return {name for row in rows for name in row}


def _unknown(path: str, columns: Iterable[str], accepted: str) -> DataError:
    return DataError(f"{path}: found columns {', '.join(sorted(columns))}; accepted: {accepted}. Rename the columns.")


def _list(row: Row, column: str) -> list[Any]:
    value = row.get(column)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise DataError(f"column {column!r}: expected a list, found {type(value).__name__} {str(value)[:60]!r}")
    return list(value)


def _score(value: object, path: str) -> float:
    score = formats.number_of({"score": value}, "score", math.nan)
    if not math.isfinite(score):
        raise DataError(f"{path}: expected a finite score for each response, found {value!r}")
    return score


def _ask(prompt: Messages) -> str:
    return repr(prompt[-1]["content"][:60])
