"""Tokens and masks: what is supervised, what a model generates from, and what gives way when a row is too long."""

from pathlib import Path

import pytest
from chats import (
    GEMMA,
    LLAMA3,
    MISTRAL,
    PHI,
    QWEN,
    SPACE_BEFORE_ANSWER,
    THINKING,
    bpe_tokenizer,
    talk,
)
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from postgrad.core.config import DataConfig
from postgrad.core.items import Example
from postgrad.core.templates import VICUNA, find_stop
from postgrad.core.text import (
    answer_trees,
    byte_tokenizer,
    conversation_trees,
    encode_answer,
    encode_conversation,
    encode_prompt,
    encode_prompts,
    set_chat_template,
    stop_ids,
)
from postgrad.errors import DataError, TemplateError

TEMPLATES = {"llama3": LLAMA3, "qwen": QWEN, "gemma": GEMMA, "phi": PHI, "vicuna": VICUNA}
CONVERSATION = talk("Hi there", "Hello.", "What is 2 + 2?", "Four\n\nof  them: 😀")


def supervised_text(tokenizer: PreTrainedTokenizerBase, messages: tuple[dict[str, str], ...]) -> str:
    tokens, supervised = encode_conversation(tokenizer, messages)
    return str(tokenizer.decode([t for t, learnt in zip(tokens, supervised, strict=True) if learnt]))


def whole(tokenizer: PreTrainedTokenizerBase, messages: tuple[dict[str, str], ...]) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def examples(*conversations: tuple[dict[str, str], ...]) -> list[Example]:
    return [Example(str(i), messages) for i, messages in enumerate(conversations)]


