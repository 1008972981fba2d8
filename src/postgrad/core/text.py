"""Conversations to tokens: what a model reads, what it learns from, what gives way when a row is too long.

The tokens before an answer are those a model generates from: the prompt is rendered with the header that asks for
an answer and tokenised; the answer, up to and with its stop token, is tokenised as its continuation. So no token
straddles the border, and training, scoring and sampling see the same ids.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from postgrad.core.config import DataConfig
from postgrad.core.items import Example, Loaded, Message, conversation_problem, prompt_problem
from postgrad.core.rows import Tree
from postgrad.core.spans import answer_spans
from postgrad.core.templates import (
    CHAT_TEMPLATES,
    Stop,
    byte_tokenizer,
    find_stop,
    prefix_error,
    render,
    set_chat_template,
    special_pattern,
    stop_ids,
)
from postgrad.errors import DataError, TemplateError

__all__ = [
    "CHAT_TEMPLATES",
    "answer_trees",
    "byte_tokenizer",
    "conversation_trees",
    "encode_answer",
    "encode_conversation",
    "encode_prompt",
    "encode_prompts",
    "set_chat_template",
    "stop_ids",
]

Branches = tuple[Sequence[Message], tuple[str, ...]]
"""A prompt and its answers."""
TAIL = 48
"""Characters of context with which a continuation is tokenised."""
MARKERS = ("\n", "a", ".", "1")
"""Texts put before a continuation that must not merge with what stands before it."""
CHUNK = 1000
"""Conversations tokenised in one call; bounds memory."""
SPECIAL = "special token written in a message"
TOO_LONG = "longer than max_length"


@dataclass(frozen=True)
class _Encoded:
    """A conversation as tokens; ``ends`` is where each answer ends."""

    tokens: tuple[int, ...]
    supervised: tuple[bool, ...]
    ends: tuple[int, ...]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[int, ...]:
    """Tokenise a prompt with the header that asks for an answer: what a model generates from."""
    return encode_prompts(tokenizer, [messages])[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]]) -> list[tuple[int, ...]]:
    """Tokenise many prompts, each with the header that asks for an answer."""
    return list(map(tuple, _tokenize(tokenizer, render(tokenizer, prompts, generation=True))))


def encode_answer(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], response: str) -> tuple[int, ...]:
    """Tokenise a response as the continuation of its prompt: the stop token last, nothing after it."""
    forged = _forged(special_pattern(tokenizer), [*_contents(messages), response])
    _refuse(prompt_problem(messages) or forged, messages)
    return _encode_branches(tokenizer, [(messages, (response,))])[0].answers[0]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Tokenise a conversation and mark what is learnt: each assistant text and its stop token.

    The tokens end with the last stop token.

    Raises:
        DataError: the messages are no conversation that ends with the assistant.
        TemplateError: the template has no stop token, or rewrites turns so that answers cannot be found.
    """
    forged = _forged(special_pattern(tokenizer), _contents(messages))
    _refuse(conversation_problem(messages) or forged, messages)
    encoded = _encode_conversations(tokenizer, [messages])[0]
    return encoded.tokens, encoded.supervised


def conversation_trees(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], data: DataConfig
) -> Loaded[Tree]:
    """Turn conversations into trees without answers, whose assistant tokens are the targets.

    Too long ones lose their oldest exchanges ("oldest"; the system text stays), their end ("end") or are
    dropped; a single exchange that is too long is dropped unless its end may be cut.

    Returns: the trees, and counts of examples read, kept, shortened, and dropped for each reason.
    Raises:
        DataError: nothing is left of a list that was not empty.
    """
    counts: Counter[str] = Counter(read=len(examples), kept=0, shortened=0)
    trees: dict[int, Tree] = {}
    waiting: list[tuple[int, Sequence[Message]]] = []
    special = special_pattern(tokenizer)
    for i, example in enumerate(examples):
        problem = conversation_problem(example.messages) or _forged(special, _contents(example.messages))
        if problem:
            counts[f"dropped: {problem}"] += 1
        else:
            waiting.append((i, example.messages))
    while waiting:
        encoded = _encode_conversations(tokenizer, [messages for _, messages in waiting])
        again = []
        for (i, messages), one in zip(waiting, encoded, strict=True):
            shorter = _shorter_conversation(messages, one, data)
            if isinstance(shorter, Tree):
                trees[i] = replace(shorter, weight=examples[i].weight)
                cut = len(shorter.prompt) < len(one.tokens)
                counts["shortened"] += cut or messages is not examples[i].messages
            elif shorter:
                again.append((i, shorter))
            else:
                counts[f"dropped: {TOO_LONG}"] += 1
        waiting = again
    counts["kept"] = len(trees)
    _require_some(counts, data)
    return Loaded([trees[i] for i in sorted(trees)], dict(counts))


