"""Items: hashes by content, and what makes messages a prompt or a conversation."""

import hashlib
import subprocess
import sys

import pytest
from chats import talk

from postgrad.core.items import content_hash, conversation_problem, prompt_id, prompt_problem


def test_content_hash_is_sha256_of_canonical_json() -> None:
    expected = hashlib.sha256(b'{"a":[1,"\\u00e9"],"b":null}').hexdigest()[:16]
    assert content_hash({"b": None, "a": (1, "é")}) == expected
    assert content_hash({"a": [1, "é"], "b": None}) == expected
    assert content_hash({"a": [1, "e"], "b": None}) != expected
    assert len(content_hash("\ud800")) == 16, "half an emoji has a hash, too"
    with pytest.raises(ValueError, match="Out of range"):
        content_hash(float("nan"))


def test_prompt_id_is_the_same_in_every_process() -> None:
    code = "from postgrad.core.items import prompt_id; print(prompt_id([{'role': 'user', 'content': 'Hi'}]))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == prompt_id(talk("Hi")) == prompt_id(list(talk("Hi")))


def test_problems() -> None:
    assert prompt_problem(talk("a")) == prompt_problem(talk("a", "b", "c", system="s")) == ""
    assert conversation_problem(talk("a", "b", system="s")) == ""
    assert prompt_problem(talk("a", "b")) == "ends with the assistant"
    assert conversation_problem(talk("a")) == "ends with the user"
    assert conversation_problem(talk(system="s")) == "no messages"
    assert conversation_problem((*talk("a", "b"), *talk(system="s"))) == "turns do not alternate user, assistant"