def test_byte_conversation_by_hand() -> None:
    tokens, supervised = encode_conversation(byte_tokenizer(), talk("ab", "c", "d", "ef"))
    #                 user a   b   asst c   end user d    asst e    f    end
    assert tokens == (258, 97, 98, 259, 99, 260, 258, 100, 259, 101, 102, 260)
    assert supervised == tuple(token in (99, 101, 102, 260) for token in tokens)


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_stop_tokens_are_supervised_and_nothing_else(name: str) -> None:
    tokenizer = bpe_tokenizer(TEMPLATES[name])
    stop = find_stop(tokenizer).text
    space = " " if name == "vicuna" else ""
    said = [space + message["content"] + stop for message in CONVERSATION if message["role"] == "assistant"]
    assert supervised_text(tokenizer, CONVERSATION) == "".join(said)
    tokens, _ = encode_conversation(tokenizer, CONVERSATION)
    assert tokens[-1] == stop_ids(tokenizer)[0], "nothing may follow the last stop token"
    assert list(tokens) == whole(tokenizer, CONVERSATION)[: len(tokens)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_answer_are_the_conversation(name: str) -> None:
    tokenizer = bpe_tokenizer(TEMPLATES[name])
    tokens, supervised = encode_conversation(tokenizer, CONVERSATION)
    prompt = encode_prompt(tokenizer, CONVERSATION[:-1])
    answer = encode_answer(tokenizer, CONVERSATION[:-1], CONVERSATION[-1]["content"])
    assert prompt + answer == tokens
    assert supervised[len(prompt) :] == (True,) * len(answer)
    assert encode_prompts(tokenizer, [CONVERSATION[:1], CONVERSATION[:3]]) == [
        encode_prompt(tokenizer, CONVERSATION[:1]),
        prompt,
    ]


TEXT = st.text(st.sampled_from("ab .\n:😀<|>é  "), min_size=1, max_size=12).filter(lambda text: text.strip() != "")


@given(st.lists(TEXT, min_size=2, max_size=6), st.sampled_from(sorted(TEMPLATES)))
def test_every_turn_continues_what_a_model_generates_from(texts: list[str], name: str) -> None:
    tokenizer = bpe_tokenizer(TEMPLATES[name])
    messages = talk(*texts[: len(texts) // 2 * 2])
    tokens, supervised = encode_conversation(tokenizer, messages)
    for i in range(1, len(messages), 2):
        prompt = encode_prompt(tokenizer, messages[:i])
        assert tokens[: len(prompt)] == prompt
        assert supervised[len(prompt)] and not supervised[len(prompt) - 1]
    stop = stop_ids(tokenizer)[0]
    ends = [i for i, token in enumerate(tokens) if token == stop and supervised[i]]
    assert len(ends) == len(messages) // 2
    text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    assert text.startswith(tokenizer.decode(tokens))


def test_an_answer_that_would_merge_with_the_header_is_kept_apart() -> None:
    """ "ASSISTANT: " + "Hello": the tokenizer would make one token of the space and the word."""
    tokenizer = bpe_tokenizer(SPACE_BEFORE_ANSWER)
    messages = talk("hello", "Hello there.", "hello", "  Hello")
    tokens, _ = encode_conversation(tokenizer, messages)
    prompt = encode_prompt(tokenizer, messages[:1])
    assert list(tokens) != whole(tokenizer, messages), "the test needs a tokenizer that merges here"
    assert tokens[: len(prompt)] == prompt
    assert tokenizer.decode(tokens) == tokenizer.apply_chat_template(list(messages), tokenize=False)
    assert supervised_text(tokenizer, messages) == "Hello there.</s>  Hello</s>"
    answer = encode_answer(tokenizer, messages[:1], "Hello there.")
    assert tokens[len(prompt) :][: len(answer)] == answer


def test_a_merge_that_cannot_be_undone_names_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postgrad.core.text.MARKERS", ())
    with pytest.raises(
        TemplateError, match=r"merges the end of a prompt, '.*ASSISTANT: ', with the beginning .*'Hello"
    ):
        encode_conversation(bpe_tokenizer(SPACE_BEFORE_ANSWER), talk("hello", "Hello there."))


def test_a_stop_token_lost_in_tokenising_is_an_error() -> None:
    tokenizer = bpe_tokenizer(VICUNA.replace("eos_token", "'STOP'"))
    tokenizer.add_tokens([AddedToken("STOP", single_word=True)])
    with pytest.raises(TemplateError, match="its only stop token 'STOP', found it 0 times and the last tokens"):
        encode_conversation(tokenizer, talk("hello", "Hello"))


def test_an_answer_that_begins_with_a_newline_is_kept_apart() -> None:
    tokenizer = bpe_tokenizer(QWEN)
    messages = talk("hello", "\n\nHello")
    tokens, _ = encode_conversation(tokenizer, messages)
    prompt = encode_prompt(tokenizer, messages[:1])
    assert tokens[: len(prompt)] == prompt
    assert tokenizer.decode(tokens[len(prompt) :]) == "\n\nHello<|im_end|>"


def test_sentencepiece_like_tokenizer(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/weights/stories260K")
    with pytest.raises(TemplateError, match="no chat template"):
        encode_prompt(tokenizer, CONVERSATION[:1])
    set_chat_template(tokenizer, "vicuna")
    tokens, supervised = encode_conversation(tokenizer, CONVERSATION)
    assert list(tokens) == whole(tokenizer, CONVERSATION)
    assert sum(supervised) and tokens[-1] == 2
    prompt = encode_prompt(tokenizer, CONVERSATION[:3])
    assert prompt + encode_answer(tokenizer, CONVERSATION[:3], CONVERSATION[3]["content"]) == tokens
    tokenizer.chat_template = SPACE_BEFORE_ANSWER
    tokens, supervised = encode_conversation(tokenizer, CONVERSATION)
    prompt = encode_prompt(tokenizer, CONVERSATION[:1])
    assert tokens[: len(prompt)] == prompt and supervised[len(prompt)]
    assert tokenizer.decode(tokens) == tokenizer.decode(whole(tokenizer, CONVERSATION))


def test_rewritten_history_keeps_a_mask() -> None:
    thought = "<think>\nhm\n</think>\n\n"
    tokenizer = bpe_tokenizer(THINKING)
    assert supervised_text(tokenizer, talk("q", thought + "one", "q", "two")) == (
        "one<|im_end|><think>\n\n</think>\n\ntwo<|im_end|>"
    )
    tokenizer = bpe_tokenizer(MISTRAL)
    assert supervised_text(tokenizer, talk("q", "one", "q", "two", system="s")) == " one</s> two</s>"


def test_slow_tokenizers_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = bpe_tokenizer(QWEN)
    fast = encode_conversation(tokenizer, CONVERSATION)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    assert encode_conversation(tokenizer, CONVERSATION) == fast


def test_truncation_set_elsewhere_is_not_used() -> None:
    tokenizer = byte_tokenizer()
    tokenizer("abcdef", truncation=True, max_length=2, padding="max_length")
    assert len(encode_prompt(tokenizer, talk("abcdef"))) == 8


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (talk("a", "b", "c"), "ends with the user"),
        (talk("a", " "), "empty response"),
        (talk("a", "b", "", "c"), "empty message"),
        ((), "no messages"),
        (talk("a", "b")[1:], "turns do not alternate user, assistant"),
        (({"role": "tool", "content": "x"},), "unknown role 'tool'"),
        (talk("a", "b <|end|> c"), "special token written in a message"),
    ],
)
def test_what_is_no_conversation_is_refused_or_counted(messages: tuple[dict[str, str], ...], problem: str) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match=problem):
        encode_conversation(tokenizer, messages)
    trees = conversation_trees(tokenizer, examples(messages, talk("a", "b")), DataConfig())
    assert trees.counts == {"read": 2, "kept": 1, "shortened": 0, f"dropped: {problem}": 1}
    with pytest.raises(DataError, match=rf"nothing is left of 1 rows \(dropped: {problem}: 1"):
        conversation_trees(tokenizer, examples(messages), DataConfig())


def test_no_examples_are_no_error() -> None:
    assert conversation_trees(byte_tokenizer(), [], DataConfig()).items == []
    assert answer_trees(byte_tokenizer(), [], DataConfig())[:2] == ([], [])


LONG = talk("u1", "a1", "u2", "a2", "u3", "a3", system="s")  # 2 + 3 * 7 tokens: <|user|>uN<|assistant|>aN<|end|>


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: tuple[int, ...]) -> str:
    text: str = tokenizer.decode(tokens)
    return (
        text.replace("<|assistant|>", "/").replace("<|user|>", " ").replace("<|system|>", "#").replace("<|end|>", ".")
    )


