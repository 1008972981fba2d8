"""Chat templates: the built-in ones, rendering, and what a template does at the end of an answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path

from jinja2.exceptions import TemplateError as JinjaError
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from postgrad.core.items import Message
from postgrad.errors import TemplateError

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}" + VICUNA_SYSTEM + "{% endif %}{{ ' ' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHAT_TEMPLATES: dict[str, str] = {"vicuna": VICUNA, "chatml": CHATML, "turns": TURNS}
"""Built-in templates: Xwin-LM's and Vicuna's, Qwen's, the byte tokenizer's."""

BYTE_SPECIALS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
MARK = "qxzqxz"
"""Stands for a message's text in probes; unlikely to be part of any template."""
TODAY = datetime(2024, 7, 26)
"""What templates that ask for the date are told: the same tokens on every day (Llama 3's own default)."""


@dataclass(frozen=True)
class Stop:
    """The token that ends every answer."""

    text: str
    id: int


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of 256 bytes and 5 special tokens, with the "turns" chat template."""
    alphabet = _byte_letters()
    model = BPE(vocab={letter: byte for byte, letter in enumerate(alphabet)}, merges=[])
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(BYTE_SPECIALS))  # ids 256 to 260, in this order
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=BYTE_SPECIALS[0],
        eos_token=BYTE_SPECIALS[-1],
        additional_special_tokens=list(BYTE_SPECIALS[1:-1]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TURNS
    return tokenizer


def _byte_letters() -> list[str]:
    """List the letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name_or_file: str) -> None:
    """Give the tokenizer a built-in template or one from a file, and check that it can be trained on.

    Raises:
        TemplateError: unknown name, unreadable file, or a template that does not fit the tokenizer.
    """
    if name_or_file in CHAT_TEMPLATES:
        template = CHAT_TEMPLATES[name_or_file]
    elif Path(name_or_file).is_file():
        template = Path(name_or_file).read_text(encoding="utf-8")
    else:
        near = get_close_matches(name_or_file, CHAT_TEMPLATES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TemplateError(
            f"chat_template: expected a built-in name ({_built_in()}) or a .jinja file, found "
            f"{name_or_file!r}, which is neither.{hint}"
        )
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        find_stop(tokenizer)
    except TemplateError as error:
        tokenizer.chat_template = before
        raise TemplateError(f"chat_template {name_or_file!r}: {error}") from error


def render(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], *, generation: bool
) -> list[str]:
    """Render conversations to text, with or without the header that asks for an answer.

    Raises:
        TemplateError: no chat template, or the template refuses a conversation (the message says which).
    """
    if not tokenizer.chat_template:
        raise TemplateError(
            "the tokenizer has no chat template, so messages cannot become text. Set model.chat_template to "
            f"a built-in name ({_built_in()}) or to a .jinja file."
        )
    if not conversations:
        return []
    try:
        return _apply(tokenizer, conversations, generation)
    except (JinjaError, TypeError) as error:
        number, reason = _refused(tokenizer, conversations, generation) or (0, error)
        roles = ", ".join(message["role"] for message in conversations[number])
        raise TemplateError(
            f"the chat template refused conversation {number} (roles: {roles}): {reason}. "
            "Change those messages in the data, or set model.chat_template to another template."
        ) from error


def _apply(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], generation: bool
) -> list[str]:
    texts: list[str] = tokenizer.apply_chat_template(
        [list(messages) for messages in conversations],
        tokenize=False,
        add_generation_prompt=generation,
        strftime_now=TODAY.strftime,
    )
    return texts


def _refused(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], generation: bool
) -> tuple[int, Exception] | None:
    """Find the first conversation of a batch that the template cannot render, and why."""
    for number, messages in enumerate(conversations):
        try:
            _apply(tokenizer, [messages], generation)
        except (JinjaError, TypeError) as reason:
            return number, reason
    return None


def find_stop(tokenizer: PreTrainedTokenizerBase) -> Stop:
    """Find the token with which the template ends an answer, from a probe.

    Raises:
        TemplateError: no such token (a model could never learn to stop), or no header to generate from.
    """
    question = [{"role": "user", "content": "Hi"}]
    exchange = [*question, {"role": "assistant", "content": MARK}]
    prompt = render(tokenizer, [question], generation=True)[0]
    whole = render(tokenizer, [exchange], generation=False)[0]
    if whole.count(MARK) != 1:
        raise TemplateError(
            f"expected the chat template to write an assistant's text once, found it {whole.count(MARK)} times "
            f"in {whole[-200:]!r}. Set model.chat_template to another template."
        )
    before, after = whole.split(MARK)
    if not before.startswith(prompt):
        raise prefix_error(prompt, before + "...")
    header = before[len(prompt) :]
    if header.strip() and render(tokenizer, [question], generation=False) == [prompt]:
        raise TemplateError(
            f"the chat template ignores add_generation_prompt: it writes {header!r} only together with an "
            "answer, so a model would have to invent it. Write it when add_generation_prompt is set, too."
        )
    places = [(after.find(token.content), -len(token.content), id_, token.content)
              for id_, token in tokenizer.added_tokens_decoder.items() if token.content in after]  # fmt: skip
    if not places:
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        last = tokenizer.convert_ids_to_tokens(ids[-6:])
        raise TemplateError(
            f"expected a stop token after an assistant's text, found none: the text ends in {whole[-20:]!r}, "
            f"as tokens {last}. A model trained on it would never stop. Write {{{{ eos_token }}}} "
            f"({tokenizer.eos_token}) after each assistant message, or add the end mark to the tokenizer."
        )
    _, _, stop_id, text = min(places)
    return Stop(text=text, id=stop_id)


def prefix_error(prompt: str, whole: str) -> TemplateError:
    """Describe where the prompt with its answer stops continuing the prompt alone."""
    at = common_prefix(prompt, whole)
    return TemplateError(
        "expected the prompt and answer to begin with the text a model generates from; they part after "
        f"{prompt[max(0, at - 40) : at]!r}: the prompt goes on with {prompt[at : at + 60]!r}, the conversation "
        f"with {whole[at : at + 60]!r}. Set model.chat_template to a template that renders both alike."
    )


def common_prefix(a: str, b: str) -> int:
    """Count the characters two texts share at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """List the tokens at which generation stops: the template's, then the tokenizer's end of text."""
    ids = [find_stop(tokenizer).id, tokenizer.eos_token_id]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Build a pattern that finds special tokens written out in plain text; such text would forge turns."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _built_in() -> str:
    return ", ".join(sorted(CHAT_TEMPLATES))
