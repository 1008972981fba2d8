"""Where the assistant speaks in a rendered conversation.

An answer begins where its prompt, rendered with the header that asks for an answer, ends; it ends with the first
stop token after that. Templates that write earlier turns differently once the conversation goes on (they move the
system text, or open every prompt with a mark for thinking) break this for earlier turns. Those are found by
rendering the same conversation with marks in place of texts: it shows what the template writes around each.
"""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from postgrad.core.items import Message
from postgrad.core.templates import MARK, Stop, common_prefix, prefix_error, render
from postgrad.errors import TemplateError

Span = tuple[int, int]


def answer_spans(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], stop: Stop
) -> list[tuple[str, list[Span]]]:
    """Render conversations; give each text and where its answers are, stop token included.

    Messages must not hold special tokens as text.

    Raises:
        TemplateError: the last answer does not continue its prompt, or an answer has no stop token.
    """
    texts = render(tokenizer, conversations, generation=False)
    turns = [[i for i, m in enumerate(messages) if m["role"] == "assistant"] for messages in conversations]
    prompts = iter(
        render(
            tokenizer,
            [messages[:i] for messages, its in zip(conversations, turns, strict=True) for i in its],
            generation=True,
        )
    )
    found = []
    for messages, its, text in zip(conversations, turns, texts, strict=True):
        before = [next(prompts) for _ in its]
        starts = _starts(tokenizer, messages, text, before)
        found.append((text, _close(messages, its, text, starts, stop)))
    return found


def _starts(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str, prompts: Sequence[str]
) -> list[int]:
    """Find where each answer begins."""
    if not text.startswith(prompts[-1]):
        raise prefix_error(prompts[-1], text)
    if all(map(text.startswith, prompts)):
        return [len(prompt) for prompt in prompts]
    return [*_rewritten_starts(tokenizer, messages, text)[:-1], len(prompts[-1])]


def _close(
    messages: Sequence[Message], turns: Sequence[int], text: str, starts: Sequence[int], stop: Stop
) -> list[Span]:
    """Find where each answer ends: after the first stop token, before the user speaks again."""
    spans = []
    for turn, start, limit in zip(turns, starts, [*starts[1:], len(text)], strict=True):
        end = text.find(stop.text, start, limit) + len(stop.text)
        user = messages[turn + 1]["content"].strip() if turn + 1 < len(messages) else ""
        if end < start or text.find(user, end, limit) < 0:
            raise TemplateError(
                f"expected the stop token {stop.text!r} after each assistant message, found none after "
                f"message {turn} in {text[start : start + 80]!r}. A model trained on it would not stop there. "
                "Set model.chat_template to a template that ends every answer."
            )
        spans.append((start, end))
    return spans


def _rewritten_starts(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str) -> list[int]:
    """Find where answers begin in a conversation whose earlier turns the template rewrote.

    The part of the header that a prompt would show stays unsupervised; what else the template writes between the
    header and the answer counts as answer.
    """
    marked = [{**message, "content": f"{MARK}{i:04d}{MARK}"} for i, message in enumerate(messages)]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    frames = render(tokenizer, [marked], generation=False)
    prompts = render(tokenizer, [marked[:i] for i in turns], generation=True)
    parts = re.split(f"{MARK}(\\d{{4}}){MARK}", frames[0])
    literals, order = parts[0::2], [int(number) for number in parts[1::2]]
    places = _fill(text, literals, [messages[i]["content"] for i in order])
    starts = []
    for turn, prompt in zip(turns, prompts, strict=True):
        if order.count(turn) != 1:
            raise TemplateError(
                f"expected the chat template to write message {turn} (assistant) once in a conversation of "
                f"{len(messages)} messages, found it {order.count(turn)} times. Set model.chat_template to another "
                "template."
            )
        at = order.index(turn)
        header = prompt[prompt.rfind(MARK) + len(MARK) :]
        starts.append(places[at] - len(literals[at]) + common_prefix(literals[at], header))
    return starts


def _fill(text: str, literals: Sequence[str], contents: Sequence[str]) -> list[int]:
    """Find where each content begins in a text of literals and contents in turn; contents may be rewritten."""
    places = []
    at = len(literals[0])
    fits = text.startswith(literals[0])
    for literal, content in zip(literals[1:], contents, strict=True):
        places.append(at)
        kept = [c for c in (content, content.strip()) if text.startswith(c + literal, at)]
        end = at + len(kept[0]) if kept else text.find(literal, at)
        fits = fits and end >= 0
        at = end + len(literal)
    if not fits or at != len(text):
        raise TemplateError(
            "the chat template rewrites earlier turns so that the assistant's text cannot be told: expected the "
            f"parts {list(literals)} around the messages, found {text[:400]!r}. Set model.chat_template to a "
            "template that keeps the history as it is."
        )
    return places