@pytest.mark.parametrize(
    ("limit", "truncate", "expected"),
    [
        (23, "oldest", "#s u1/a1. u2/a2. u3/a3."),
        (22, "oldest", "#s u2/a2. u3/a3."),
        (16, "oldest", "#s u2/a2. u3/a3."),
        (15, "oldest", "#s u3/a3."),
        (9, "oldest", "#s u3/a3."),
        (8, "oldest", ""),
        (22, "end", "#s u1/a1. u2/a2. u3/a3"),
        (7, "end", "#s u1/a"),
        (6, "end", ""),
        (22, "drop", ""),
    ],
)
def test_long_conversations(limit: int, truncate: str, expected: str) -> None:
    tokenizer = byte_tokenizer()
    data = DataConfig(max_length=limit, truncate=truncate)  # type: ignore[arg-type]
    trees = conversation_trees(tokenizer, examples(LONG, talk("u", "a")), data)
    assert [decoded(tokenizer, tree.prompt) for tree in trees.items] == [*([expected] if expected else []), " u/a."]
    dropped = {} if expected else {"dropped: longer than max_length": 1}
    shortened = int(limit < 23 and bool(expected))
    assert trees.counts == {"read": 2, "kept": 1 + bool(expected), "shortened": shortened, **dropped}


@pytest.mark.parametrize(
    ("limit", "truncate", "prompt", "answers"),
    [
        (23, "oldest", "#s u1/a1. u2/a2. u3/", ["a3.", "."]),
        (22, "oldest", "#s u2/a2. u3/", ["a3.", "."]),
        (15, "oldest", "#s u3/", ["a3.", "."]),
        (8, "oldest", "", []),
        (22, "end", "#s u1/a1. u2/a2. u3/", ["a3", "."]),
        (20, "end", "", []),
        (22, "drop", "", []),
    ],
)
def test_long_prompts_are_cut_alike_for_all_answers(limit: int, truncate: str, prompt: str, answers: list[str]) -> None:
    tokenizer = byte_tokenizer()
    data = DataConfig(max_length=limit, truncate=truncate)  # type: ignore[arg-type]
    trees, kept, counts = answer_trees(tokenizer, [(LONG[:-1], ("a3", "")), (talk("u"), ("a",))], data)
    shown = [(decoded(tokenizer, t.prompt), [decoded(tokenizer, a) for a in t.answers]) for t in trees]
    assert shown == [*([(prompt, answers)] if prompt else []), (" u/", ["a."])]
    assert kept == ([0, 1] if prompt else [1])
    assert counts["kept"] == len(kept)
    assert counts["shortened"] == int(limit < 23 and bool(prompt))
    assert counts.get("dropped: longer than max_length", 0) == int(not prompt)


def test_a_prompt_longer_than_the_context_says_what_to_raise() -> None:
    with pytest.raises(DataError, match=r"nothing is left of 1 rows .*longer than max_length: 1; max_length 50 tokens"):
        answer_trees(byte_tokenizer(), [(talk("u" * 100), ("a",))], DataConfig(max_length=50))


def test_trees_equal_single_calls_whatever_the_batch() -> None:
    tokenizer = bpe_tokenizer(LLAMA3)
    conversations = [talk(f"Ask {i}", f"Tell {i}", *(["More?", f" Yes\n{i}"] * (i % 3))) for i in range(40)]
    trees = conversation_trees(tokenizer, examples(*conversations), DataConfig())
    assert [(t.prompt, t.supervised) for t in trees.items] == [encode_conversation(tokenizer, c) for c in conversations]
    items = [(c[:-1], (c[-1]["content"], "no")) for c in conversations]
    branches, kept, _ = answer_trees(tokenizer, items, DataConfig())
    assert kept == list(range(40))
    for tree, (messages, answers) in zip(branches, items, strict=True):
        assert tree.prompt == encode_prompt(tokenizer, messages)
        assert tree.answers == tuple(encode_answer(tokenizer, messages, answer) for answer in answers)


def test_prompts_without_answers_are_counted() -> None:
    _, kept, counts = answer_trees(byte_tokenizer(), [(talk("u"), ()), (talk("u"), ("a",))], DataConfig())
    assert (kept, counts["dropped: no answers"]) == ([1], 1)
