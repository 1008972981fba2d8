"""Sampling: greedy equals transformers, samples follow the model, a response depends on its seed and prompt only."""

import math
from collections import Counter

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from postgrad.core import segments
from postgrad.core.generate import Sample, choose_tokens, generate
from postgrad.errors import ConfigError

V, PAD, STOP = 23, 21, 22
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [4, 3]]


def llama(attention="sdpa", kv=4, scale=4.0):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, num_key_value_heads=kv, max_position_embeddings=64, **SIZES)
    config._attn_implementation = attention
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data *= scale * 4  # peaked enough for near-ties to be rare
    return model.eval()


def gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    model.lm_head.weight.data *= 8
    return model.eval()


def mistral():
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=V, num_key_value_heads=2, max_position_embeddings=64, sliding_window=4, **SIZES)
    model = MistralForCausalLM(config)
    model.lm_head.weight.data *= 16
    return model.eval()


def draw(model, prompts, seeds, **changes) -> list[list[Sample]]:
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 1.0, "stop_ids": [STOP], "pad_id": PAD}
    return generate(model, prompts, seeds=seeds, **(options | changes))


def true_logprob(model, prompt, tokens) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return float(logits.double().log_softmax(-1)[range(len(tokens)), list(tokens)].sum())


MODELS = {
    "llama": llama,
    "grouped": lambda: llama(kv=2),
    "eager": lambda: llama("eager"),
    "tree": lambda: llama(segments.NAME),
    "gpt2": gpt2,
    "sliding": mistral,
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_transformers(name):
    model = MODELS[name]()
    ours = draw(model, PROMPTS, [[0]] * len(PROMPTS), temperature=0.0)
    for prompt, (sample,) in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=STOP, pad_token_id=PAD
        )
        assert list(sample.tokens) == theirs[0, len(prompt) :].tolist()
        assert sample.logprob == pytest.approx(true_logprob(model, prompt, sample.tokens), abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_response_depends_on_its_seed_and_prompt_only(name):
    model = MODELS[name]()
    together = draw(model, PROMPTS, [[7, 8], [8, 9, 10], [7], []])
    assert [len(samples) for samples in together] == [2, 3, 1, 0]
    for prompt, seeds, samples in zip(PROMPTS, [[7, 8], [8, 9, 10], [7], []], together, strict=True):
        for seed, sample in zip(seeds, samples, strict=True):
            alone = draw(model, [prompt], [[seed]])[0][0]
            assert alone.tokens == sample.tokens and alone.finish == sample.finish
            assert alone.logprob == pytest.approx(sample.logprob, abs=1e-4)


def test_the_same_call_gives_the_same_floats():
    model = llama()
    assert draw(model, PROMPTS, [[1, 2]] * 4) == draw(model, PROMPTS, [[1, 2]] * 4)


def test_fewer_new_tokens_give_the_beginning_of_the_same_response():
    model = llama()
    long, short = (draw(model, PROMPTS, [[1, 2]] * 4, max_new_tokens=n, stop_ids=[]) for n in (20, 9))
    for many, few in zip(long, short, strict=True):
        assert [sample.tokens[:9] for sample in many] == [sample.tokens for sample in few]


def test_a_prompt_given_twice_is_as_good_as_one_with_more_seeds():
    model = llama()
    once, twice = draw(model, [[1, 2]], [[5, 6]]), draw(model, [[1, 2], [1, 2]], [[5], [6]])
    assert once[0] == [twice[0][0], twice[1][0]]


def test_stop_and_length():
    model = llama(scale=0.5)
    samples = draw(model, [[1, 2, 3]], [list(range(64))])[0]
    assert {sample.finish for sample in samples} == {"stop", "length"}
    for sample in samples:
        assert STOP not in sample.tokens[:-1]
        assert (sample.tokens[-1] == STOP) == (sample.finish == "stop")
        assert len(sample.tokens) == 20 or sample.finish == "stop"
        assert sample.logprob == pytest.approx(true_logprob(model, [1, 2, 3], sample.tokens), abs=1e-3)


def test_samples_follow_the_model():
    """First and second tokens of 4000 samples against the model's own probabilities: chi-square at 6 sigma."""
    model = llama(scale=0.4)
    num = 4000
    samples = draw(model, [[1, 2, 3]], [list(range(num))], max_new_tokens=2, stop_ids=[])[0]
    with torch.no_grad():
        first = model(torch.tensor([[1, 2, 3]])).logits[0, -1].double().softmax(-1)
        second = model(torch.tensor([[1, 2, 3, v] for v in range(V)])).logits[:, -1].double().softmax(-1)
    for place, expected in ((0, first), (1, first @ second)):
        counts = Counter(sample.tokens[place] for sample in samples)
        chi = sum((counts[v] - num * float(p)) ** 2 / (num * float(p)) for v, p in enumerate(expected))
        assert abs(chi - (V - 1)) < 6 * math.sqrt(2 * (V - 1))


def test_temperature_and_top_p():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().repeat(2000, 1)
    uniform = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    for temperature, top_p, expected in (
        (1.0, 1.0, (0.5, 0.25, 0.15, 0.1)),
        (1.0, 0.6, (2 / 3, 1 / 3, 0, 0)),  # 0.5 alone holds less than 0.6
        (0.5, 1.0, (0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345)),  # squares, sum 0.345
        (1.0, 1e-9, (1, 0, 0, 0)),
    ):
        tokens, logps = choose_tokens(logits, uniform, temperature, top_p)
        share = torch.bincount(tokens, minlength=4) / 2000
        assert share.tolist() == pytest.approx(expected, abs=1e-3)
        assert torch.allclose(logps, logits[0].double()[tokens], atol=1e-6)  # always at temperature 1, without top_p


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).repeat(3, 1)
    tokens, _ = choose_tokens(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), 1.0, 1.0)
    assert tokens.tolist() == [1, 3, 3]


def test_tiles_change_nothing(monkeypatch):
    logits, uniform = torch.randn(7, V), torch.rand(7, dtype=torch.float64)
    whole = choose_tokens(logits, uniform, 0.7, 0.9)
    monkeypatch.setattr("postgrad.core.generate.TILE", 2 * V)
    for a, b in zip(whole, choose_tokens(logits, uniform, 0.7, 0.9), strict=True):
        assert torch.equal(a, b)


def test_training_mode_and_attention_come_back():
    model = llama().train()
    draw(model, [[1]], [[0]])
    assert model.training


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"longest prompt has 50 tokens .* Set max_new_tokens to 14 or less"):
        draw(llama(), [[1] * 50], [[0]])
    with pytest.raises(ConfigError, match="empty prompt"):
        draw(llama(), [[]], [[0]])


@pytest.mark.gpu
def test_greedy_on_the_gpu_equals_the_cpu():
    cpu = draw(llama(), PROMPTS, [[0]] * 4, temperature=0.0)
    gpu = draw(llama().cuda(), PROMPTS, [[0]] * 4, temperature=0.0)
    assert [s[0].tokens for s in cpu] == [s[0].tokens for s in gpu]
