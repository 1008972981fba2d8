"""Chat templates shaped like those of public models, and tokenizers to try them with."""

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

RAISE = "{{ raise_exception('System role not supported') }}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}" + RAISE + "{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Phi-3: the end-of-text token once more after the whole conversation.
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Qwen 3: an empty thought in the last answer, thoughts cut out of earlier ones.
THINKING = (
    "{% for m in messages %}{% set text = m['content'] %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% if loop.last and '</think>' not in text %}{{ '<think>\n\n</think>\n\n' }}"
    "{% elif not loop.last and '</think>' in text %}{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% endif %}{{ text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Mistral v3: the system text stands in the last question.
MISTRAL = (
    "{{ bos_token }}{% set talk = messages %}{% set rule = '' %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set rule = messages[0]['content'] + '\n\n' %}{% set talk = messages[1:] %}{% endif %}"
    "{% for m in talk %}{% if m['role'] == 'user' %}"
    "{% set lead = rule if loop.index0 >= talk | length - (1 if add_generation_prompt else 2) else '' %}"
    "{{ '[INST] ' + lead + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# DeepSeek-R1: the header opens a thought that the history does not show.
OPEN_THOUGHT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
    "{% else %}{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
SPACE_BEFORE_ANSWER = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT: ' }}{% endif %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
STOP_AT_THE_VERY_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% else %}{{ eos_token }}{% endif %}"
)
NO_HEADER = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"

SPECIALS = (
    "<s>", "</s>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>",
    "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
)  # fmt: skip
CORPUS = (
    "The quick brown fox asks: what is the capital of France? It is Paris. Two and two are four.\n\nYes. No. I am,",
    "thank you. USER: hello ASSISTANT: Hello there.\nassistant\nuser\nsystem model  You are a helpful assistant.",
)


@lru_cache
def _byte_level() -> str:
    """Train a byte-level BPE tokenizer with a GPT-2 split, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer.to_str()


def bpe_tokenizer(template: str, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Make a small byte-level BPE tokenizer, merges across spaces and newlines included."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level()), bos_token="<s>", eos_token=eos
    )
    tokenizer.chat_template = template
    return tokenizer


def talk(*texts: str, system: str = "") -> tuple[dict[str, str], ...]:
    """Write a conversation: the user, the assistant, and so on in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return (*([{"role": "system", "content": system}] if system else []), *turns)
