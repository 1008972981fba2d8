"""Which columns hold what: the layouts of public data sets read into messages."""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from postgrad.core.items import Message, conversation_problem, prompt_problem
from postgrad.errors import DataError

Row = Mapping[str, Any]
Messages = tuple[Message, ...]

CONVERSATIONS = (
    "messages (list of {role, content}), conversations (list of {from, value}), instruction [+ input] + output, "
    "prompt + completion or response, question + answer"
)
PROMPTS = f"prompt, instruction [+ input], question, or a conversation: {CONVERSATIONS}"
PAIRS = (
    "prompt + chosen + rejected (texts or lists of messages), chosen + rejected (whole conversations or "
    '"Human: ... Assistant: ..." transcripts), or the pairs store of `postgrad annotate`'
)
SETS = (
    "prompt + responses (list) [+ scores (list)], prompt + response [+ score] (one row a response), or the run "
    "folder of `postgrad sample`"
)

QUESTION = ("prompt", "instruction", "question")
ANSWER = ("completion", "response", "output", "answer")
TURNS = ("messages", "conversations")
ROLE_NAMES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
}
TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Unusable(Exception):
    """A row that is left out and counted; its text is the reason."""


def conversation_reader(columns: Collection[str]) -> Callable[[Row], Messages] | None:
    """Choose how to read a conversation from rows with these columns."""
    if "prompt_messages" in columns and "response" in columns:
        return lambda row: (*messages_of(row, "prompt_messages"), *_answer(row, "response"))
    turns = _first(TURNS, columns)
    if turns:
        return lambda row: (*_system(row), *messages_of(row, turns))
    question, answer = _first(QUESTION, columns), _first(ANSWER, columns)
    if question and answer:
        return lambda row: _joined(_question(row, question), _answer(row, answer))
    return None


def prompt_reader(columns: Collection[str]) -> Callable[[Row], Messages] | None:
    """Choose how to read a prompt: what comes before the last answer, where there is one."""
    column = _first(("prompt_messages", *TURNS), columns)
    if column:
        return lambda row: without_answer((*_system(row), *messages_of(row, column)))
    question = _first(QUESTION, columns)
    if question:
        return lambda row: without_answer(_question(row, question))
    if "chosen" in columns:
        return lambda row: without_answer(messages_of(row, "chosen"))
    return None


def pair_reader(columns: Collection[str]) -> Callable[[Row], tuple[Messages, str, str]] | None:
    """Choose how to read prompt, chosen and rejected."""
    if "chosen" not in columns or "rejected" not in columns:
        return None
    if "prompt_messages" in columns or _first(QUESTION, columns):
        prompt = prompt_reader([c for c in columns if c not in TURNS])
        assert prompt is not None, "a column for the prompt was just found"
        return lambda row: _pair(prompt(row), row)
    return lambda row: _pair(without_answer(messages_of(row, "chosen")), row)


def _pair(prompt: Messages, row: Row) -> tuple[Messages, str, str]:
    chosen, rejected = (_last_answer(prompt, row, side) for side in ("chosen", "rejected"))
    if chosen == rejected:
        raise Unusable("chosen equals rejected")
    return prompt, chosen, rejected


def _last_answer(prompt: Messages, row: Row, column: str) -> str:
    """Read one side of a pair: an answer, or the whole conversation that must begin with the prompt."""
    value = row.get(column)
    if isinstance(value, str) and not _is_transcript(value):
        return value
    messages = messages_of(row, column)
    rest = messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages
    if len(rest) != 1 or rest[0]["role"] != "assistant":
        raise Unusable("chosen and rejected differ before the last answer")
    return rest[0]["content"]


def check_prompt(messages: Messages) -> Messages:
    """Refuse what is not a prompt."""
    problem = prompt_problem(messages)
    if problem:
        raise Unusable(problem)
    return messages


def check_conversation(messages: Messages) -> Messages:
    """Refuse what is not a conversation with a last answer."""
    problem = conversation_problem(messages)
    if problem:
        raise Unusable(problem)
    return messages


