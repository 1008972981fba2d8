"""Layouts of public data sets, row by row."""

import json
from typing import Any

import pytest
from chats import talk

from postgrad.core.formats import Unusable, conversation_reader, messages_of, pair_reader, prompt_reader
from postgrad.errors import DataError

MESSAGES = list(talk("Hi", "Yo", system="S"))
SHAREGPT = [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
HH = "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: What?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": MESSAGES}, talk("Hi", "Yo", system="S")),
        ({"messages": json.dumps(MESSAGES)}, talk("Hi", "Yo", system="S")),
        ({"conversations": SHAREGPT}, talk("Hi", "Yo", system="S")),
        ({"system": "S", "conversations": SHAREGPT[1:]}, talk("Hi", "Yo", system="S")),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, talk("Add.\n\n1 2", "3")),
        ({"instruction": "Add.", "input": "", "output": "3"}, talk("Add.", "3")),
        ({"instruction": "Add.", "input": None, "response": "3"}, talk("Add.", "3")),
        (
            {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "S"},
            talk("a", "b", "c", "d", system="S"),
        ),
        ({"instruction": "c", "output": "d", "history": '[["a", "b"]]'}, talk("a", "b", "c", "d")),
        ({"prompt": "Hi", "completion": "Yo"}, talk("Hi", "Yo")),
        ({"prompt": "Hi", "response": "Yo"}, talk("Hi", "Yo")),
        ({"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}, talk("Hi", "Yo", system="S")),
        ({"prompt": MESSAGES[:2], "completion": MESSAGES}, talk("Hi", "Yo", system="S")),
        ({"prompt": HH, "response": "That."}, talk("Hi", "Yo", "What?", "That.")),
        ({"question": "2+2?", "answer": "4"}, talk("2+2?", "4")),
        ({"prompt_messages": json.dumps(MESSAGES[:2]), "response": "Yo", "rank": 0}, talk("Hi", "Yo", system="S")),
    ],
)
def test_conversations(row: dict[str, Any], expected: object) -> None:
    read = conversation_reader(row.keys())
    assert read is not None and read(row) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": MESSAGES}, talk("Hi", system="S")),
        ({"conversations": SHAREGPT[:2]}, talk("Hi", system="S")),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, talk("Add.\n\n1 2")),
        ({"prompt": "Hi"}, talk("Hi")),
        ({"prompt": HH}, talk("Hi", "Yo", "What?")),
        ({"question": "2+2?", "answer": "4"}, talk("2+2?")),
        ({"chosen": HH + " a", "rejected": HH + " b"}, talk("Hi", "Yo", "What?")),
        ({"prompt_messages": json.dumps(MESSAGES[:2]), "response": "Yo", "k": 0}, talk("Hi", system="S")),
    ],
)
def test_prompts(row: dict[str, Any], expected: object) -> None:
    read = prompt_reader(row.keys())
    assert read is not None and read(row) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
        {"instruction": "Hi", "chosen": "a", "rejected": "b"},
        {"prompt": "Hi", "chosen": list(talk("Hi", "a")), "rejected": list(talk("Hi", "b")), "messages": MESSAGES},
        {"prompt": list(talk("Hi")), "chosen": list(talk("Hi", "a"))[1:], "rejected": list(talk("Hi", "b"))[1:]},
        {"chosen": list(talk("Hi", "a")), "rejected": list(talk("Hi", "b"))},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " a", "rejected": " b"},
        {"prompt_messages": json.dumps(talk("Hi")), "chosen": "a", "rejected": "b"},
    ],
)
def test_pairs(row: dict[str, Any]) -> None:
    read = pair_reader(row.keys())
    assert read is not None
    prompt, chosen, rejected = read(row)
    assert (prompt, chosen.strip(), rejected.strip()) == (talk("Hi"), "a", "b")


def test_pairs_of_whole_conversations_share_all_but_the_answer() -> None:
    read = pair_reader(["chosen", "rejected"])
    assert read is not None
    assert read({"chosen": HH + " a", "rejected": HH + " b"}) == (talk("Hi", "Yo", "What?"), "a", "b")
    with pytest.raises(Unusable, match="differ before the last answer"):
        read({"chosen": HH + " a", "rejected": HH.replace("Yo", "No") + " b"})
    with pytest.raises(Unusable, match="chosen equals rejected"):
        read({"chosen": HH + " a", "rejected": HH + " a"})


def test_columns_of_no_layout_have_no_reader() -> None:
    assert conversation_reader(["text"]) is None
    assert conversation_reader(["prompt"]) is None
    assert prompt_reader(["text"]) is None
    assert pair_reader(["prompt", "chosen"]) is None


def test_unknown_roles_are_kept_for_the_counts() -> None:
    assert messages_of({"messages": [{"role": "tool", "content": "x"}]}, "messages") == (
        {"role": "tool", "content": "x"},
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": 3}, r"column 'messages': expected a list of messages or text, found int '3'"),
        ({"messages": "[{"}, r"column 'messages': expected a JSON list, found '\[\{'"),
        ({"messages": ["Hi"]}, r"message 1: expected \{role, content\} or \{from, value\}, found str 'Hi'"),
        ({"messages": [{"text": "Hi"}]}, r"message 1: expected .*found keys \['text'\]"),
        ({"messages": [{"role": "user", "content": 4}]}, r"message 1: expected text, found int '4'"),
        ({"messages": [{"role": 1, "content": "x"}]}, r"message 1: expected a role, found int '1'"),
        ({"instruction": "a", "output": 4}, r"column 'output': expected text, found int '4'. Convert it"),
        ({"instruction": "a", "output": "b", "history": "x"}, r"column 'history': expected a JSON list"),
        ({"instruction": "a", "output": "b", "history": [3]}, r"column 'history', entry 1: expected .* found int"),
    ],
)
def test_wrong_types_say_what_was_found(row: dict[str, Any], message: str) -> None:
    read = conversation_reader(row.keys())
    assert read is not None
    with pytest.raises(DataError, match=message):
        read(row)
