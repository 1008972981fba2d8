"""Where the assistant speaks, in templates that keep the history and in those that rewrite it."""

import pytest
from chats import (
    GEMMA,
    LLAMA3,
    MISTRAL,
    OPEN_THOUGHT,
    PHI,
    QWEN,
    STOP_AT_THE_VERY_END,
    THINKING,
    bpe_tokenizer,
    talk,
)

from postgrad.core.spans import answer_spans
from postgrad.core.templates import VICUNA, Stop, find_stop
from postgrad.errors import TemplateError


def spoken(template: str, messages: tuple[dict[str, str], ...]) -> list[str]:
    tokenizer = bpe_tokenizer(template)
    ((text, spans),) = answer_spans(tokenizer, [messages], find_stop(tokenizer))
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("template", "stop", "space"),
    [
        (LLAMA3, "<|eot_id|>", ""),
        (QWEN, "<|im_end|>", ""),
        (GEMMA, "<end_of_turn>", ""),
        (PHI, "<|end|>", ""),
        (VICUNA, "</s>", " "),
    ],
)
def test_answers_and_their_stop_tokens(template: str, stop: str, space: str) -> None:
    # Answers that occur in the headers and in each other must not confuse the search.
    answers = ("user", "a", "assistant", "model\n\nuser: a")
    texts = [part for answer in answers for part in ("assistant", answer)]
    assert spoken(template, talk(*texts)) == [space + answer + stop for answer in answers]


def test_thinking_is_cut_from_earlier_answers_and_kept_in_the_last() -> None:
    thought = "<think>\nhm\n</think>\n\n"
    assert spoken(THINKING, talk("q", thought + "one", "q", thought + "two")) == [
        "one<|im_end|>",
        thought + "two<|im_end|>",
    ]
    # An empty thought that the template itself writes into the last answer is generated too.
    assert spoken(THINKING, talk("q", "one", "q", "two"))[1] == "<think>\n\n</think>\n\ntwo<|im_end|>"


def test_a_moved_system_text_is_found_by_marks() -> None:
    conversation = talk("a", "a", "[/INST]a", " a ", "INST", "b", system="a")
    assert spoken(MISTRAL, conversation) == [" a</s>", "  a </s>", " b</s>"]


def test_a_header_the_history_does_not_show_is_an_error() -> None:
    tokenizer = bpe_tokenizer(OPEN_THOUGHT)
    stop = Stop("</s>", tokenizer.eos_token_id)
    with pytest.raises(TemplateError, match=r"the prompt goes on with '<think>"):
        answer_spans(tokenizer, [talk("q", "a")], stop)


def test_earlier_answers_without_stop_token_are_an_error() -> None:
    tokenizer = bpe_tokenizer(STOP_AT_THE_VERY_END)
    with pytest.raises(TemplateError, match=r"expected the stop token '</s>' after each.*none after message 1"):
        answer_spans(tokenizer, [talk("q", "a", "r", "b")], find_stop(tokenizer))


def test_a_history_rewritten_beyond_recognition_is_an_error() -> None:
    # The system text moves, so marks are needed; what stands around a text depends on its length, so they mislead.
    template = MISTRAL.replace("'[INST] '", "'[INST ' ~ m['content'] | length ~ '] '")
    tokenizer = bpe_tokenizer(template)
    with pytest.raises(
        TemplateError, match=r"rewrites earlier turns so that .*expected the parts .*found '<s>\[INST 8\]"
    ):
        answer_spans(tokenizer, [talk("question", "a", "r", "b", system="s")], find_stop(tokenizer))


def test_a_history_without_answers_is_an_error() -> None:
    template = MISTRAL.replace(
        "{{ ' ' + m['content'] + eos_token }}", "{{ ' ' + m['content'] + eos_token if loop.last }}"
    )
    tokenizer = bpe_tokenizer(template)
    with pytest.raises(TemplateError, match=r"expected .*to write message 2 \(assistant\) once .*found it 0 times"):
        answer_spans(tokenizer, [talk("q", "a", "r", "b", system="s")], find_stop(tokenizer))