def answer_trees(
    tokenizer: PreTrainedTokenizerBase, prompts_and_answers: Sequence[Branches], data: DataConfig
) -> tuple[list[Tree], list[int], dict[str, int]]:
    """Turn prompts with their answers into trees.

    A prompt too long for its longest answer loses its oldest exchanges, the same for all answers ("oldest";
    the system text stays), or the answers lose their ends ("end"); what still does not fit is dropped whole.

    Returns: the trees; which item each came from; counts of items read, kept, shortened, dropped for each reason.
    Raises:
        DataError: nothing is left of a list that was not empty.
    """
    counts: Counter[str] = Counter(read=len(prompts_and_answers), kept=0, shortened=0)
    trees: dict[int, Tree] = {}
    waiting: list[tuple[int, Branches]] = []
    special = special_pattern(tokenizer)
    for i, (messages, answers) in enumerate(prompts_and_answers):
        problem = prompt_problem(messages) or _forged(special, [*_contents(messages), *answers])
        problem = problem or ("" if answers else "no answers")
        if problem:
            counts[f"dropped: {problem}"] += 1
        else:
            waiting.append((i, (messages, answers)))
    while waiting:
        again: list[tuple[int, Branches]] = []
        for (i, (messages, answers)), tree in zip(
            waiting, _encode_branches(tokenizer, [branches for _, branches in waiting]), strict=True
        ):
            shorter = _shorter_branches(messages, tree, data)
            if isinstance(shorter, Tree):
                trees[i] = shorter
                counts["shortened"] += shorter is not tree or messages is not prompts_and_answers[i][0]
            elif shorter:
                again.append((i, (shorter, answers)))
            else:
                counts[f"dropped: {TOO_LONG}"] += 1
        waiting = again
    counts["kept"] = len(trees)
    _require_some(counts, data)
    kept = sorted(trees)
    return [trees[i] for i in kept], kept, dict(counts)


def _shorter_conversation(
    messages: Sequence[Message], encoded: _Encoded, data: DataConfig
) -> Tree | Sequence[Message] | None:
    """Give the tree when it fits or may be cut, else shorter messages to try, else nothing."""
    limit = data.max_length
    tokens, supervised = encoded.tokens, encoded.supervised
    if len(tokens) <= limit:
        return Tree(prompt=tokens, supervised=supervised)
    if data.truncate == "end" and any(supervised[1:limit]):
        return Tree(prompt=tokens[:limit], supervised=supervised[:limit])
    if data.truncate != "oldest":
        return None
    # Fewer than this many exchanges cannot be enough, whatever the system text takes.
    needed = next(i for i, end in enumerate(encoded.ends, start=1) if len(tokens) - end <= limit)
    for _ in range(needed):
        messages = _without_oldest(messages)
    return messages


def _shorter_branches(messages: Sequence[Message], tree: Tree, data: DataConfig) -> Tree | Sequence[Message] | None:
    """Give the tree when it fits or its answers may be cut, else a shorter prompt to try, else nothing."""
    room = data.max_length - len(tree.prompt)
    if max(map(len, tree.answers)) <= room:
        return tree
    if data.truncate == "end" and room > 0:
        return Tree(prompt=tree.prompt, answers=tuple(answer[:room] for answer in tree.answers))
    return _without_oldest(messages) if data.truncate == "oldest" else None


