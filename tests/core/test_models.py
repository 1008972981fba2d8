"""Loading, probing and saving: tiny models, real folders, LoRA, reward heads, models that need the flat layout."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from postgrad.core.config import DataConfig, ModelConfig
from postgrad.core.models import (
    choose_layout,
    count_parameters,
    head_of,
    load_lm,
    load_reward_model,
    load_tokenizer,
    model_hash,
    planned_parameters,
    save_model,
    sequence_logprobs,
    sequence_scores,
    target_logprobs,
    target_nll,
    training_memory_gib,
    within_context,
)
from postgrad.core.rows import Tree, pack
from postgrad.core.runtime import Job
from postgrad.errors import ModelError

JOB = Job("sft", Path("unused"), 0, torch.device("cpu"), torch.float32, 0, 1, True)
TINY = ModelConfig(tiny_width=32, tiny_layers=1)
TREES = [Tree((1, 2, 3), ((4, 5), (6,))), Tree((7, 8), ((9,),))]


def rows(layout="tree"):
    return pack(TREES, [0, 1], row_length=0, layout=layout, pad_id=0)


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = load_lm(TINY, JOB)
    save_model(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_tiny_model_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = model_hash(load_lm(TINY, JOB)[0])
    torch.manual_seed(2)
    assert model_hash(load_lm(TINY, JOB)[0]) == first
    assert model_hash(load_lm(TINY, replace(JOB, seed=1))[0]) != first


def test_saved_folder_loads_in_transformers_and_in_ours(folder):
    ours, tokenizer = load_lm(replace(TINY, path=str(folder)), JOB, frozen=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id
    assert theirs.config._attn_implementation == "sdpa", "the folder must not ask for an attention only we have"
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id
    torch.testing.assert_close(sequence_logprobs(ours, rows("flat")), sequence_logprobs(theirs, rows("flat")))
    assert not any(p.requires_grad for p in ours.parameters())
    assert not ours.training


def test_saving_twice_replaces_the_folder(folder):
    model, tokenizer = load_lm(TINY, replace(JOB, seed=5))
    save_model(model, tokenizer, folder)
    assert model_hash(load_lm(replace(TINY, path=str(folder)), JOB)[0]) == model_hash(model)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_target_nll_is_the_sum_of_target_logprobs():
    model, _ = load_lm(TINY, JOB)
    torch.testing.assert_close(target_nll(model, rows()), -target_logprobs(model, rows()).sum())


def test_new_reward_head_is_small_and_seeded(folder):
    config = replace(TINY, path=str(folder))
    model, _ = load_reward_model(config, JOB)
    again, _ = load_reward_model(config, JOB)
    assert torch.equal(model.score.weight, again.score.weight)
    assert model.score.weight.std().item() == pytest.approx(1 / 33, rel=0.5)


def test_reward_model_round_trip_and_transformers_agreement(folder, tmp_path):
    model, tokenizer = load_reward_model(replace(TINY, path=str(folder)), JOB)
    with torch.no_grad():
        model.score.weight.mul_(10)
    save_model(model, tokenizer, tmp_path / "reward")
    back, _ = load_reward_model(replace(TINY, path=str(tmp_path / "reward")), JOB, frozen=True)
    ours = sequence_scores(back, rows())
    torch.testing.assert_close(ours, sequence_scores(model, rows()).detach())
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    ids = torch.tensor([TREES[0].prompt + TREES[0].answers[0]])
    torch.testing.assert_close(theirs(input_ids=ids).logits[0, 0], ours[0], atol=1e-5, rtol=1e-4)


def test_tiny_reward_model_shares_the_language_models_backbone():
    model, _ = load_reward_model(TINY, JOB)
    lm, _ = load_lm(TINY, JOB)
    assert torch.equal(model.model.embed_tokens.weight, lm.model.embed_tokens.weight)
    assert sequence_scores(model, rows()).shape == (3,)


def test_lora_trains_only_adapters_and_merges_on_loading(folder, tmp_path):
    config = replace(TINY, path=str(folder), lora_rank=2)
    model, tokenizer = load_lm(config, JOB)
    total, trainable = count_parameters(model)
    assert 0 < trainable < total // 4
    assert planned_parameters(config) == (total, trainable)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.05)
    model.eval()
    expected = sequence_logprobs(model, rows())
    save_model(model, tokenizer, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    merged, _ = load_lm(replace(TINY, path=str(tmp_path / "adapter")), JOB, frozen=True)
    torch.testing.assert_close(sequence_logprobs(merged, rows()), expected.detach(), atol=1e-5, rtol=1e-5)


def test_adapter_on_an_adapter_loads_whole(folder, tmp_path):
    path = folder
    for stage in ("first", "second"):
        model, tokenizer = load_lm(replace(TINY, path=str(path), lora_rank=2), JOB)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.fill_(0.05)
        expected = sequence_logprobs(model.eval(), rows()).detach()
        path = tmp_path / stage
        save_model(model, tokenizer, path)
    merged, _ = load_lm(replace(TINY, path=str(path)), JOB, frozen=True)
    torch.testing.assert_close(sequence_logprobs(merged, rows()), expected, atol=1e-5, rtol=1e-5)


def test_tiny_takes_no_adapter():
    with pytest.raises(ModelError, match="lora_rank = 0"):
        load_lm(replace(TINY, lora_rank=2), JOB)


def test_lora_reward_model_trains_its_head(folder):
    model, _ = load_reward_model(replace(TINY, path=str(folder), lora_rank=2), JOB)
    sequence_scores(model, rows()).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("score" in name for name in trained)
    assert all("score" in name or "lora" in name for name in trained)


def test_unknown_lora_target_lists_the_modules(folder):
    with pytest.raises(ModelError, match=r"nothing_here.*q_proj"):
        load_lm(replace(TINY, path=str(folder), lora_rank=2, lora_targets=("nothing_here",)), JOB)


def test_missing_folder_says_what_to_give(tmp_path):
    with pytest.raises(ModelError, match=r"cannot load .*config\.json"):
        load_lm(replace(TINY, path=str(tmp_path / "nowhere")), JOB)


def test_odd_width_is_refused():
    with pytest.raises(ModelError, match="multiple of 16"):
        load_lm(replace(TINY, tiny_width=47), JOB)


def test_llama_takes_trees():
    model, _ = load_lm(TINY, JOB)
    assert choose_layout(TINY, model, JOB) == "tree"
    assert model.training, "probing leaves the mode as it was"
    assert choose_layout(replace(TINY, layout="flat"), model, JOB) == "flat"


def test_state_space_model_falls_back_to_flat_rows():
    """A Mamba carries its state along the row, so answers side by side would see each other."""
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert choose_layout(TINY, model, JOB) == "flat"
    with pytest.raises(ModelError, match=r"--model\.layout flat"):
        choose_layout(replace(TINY, layout="tree"), model, JOB)


SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize("kind", ["gemma2", "cohere"])
def test_scaled_and_capped_heads_equal_the_models_own_logits(kind):
    """Gemma-2 caps its logits with tanh, Cohere multiplies them; both must come out of the tiled head."""
    torch.manual_seed(0)
    if kind == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=2.0, sliding_window=4))
        model.set_attn_implementation("eager")
    else:
        model = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25))
    model.eval()
    assert head_of(model).cap == (2.0 if kind == "gemma2" else 0.0)
    tree = TREES[0]
    ids = torch.tensor([tree.prompt + tree.answers[0]])
    logprobs = model(input_ids=ids).logits.log_softmax(-1)[0]
    want = logprobs[2, 4] + logprobs[3, 5]
    for layout in ("tree", "flat"):
        torch.testing.assert_close(sequence_logprobs(model, rows(layout))[0], want, atol=1e-5, rtol=1e-5)


def test_real_llama_folder(shared):
    """stories260K knows its own kind of text: well under the 6.2 nats of a uniform guess over 512 pieces."""
    config = ModelConfig(path=str(shared / "data/weights/stories260K"), chat_template="vicuna")
    model, tokenizer = load_lm(config, JOB, frozen=True)
    assert tokenizer.pad_token_id is not None
    assert choose_layout(config, model, JOB) == "tree"
    ids = tuple(tokenizer("Once upon a time, there was a little girl named Lily.").input_ids)
    story = pack([Tree(ids, (), (True,) * len(ids))], [0], row_length=0, layout="tree", pad_id=0)
    mean = -target_logprobs(model, story).mean().item()
    assert mean < 2.0 < math.log(512)


def test_planned_parameters_of_tiny_and_real(shared):
    model, _ = load_lm(TINY, JOB)
    assert planned_parameters(TINY) == count_parameters(model)
    total, trainable = planned_parameters(ModelConfig(path=str(shared / "data/weights/stories260K")))
    assert total == trainable == 260_032


def test_memory_estimate_by_hand():
    """2^30 weights, all trained: 4 for the weight, 4 gradient, 8 AdamW = 16 GiB; frozen: 4 GiB."""
    assert training_memory_gib(2**30, 2**30) == 16
    assert training_memory_gib(2**30, 0) == 4


def test_length_is_cut_to_the_models_context():
    model, _ = load_lm(TINY, JOB)
    assert within_context(DataConfig(max_length=9999), model).max_length == 512
    assert within_context(DataConfig(max_length=100), model).max_length == 100


def test_tokenizer_gets_a_padding_token(shared):
    tokenizer = load_tokenizer(ModelConfig(path=str(shared / "data/weights/stories260K")))
    assert tokenizer.pad_token_id is not None