def check_response(text: str) -> str:
    """Refuse an empty response."""
    if not text.strip():
        raise Unusable("empty response")
    return text


def without_answer(messages: Messages) -> Messages:
    """Leave the last answer out."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def messages_of(row: Row, column: str) -> Messages:
    """Read a cell as messages: a list of them, its JSON text, a transcript, or a plain text by the user."""
    value = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("[") and column in (*TURNS, "prompt_messages"):
        value = _parsed(value, column)
    if value is None:
        return ()
    if isinstance(value, str):
        return _transcript(value) if _is_transcript(value) else ({"role": "user", "content": value},)
    if not isinstance(value, list | tuple):
        raise DataError(f"column {column!r}: expected a list of messages or text, found {_shown(value)}")
    return tuple(_message(one, f"column {column!r}, message {number}") for number, one in enumerate(value, start=1))


def _message(value: object, place: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected {{role, content}} or {{from, value}}, found {_shown(value)}")
    role_key, text_key = ("from", "value") if "from" in value else ("role", "content")
    if role_key not in value or text_key not in value:
        raise DataError(f"{place}: expected {{role, content}} or {{from, value}}, found keys {sorted(value)}")
    role, content = value[role_key], value[text_key]
    if not isinstance(role, str):
        raise DataError(f"{place}: expected a role, found {_shown(role)}")
    return {"role": ROLE_NAMES.get(role, role), "content": _text(content, place)}


def text_of(row: Row, column: str) -> str:
    """Read a cell as text; a missing one is empty."""
    return _text(row.get(column), f"column {column!r}")


def number_of(row: Row, column: str, default: float) -> float:
    """Read a cell as a number; a missing one is the default."""
    value = row.get(column)
    if value is None:
        return default
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"column {column!r}: expected a number, found {_shown(value)}") from error


def _text(value: object, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text, found {_shown(value)}. Convert it to text.")
    return value


def _question(row: Row, column: str) -> Messages:
    """Read what the user asks: the system text and earlier exchanges where there are columns for them, then it."""
    if column != "prompt":
        parts = [text_of(row, column), text_of(row, "input") if column == "instruction" else ""]
        asked: Messages = ({"role": "user", "content": "\n\n".join(part for part in parts if part.strip())},)
    else:
        asked = messages_of(row, column)
    return (*_system(row), *_history(row), *asked)


def _answer(row: Row, column: str) -> Messages:
    value = row.get(column)
    if isinstance(value, list | tuple):
        return messages_of(row, column)
    return ({"role": "assistant", "content": text_of(row, column)},)


def _joined(prompt: Messages, answer: Messages) -> Messages:
    """Join prompt and answer; an answer that repeats the prompt is the whole conversation."""
    return answer if answer[: len(prompt)] == prompt else (*prompt, *answer)


def _system(row: Row) -> Messages:
    text = text_of(row, "system")
    return ({"role": "system", "content": text},) if text.strip() else ()


def _history(row: Row) -> Messages:
    """Read LLaMA-Factory's column of earlier turns: [question, answer] pairs or messages."""
    messages: list[Message] = []
    for number, turn in enumerate(_parsed(row.get("history"), "history") or (), start=1):
        place = f"column 'history', entry {number}"
        if isinstance(turn, list | tuple) and len(turn) == 2:
            said = zip(("user", "assistant"), turn, strict=True)
            messages += [{"role": role, "content": _text(text, place)} for role, text in said]
        else:
            messages.append(_message(turn, place))
    return tuple(messages)


def _parsed(value: Any, column: str) -> Any:
    """Parse a list kept as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"column {column!r}: expected a JSON list, found {value[:60]!r} ({error})") from error


def _is_transcript(text: str) -> bool:
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _transcript(text: str) -> Messages:
    """Split "Human: ... Assistant: ..." into messages; an empty last turn is where the answer goes."""
    parts = TRANSCRIPT.split("\n\n" + text.strip())
    names = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": names[name], "content": said.strip()} for name, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return tuple(turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns)


def _first(names: Sequence[str], columns: Collection[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _shown(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