def _without_oldest(messages: Sequence[Message]) -> Sequence[Message]:
    """Remove the first question and its answer, not the system text; nothing is left of a single exchange."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    rest = messages[first + 2 :]
    return (*messages[:first], *rest) if rest else ()


def _encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]]
) -> list[_Encoded]:
    """Tokenise conversations in chunks; answers are tokenised as continuations of what stands before them."""
    stop, special = find_stop(tokenizer), special_pattern(tokenizer)
    encoded: list[_Encoded] = []
    for at in range(0, len(conversations), CHUNK):
        rendered = answer_spans(tokenizer, conversations[at : at + CHUNK], stop)
        joints = []
        for text, spans in rendered:
            cuts = [0, *(place for span in spans for place in span)]
            joints += [(_tail(text[max(0, a - TAIL) : a], special), text[a:b]) for a, b in pairwise(cuts)]
        pieces = iter(_continue(tokenizer, joints))
        for _, spans in rendered:
            encoded.append(_assemble(tokenizer, [(next(pieces), next(pieces)) for _ in spans], stop))
    return encoded


def _assemble(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[list[int], list[int]]], stop: Stop) -> _Encoded:
    """Join the tokens of prompts and answers in turn."""
    tokens: list[int] = []
    supervised: list[bool] = []
    ends = []
    for before, answer in turns:
        _require_stop(tokenizer, answer, stop)
        tokens += before + answer
        supervised += [False] * len(before) + [True] * len(answer)
        ends.append(len(tokens))
    return _Encoded(tuple(tokens), tuple(supervised), tuple(ends))


def _encode_branches(tokenizer: PreTrainedTokenizerBase, items: Sequence[Branches]) -> list[Tree]:
    """Tokenise prompts and their answers in chunks."""
    stop, special = find_stop(tokenizer), special_pattern(tokenizer)
    trees = []
    for at in range(0, len(items), CHUNK):
        chunk = items[at : at + CHUNK]
        prompts = render(tokenizer, [messages for messages, _ in chunk], generation=True)
        whole = [
            [*messages, {"role": "assistant", "content": answer}] for messages, answers in chunk for answer in answers
        ]
        texts = iter(render(tokenizer, whole, generation=False))
        joints = [
            (_tail(prompt[-TAIL:], special), _answer_text(prompt, next(texts), stop))
            for prompt, (_, answers) in zip(prompts, chunk, strict=True)
            for _ in answers
        ]
        pieces = iter(_continue(tokenizer, joints))
        for tokens, (_, answers) in zip(_tokenize(tokenizer, prompts), chunk, strict=True):
            branches = [next(pieces) for _ in answers]
            for branch in branches:
                _require_stop(tokenizer, branch, stop)
            trees.append(Tree(prompt=tuple(tokens), answers=tuple(map(tuple, branches))))
    return trees


def _answer_text(prompt: str, text: str, stop: Stop) -> str:
    """Cut the answer, with its stop token, out of a rendered conversation."""
    if not text.startswith(prompt):
        raise prefix_error(prompt, text)
    end = text.find(stop.text, len(prompt))
    return text[len(prompt) : end + len(stop.text)] if end >= 0 else text[len(prompt) :]


def _tail(text: str, special: re.Pattern[str]) -> str:
    """Cut a context down to its last special token: what stands before it cannot change what follows."""
    last = max((match.start() for match in special.finditer(text)), default=0)
    return text[last:]


def _continue(tokenizer: PreTrainedTokenizerBase, joints: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Tokenise each second text as what follows its first: together their tokens spell both."""
    tails = list(dict.fromkeys(tail for tail, _ in joints))
    heads = dict(zip(tails, _tokenize(tokenizer, tails), strict=True))
    wholes = _tokenize(tokenizer, [tail + piece for tail, piece in joints])
    pieces = []
    for (tail, piece), whole in zip(joints, wholes, strict=True):
        head = heads[tail] if tail else []
        fits = whole[: len(head)] == head
        pieces.append(whole[len(head) :] if fits else _unmerged(tokenizer, tail, piece))
    return pieces


def _unmerged(tokenizer: PreTrainedTokenizerBase, tail: str, piece: str) -> list[int]:
    """Tokenise a continuation whose beginning the tokenizer would merge with the end of its context."""
    head, whole = _tokenize(tokenizer, [tail, tail + piece])
    for marker in MARKERS:
        lead, rest = _tokenize(tokenizer, [marker, marker + piece])
        ids = rest[len(lead) :]
        if rest[: len(lead)] == lead and _spell(tokenizer, head + ids) == _spell(tokenizer, whole):
            return ids
    raise TemplateError(
        f"the tokenizer merges the end of a prompt, {tail[-20:]!r}, with the beginning of its answer, "
        f"{piece[:20]!r}, so a model could not have generated it. Set model.chat_template to a template whose "
        "header ends otherwise."
    )


def _spell(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts in one call, adding no special tokens: templates write them."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        slow: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return slow
    backend = tokenizer.backend_tokenizer  # a third faster than through the tokenizer: no offsets, no masks
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _require_stop(tokenizer: PreTrainedTokenizerBase, answer: list[int], stop: Stop) -> None:
    if answer.count(stop.id) != 1 or answer[-1] != stop.id:
        last = tokenizer.convert_ids_to_tokens(answer[-6:])
        raise TemplateError(
            f"expected an answer to end with its only stop token {stop.text!r}, found it "
            f"{answer.count(stop.id)} times and the last tokens {last}. Set model.chat_template to another template."
        )


def _forged(special: re.Pattern[str], texts: Iterable[str]) -> str:
    return SPECIAL if any(map(special.search, texts)) else ""


def _contents(messages: Sequence[Message]) -> list[str]:
    return [message["content"] for message in messages]


def _refuse(problem: str, messages: Sequence[Message]) -> None:
    if problem:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"cannot encode a conversation of roles ({roles}): {problem}")


def _require_some(counts: Counter[str], data: DataConfig) -> None:
    if counts["read"] and not counts["kept"]:
        reasons = ", ".join(f"{name}: {n}" for name, n in counts.items() if name.startswith("dropped"))
        raise DataError(
            f"{data.path or 'data'}: nothing is left of {counts['read']} rows ({reasons}; max_length "
            f"{data.max_length} tokens, truncate {data.truncate!r}). Raise data.max_length or mend the data."
        )
