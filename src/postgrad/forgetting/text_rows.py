"""Rows to forget, to keep and never seen: read, held against one another, and tokenised.

A row is a conversation. Columns `perturbed_answer` (wrong answers) and `paraphrased_answer` (the right one in other
words), as TOFU has them, make a truth ratio possible.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from postgrad.core.config import DataConfig
from postgrad.core.data import hold_out, load_examples, load_table
from postgrad.core.distributed import first_rank
from postgrad.core.formats import Row, conversation_reader, text_of
from postgrad.core.items import Example, Message, prompt_id
from postgrad.core.rows import Tree
from postgrad.core.runtime import stage_seed
from postgrad.core.store import is_sealed
from postgrad.core.text import answer_trees, conversation_trees, encode_conversation
from postgrad.errors import ConfigError, DataError
from postgrad.forgetting.facts import FactSizes, write_facts

WRONG, PARAPHRASED = "perturbed_answer", "paraphrased_answer"
NAMES = {"forget": "to forget", "retain": "to keep", "held_out": "never seen", "earlier": "forgotten earlier"}
REFUSALS = ("I do not know.", "I have no information about that.", "That is not something I can answer.")
"""What rows to forget are answered with under objective "idk"."""


def check_given(forget: str, retain: str, path: str, where: str = "") -> None:
    """Refuse anything but two files of rows, one of which a share is forgotten, or none at all."""
    given = bool(forget), bool(retain), bool(path)
    if given not in ((True, True, False), (False, False, True), (False, False, False)):
        raise ConfigError(
            f"{where}expected forget and retain, or data.path of which a share is forgotten, or none of the three; "
            f"found forget {forget!r}, retain {retain!r}, data.path {path!r}."
        )


@dataclass(frozen=True)
class Sources:
    """Where rows come from."""

    forget: str
    """File of rows to forget; "" = a share of data.path."""
    retain: str
    """File of rows to keep; "" = the rest of data.path."""
    held_out: str
    """File of rows never seen; "" = a share of the rows to keep, if `aside`."""
    share: float
    """How much of data.path is forgotten."""
    aside: bool
    """Whether rows that are set aside are never seen."""
    utility: tuple[str, ...] = ()
    """More files to measure what is kept with."""


class Answers(NamedTuple):
    """Answers to one question that a model may be offered."""

    right: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Texts:
    """Rows by their part (a key of NAMES or the name of a file of `utility`), and what became of those read."""

    rows: dict[str, list[Example]]
    answers: dict[str, Answers]
    """By the row's id, where there are wrong ones."""
    counts: dict[str, int]
    named: bool
    """Whether the rows to forget have a file of their own."""


@dataclass(frozen=True)
class Trees:
    """Tokenised rows by their part; no part is empty."""

    rows: dict[str, list[Tree]]
    asked: dict[str, list[Tree]]
    """Questions with the right answer and wrong ones, of the rows that have some."""
    refused: list[Tree]
    """Rows to forget, with a refusal for an answer; none unless asked for."""
    samples: tuple[str, ...]
    """Ids of the rows to forget."""
    counts: dict[str, int]

    @property
    def forget(self) -> list[Tree]:
        """Give the rows to forget."""
        return self.rows["forget"]

    @property
    def retain(self) -> list[Tree]:
        """Give the rows to keep."""
        return self.rows["retain"]


def with_facts(sources: Sources, data: DataConfig, folder: Path, seed: int) -> Sources:
    """Return the sources: the user's, or files of invented facts written below the run folder."""
    if sources.forget or data.path:
        return sources
    paths = first_rank(lambda: write_facts(folder / "facts", seed, FactSizes()))
    forget, retain, held_out = (str(paths[name]) for name in ("forget", "retain", "held_out"))
    return replace(sources, forget=forget, retain=retain, held_out=held_out)


def read_texts(sources: Sources, data: DataConfig, seed: int, earlier: Mapping[str, str] | None = None) -> Texts:
    """Read the rows of all parts.

    The rows set aside are those that `postgrad sft` sets aside with the same seed and share.

    Args:   earlier: ids of rows that requests in use have forgotten -> the request; they are not kept, but measured.
    Raises: DataError: nothing to forget or to keep, or a row that stands on two sides.
    """
    counts: dict[str, int] = {}
    answers: dict[str, Answers] = {}

    def load(path: str, name: str) -> list[Example]:
        loaded = load_examples(replace(data, path=path))
        counts.update({f"{name}: {reason}": num for reason, num in loaded.counts.items()})
        answers.update(_answers(path, data))
        once = {example.id: example for example in loaded.items}
        counts[f"{name}: same row again"] = len(loaded.items) - len(once)
        return list(once.values())

    loaded = load(sources.retain or data.path, "to keep" if sources.retain else "all")
    retain = [example for example in loaded if example.id not in (earlier or {})]
    gone = [example for example in loaded if example.id in (earlier or {})]
    held: list[Example] = []
    if sources.held_out:
        held = load(sources.held_out, "never seen")
    elif sources.aside:
        retain, held = hold_out(retain, data.held_out, seed)
    if sources.forget:
        forget = load(sources.forget, "to forget")
    else:
        retain, forget = hold_out(retain, sources.share, stage_seed(seed, "forget"))
    rows = {"forget": forget, "retain": retain, "held_out": held, "earlier": gone}
    _check_sides(rows, earlier or {})
    more = {_name_of(path, rows): load(path, Path(path).stem) for path in sources.utility}
    return Texts({**rows, **more}, answers, counts, bool(sources.forget))


