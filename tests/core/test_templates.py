"""Chat templates: the built-in ones, their stop tokens, and what is refused."""

from pathlib import Path

import pytest
from chats import GEMMA, LLAMA3, NO_HEADER, NO_STOP, OPEN_THOUGHT, PHI, QWEN, THINKING, bpe_tokenizer, talk
from transformers import AutoTokenizer

from postgrad.core.templates import byte_tokenizer, find_stop, render, set_chat_template, special_pattern, stop_ids
from postgrad.errors import TemplateError


def test_byte_tokenizer_is_bytes_and_five_tokens() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 261
    text = "héllo \n\t 漢字 😀"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids(["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]) == [
        256, 257, 258, 259, 260,
    ]  # fmt: skip
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, stop_ids(tokenizer)) == (256, 260, (260,))


def test_byte_tokenizer_survives_saving(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == byte_tokenizer().chat_template
    text = "a  b.<|user|>\n'm"
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (len(loaded), loaded.pad_token_id, stop_ids(loaded)) == (261, 256, (260,))


def test_vicuna_is_the_text_of_the_paper_s_model() -> None:
    tokenizer = bpe_tokenizer("")
    set_chat_template(tokenizer, "vicuna")
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    conversation = talk("Hi!", "Hello.", "Who are you?")
    assert render(tokenizer, [conversation], generation=True) == [
        f"<s>{system} USER: Hi! ASSISTANT: Hello.</s>USER: Who are you? ASSISTANT:"
    ]
    assert render(tokenizer, [talk("Hi!", "Yo.", system="Be brief.")], generation=False) == [
        "<s>Be brief. USER: Hi! ASSISTANT: Yo.</s>"
    ]


@pytest.mark.parametrize(
    ("template", "stop"),
    [
        (LLAMA3, "<|eot_id|>"),
        (QWEN, "<|im_end|>"),
        (GEMMA, "<end_of_turn>"),
        (PHI, "<|end|>"),
        (THINKING, "<|im_end|>"),
    ],
)
def test_stop_is_the_template_s_own_token_then_the_end_of_text(template: str, stop: str) -> None:
    tokenizer = bpe_tokenizer(template)
    assert find_stop(tokenizer).text == stop
    assert stop_ids(tokenizer) == tuple(tokenizer.convert_tokens_to_ids([stop, "</s>"]))


def test_a_template_without_stop_token_is_refused_with_its_last_tokens() -> None:
    with pytest.raises(TemplateError, match=r"expected a stop token .*found none.*as tokens \[.*'Ċ'\].*eos_token"):
        find_stop(bpe_tokenizer(NO_STOP))


def test_a_stop_mark_that_is_no_token_is_refused(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/weights/stories260K")
    with pytest.raises(TemplateError, match=r"chatml.*found none: the text ends in .*<.im_end.>"):
        set_chat_template(tokenizer, "chatml")
    assert not tokenizer.chat_template, "a refused template must not stay"
    set_chat_template(tokenizer, "vicuna")
    assert find_stop(tokenizer).id == 2


def test_no_chat_template_lists_the_built_in_ones() -> None:
    with pytest.raises(TemplateError, match=r"no chat template.*chatml, turns, vicuna.*\.jinja"):
        render(bpe_tokenizer(""), [talk("Hi")], generation=True)


def test_unknown_names_suggest_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"found 'vicunna'.*Did you mean 'vicuna'"):
        set_chat_template(byte_tokenizer(), "vicunna")
    with pytest.raises(TemplateError, match=r"a \.jinja file, found .*missing\.jinja"):
        set_chat_template(byte_tokenizer(), str(tmp_path / "missing.jinja"))


def test_template_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(QWEN, encoding="utf-8")
    tokenizer = bpe_tokenizer("")
    set_chat_template(tokenizer, str(file))
    assert render(tokenizer, [talk("Hi", system="S")], generation=True)[0].startswith("<|im_start|>system\nS<|im_end|>")
    file.write_text("{% for %}", encoding="utf-8")
    with pytest.raises(TemplateError, match="refused conversation 0"):
        set_chat_template(tokenizer, str(file))


def test_a_refused_system_role_names_the_conversation() -> None:
    conversations = [talk("Hi"), talk("Hi", system="Be brief.")]
    with pytest.raises(TemplateError, match=r"refused conversation 1 \(roles: system, user\): System role not supp"):
        render(bpe_tokenizer(GEMMA), conversations, generation=True)


def test_a_header_that_only_comes_with_an_answer_is_refused() -> None:
    with pytest.raises(TemplateError, match=r"ignores add_generation_prompt: it writes '<.im_start.>assistant\\n'"):
        find_stop(bpe_tokenizer(NO_HEADER))


def test_a_header_that_the_history_does_not_show_is_refused() -> None:
    with pytest.raises(TemplateError, match=r"they part after .*assistant.*the prompt goes on with '<think>\\n'"):
        find_stop(bpe_tokenizer(OPEN_THOUGHT))


def test_a_template_that_loses_the_answer_is_refused() -> None:
    with pytest.raises(TemplateError, match="assistant's text once, found it 0 times"):
        find_stop(bpe_tokenizer("{{ messages[0]['content'] + eos_token }}"))


def test_templates_see_one_fixed_date() -> None:
    dated = bpe_tokenizer("{{ strftime_now('%d %b %Y') }}" + QWEN)
    assert render(dated, [talk("Hi")], generation=True)[0].startswith("26 Jul 2024")


def test_special_pattern_finds_written_tokens_only() -> None:
    pattern = special_pattern(byte_tokenizer())
    assert pattern.search("a <|end|> b")
    assert not pattern.search("a <|stop|> end pad")