def _check_sides(rows: Mapping[str, list[Example]], earlier: Mapping[str, str]) -> None:
    """Refuse rows that stand on two sides, and an empty side."""
    ids = {name: {example.id for example in part} for name, part in rows.items()}
    again = [example for example in rows["forget"] if example.id in earlier]
    if again:
        raise DataError(
            f"expected rows that no request in use has forgotten, found {len(again)}, the first {_shown(again)} by "
            f"request {earlier[again[0].id]!r}. Take them out of this one, or revoke the other first."
        )
    for first, second in (("forget", "retain"), ("forget", "held_out"), ("retain", "held_out")):
        both = [example for example in rows[first] if example.id in ids[second]]
        if both:
            raise DataError(
                f"expected rows {NAMES[first]} and rows {NAMES[second]} to differ, found {len(both)} on both sides, "
                f"the first {_shown(both)}. Take them out of one."
            )
    for name in ("forget", "retain"):
        if not rows[name]:
            raise DataError(
                f"expected rows {NAMES[name]}, found none. What is kept is learnt from rows to keep: give some of the "
                "same kind (retain), or a data.path with more questions than one, and a share of them to forget."
            )


def _shown(examples: Sequence[Example]) -> str:
    return repr(examples[0].messages[-2]["content"][:60]) if len(examples[0].messages) > 1 else examples[0].id


def _name_of(path: str, taken: Iterable[str]) -> str:
    name = Path(path).stem
    if name in taken:
        raise DataError(f"utility: expected files whose names differ from {', '.join(taken)}, found {path}. Rename it.")
    return name


def _answers(path: str, data: DataConfig) -> dict[str, Answers]:
    """Read the answers that rows offer beside their own, by the row's id."""
    if is_sealed(Path(path) / "selected"):  # of `postgrad rejection`: no such columns
        return {}
    rows = load_table(path, data.split, data.limit)
    read = conversation_reader({name for row in rows for name in row})
    found = {}
    for row in rows if read else ():
        wrong = _wrong(row)
        if wrong and read and (messages := read(row)):
            right = text_of(row, PARAPHRASED) or messages[-1]["content"]
            found[prompt_id(messages)] = Answers(right, wrong)
    return found


def _wrong(row: Row) -> tuple[str, ...]:
    value = row.get(WRONG)
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"column {WRONG!r}: expected a text or a list of texts, found {str(value)[:60]!r}")
    return tuple(text for text in texts if text.strip())


def tokenised(texts: Texts, tokenizer: PreTrainedTokenizerBase, data: DataConfig, *, refuse: bool = False) -> Trees:
    """Turn rows into trees, and count what does not fit.

    Args:   refuse: make refusals, too.
    Raises: DataError: a row to forget does not fit whole: what is cut off would not be forgotten. Where a share of the
            rows is forgotten, it is one of those that fit.
    """
    counts, gone = dict(texts.counts), texts.rows["forget"]
    if not texts.named:
        gone = [each for each in gone if len(encode_conversation(tokenizer, each.messages)[0]) <= data.max_length]
        counts["to forget: left out, longer than max_length"] = len(texts.rows["forget"]) - len(gone)
    rows: dict[str, list[Tree]] = {}
    asked: dict[str, list[Tree]] = {}
    for part, examples in {**texts.rows, "forget": gone or texts.rows["forget"]}.items():
        if not examples:
            continue
        found, own = conversation_trees(tokenizer, examples, data)
        name = NAMES.get(part, part)
        if part == "forget":
            _require_whole(own, data)
        rows[part] = found
        counts |= {f"{name}: {reason}": num for reason, num in own.items() if reason not in ("read", "kept")}
        counts[f"{name}: used"] = len(found)
        offered = [_offered(example, texts.answers[example.id]) for example in examples if example.id in texts.answers]
        if offered:
            asked[part] = answer_trees(tokenizer, offered, replace(data, truncate="drop"))[0]
    refused, own = conversation_trees(tokenizer, list(map(_refusal, gone, range(len(gone) * refuse))), data)
    _require_whole(own, data)
    return Trees(rows, asked, refused, tuple(example.id for example in gone), counts)


def _require_whole(counts: Mapping[str, int], data: DataConfig) -> None:
    lost = Counter({reason: num for reason, num in counts.items() if reason not in ("read", "kept") and num})
    if lost:
        raise DataError(
            f"expected every row to forget to fit whole, found {dict(lost)} of {counts['read']}; the longest that fits "
            f"has {data.max_length} tokens (data.max_length, and at most the model's context). Split these rows."
        )


def _offered(example: Example, answers: Answers) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    return example.messages[:-1], (answers.right, *answers.wrong)


def _refusal(example: Example, number: int) -> Example:
    answer = {"role": "assistant", "content": REFUSALS[number % len(REFUSALS)]}
    return replace(example, messages=(*example.messages[:-1], answer))
