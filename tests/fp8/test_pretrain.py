"""Pretraining: the loss against transformers' own, any architecture, fresh and trained weights, levels, ranks."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

from postgrad.core.blocks import Stream
from postgrad.core.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    RuntimeConfig,
    TrainConfig,
    dump_config,
)
from postgrad.core.models import load_lm, save_model
from postgrad.core.ops import Head
from postgrad.core.runtime import Job
from postgrad.core.text import byte_tokenizer
from postgrad.errors import ConfigError, DataError, ModelError
from postgrad.fp8.pretrain import (
    PretrainConfig,
    block_losses,
    check,
    coded_size,
    evaluation,
    load_model,
    plan,
    pretrain_loss,
    pretrain_step,
    run,
    unigram_loss,
)

TEXT = "the quick brown fox jumps over the lazy dog and the dog sleeps on\n"
SIZES: dict[str, Any] = {"vocab_size": 272, "bos_token_id": None, "eos_token_id": 260, "pad_token_id": 256}
GROUPED: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GROUPED, **SIZES),
    "gpt2": GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **SIZES),
    "qwen2": Qwen2Config(**GROUPED, **SIZES, tie_word_embeddings=True),
    "gemma": GemmaConfig(**GROUPED, **SIZES),
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave report.html out: drawing it takes longer than these runs."""
    monkeypatch.setattr("postgrad.core.runtime.write_report", lambda report, title: None)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text that repeats itself."""
    (tmp_path / "text.txt").write_text(TEXT * 40)
    return str(tmp_path / "text.txt")


def job(folder: Path, seed: int = 0) -> Job:
    """A job without a run folder of its own."""
    return Job("pretrain", folder, seed, torch.device("cpu"), torch.float32, 0, 1, True)


def config(folder: Path, path: str, level: Any = "off", **more: Any) -> PretrainConfig:
    """Twenty steps in a second or two."""
    return replace(
        PretrainConfig(
            model=ModelConfig(tiny_width=48, tiny_layers=1),
            data=DataConfig(path=path, max_length=32),
            train=TrainConfig(
                max_steps=20,
                batch_size=8,
                log_every=5,
                optim=OptimConfig(lr=1e-2, beta2=0.95),
                precision=PrecisionConfig(level=level, min_size=16),
            ),
            runtime=RuntimeConfig(folder=str(folder), quiet=True),
        ),
        **more,
    )


def architecture(folder: Path, name: str, *, weights: bool) -> str:
    """Write a config.json with the byte tokenizer, and weights drawn for it if asked."""
    settings = ARCHITECTURES[name]
    byte_tokenizer().save_pretrained(folder)
    settings.save_pretrained(folder)
    if weights:
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    return str(folder)


def losses(folder: Path) -> list[float]:
    """Read the logged losses."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_loss_by_hand() -> None:
    """Two classes, logits (0, 0) and (ln 3, 0) for targets 0 and 1: ln 2 + ln 4."""
    hidden = torch.tensor([[0.0], [math.log(3)]])
    loss = pretrain_loss(hidden, Head(torch.tensor([[1.0], [0.0]])), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(math.log(2) + math.log(4))


@every_architecture
def test_loss_and_gradient_are_transformers_own(name: str, tmp_path: Path) -> None:
    """Of a micro-batch, times its targets; tokens see only what stands before them."""
    path = architecture(tmp_path, name, weights=True)
    model, _ = load_lm(ModelConfig(path=path), job(tmp_path))
    model.eval()
    blocks = torch.randint(256, (3, 17), generator=torch.Generator().manual_seed(0))
    loss = pretrain_step(model, blocks, 0)
    loss.sum.backward()
    mine = {key: param.grad.clone() for key, param in model.named_parameters() if param.grad is not None}
    model.zero_grad()
    theirs = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    whole = theirs(input_ids=blocks, labels=blocks).loss
    whole.backward()
    assert loss.weight == loss.num_tokens == 48
    torch.testing.assert_close(loss.sum / 48, whole, rtol=1e-5, atol=1e-5)
    for key, param in theirs.named_parameters():
        torch.testing.assert_close(mine[key] / 48, param.grad, rtol=1e-3, atol=1e-5)


def test_attention_takes_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is told that it is causal, so it skips half the work."""
    seen: list[tuple[object, bool]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **options: Any) -> Any:
        seen.append((options.get("attn_mask"), options["is_causal"]))
        return attend(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model, _ = load_lm(ModelConfig(tiny_width=32), job(tmp_path))
    pretrain_step(model, torch.zeros(2, 9, dtype=torch.long), 0)
    assert seen == [(None, True)] * 2


def test_splits_of_a_step_give_the_same_gradient(tmp_path: Path) -> None:
    """One micro-batch of four blocks, or four of one."""
    model, _ = load_lm(ModelConfig(tiny_width=32), job(tmp_path))
    blocks = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))
    found = []
    for parts in ([blocks], list(blocks.split(1))):
        model.zero_grad()
        for part in parts:
            pretrain_step(model, part, 0).sum.backward()
        found.append(model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(found[0], found[1])


def test_block_losses_add_up_to_the_training_loss(tmp_path: Path) -> None:
    """Means of blocks, whatever the number of rows at a time."""
    model, _ = load_lm(ModelConfig(tiny_width=32), job(tmp_path))
    stream = Stream(np.frombuffer((TEXT * 3).encode(), np.uint8).astype(np.uint16), 1, 3 * len(TEXT))
    each = block_losses(model, stream, [2, 0, 1], 16, 2)
    torch.testing.assert_close(torch.tensor(each), torch.tensor(block_losses(model, stream, [2, 0, 1], 16, 3)))
    loss = pretrain_step(model, stream.blocks([0, 1, 2], 16), 0)
    assert sum(each) / 3 == pytest.approx(loss.sum.item() / 48, rel=1e-5)


def test_evaluation_by_hand() -> None:
    """Means 1 and 3 nats a token, 4 tokens of 8 bytes: 2 nats, e^2, 2 / ln 2 / 2 bits a byte."""
    found = evaluation([1.0, 3.0], Stream(np.zeros(4, np.uint16), 1, 8))
    assert (found["loss"], found["loss_low"] < 2 < found["loss_high"]) == (2.0, True)
    assert found["perplexity"] == pytest.approx(math.exp(2))
    assert found["bits_per_byte"] == pytest.approx(1 / math.log(2))


def test_unigram_loss_by_hand() -> None:
    """Seen (2, 0), so (3/4, 1/4) with one more each; held out one of each: (ln 4/3 + ln 4) / 2."""
    found = unigram_loss(np.array([0, 0], np.uint16), np.array([0, 1], np.uint16), 2)
    assert found == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


@pytest.mark.parametrize("level", ["off", "O1", "O2", "O3"])
def test_run(level: str, tmp_path: Path, text: str) -> None:
    """The loss falls below what tokens alone tell; the model can be loaded and is what was evaluated."""
    settings = config(tmp_path / "run", text, level)
    report = run(settings)
    found = losses(tmp_path / "run")
    assert found[-1] < 0.75 * found[0]
    assert report.results["loss"] < report.results["unigram_loss"]
    assert run(settings).results == report.results
    model, tokenizer = load_lm(ModelConfig(path=str(tmp_path / "run/model")), job(tmp_path), frozen=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert type(AutoTokenizer.from_pretrained(tmp_path / "run/model")) is type(tokenizer)
    stream = Stream(np.memmap(tmp_path / "run/tokens/validation.bin", "<u2", mode="r"), 1, 1)
    again = block_losses(model, stream, range(stream.num_blocks(32)), 32, 64)
    close = 1e-5 if level == "off" else 0.02  # products of codes, or of what the codes say
    assert sum(again) / len(again) == pytest.approx(report.results["loss"], rel=close)


@every_architecture
@pytest.mark.parametrize("fresh", [True, False])
def test_every_architecture_learns_in_fp8(name: str, fresh: bool, tmp_path: Path, text: str) -> None:
    """From drawn weights and from a folder's; what is saved is an ordinary model of that kind."""
    path = architecture(tmp_path / "model", name, weights=not fresh)
    settings = config(tmp_path / "run", text, "O2", fresh=fresh, model=ModelConfig(path=path))
    run(replace(settings, train=replace(settings.train, max_steps=8, log_every=1)))
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert saved.config.model_type == ARCHITECTURES[name].model_type


def test_fresh_weights_follow_from_the_seed(tmp_path: Path) -> None:
    """Two seeds, two models; trained weights are not looked at; the tokenizer decides the vocabulary."""
    path = architecture(tmp_path / "model", "llama", weights=True)
    trained = load_file(tmp_path / "model/model.safetensors")["model.embed_tokens.weight"]
    settings = config(tmp_path, "", fresh=True, model=ModelConfig(path=path))
    drawn = [load_model(settings, job(tmp_path, seed))[0].get_input_embeddings().weight for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], trained)
    kept = load_model(replace(settings, fresh=False), job(tmp_path))[0].get_input_embeddings().weight
    assert torch.equal(kept, trained)
    LlamaConfig(**GROUPED, vocab_size=999).save_pretrained(tmp_path / "bare")
    bare = replace(settings, tokenizer="bytes", model=ModelConfig(path=str(tmp_path / "bare")))
    model, tokenizer = load_model(bare, job(tmp_path))
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 261
    assert plan(replace(bare, data=replace(bare.data, limit=1)))["parameters"] == sum(
        p.numel() for p in model.parameters()
    )


def test_plan_by_hand(tmp_path: Path, text: str) -> None:
    """2640 bytes, a tenth held out at the end of a line; memory by level; no file is written."""
    settings = config(tmp_path / "run", text)
    settings = replace(settings, train=replace(settings.train, max_steps=0, epochs=2.0))
    found = plan(settings)
    lines = math.ceil(40 * 0.9)
    assert found["training tokens"] == lines * len(TEXT) + 1 and found["held-out documents"] == 1
    assert found["training blocks"] == lines * len(TEXT) // 32
    assert found["optimizer steps"] == round(2 * int(found["training blocks"]) / 8)
    coded = 4 * 48 * 48 + 3 * 48 * 128
    assert found["of them in 8 bits at O1, O2, O3"] == coded
    total = int(found["parameters"])
    for name, each in (("off", 16), ("O1", 11), ("O2", 6), ("O3 on 8 ranks", 2.625)):
        gib = (16 * (total - coded) + each * coded) / 2**30
        assert found[f"memory at {name}, without activations (GiB)"] == round(gib, 3)
    assert not (tmp_path / "run").exists()
    model, _ = load_lm(settings.model, job(tmp_path))
    assert coded_size(model, 4096) == 0


def test_bad_settings_are_refused(tmp_path: Path, text: str) -> None:
    """The message names the setting and what was found."""
    good = config(tmp_path, text)
    for change, message in (
        ({"tokenizer": "bytes"}, "tokenizer: 'bytes' needs fresh weights .*the tiny model reads bytes"),
        ({"fresh": True, "model": ModelConfig(path="x", lora_rank=4)}, "fresh: adapters need trained weights"),
        ({"data": replace(good.data, held_out=1.0)}, "data.held_out is a share .* got 1"),
        ({"data": replace(good.data, max_length=0)}, "data.max_length must be >= 1, got 0"),
        ({"train": TrainConfig(batch_size=0)}, "train.batch_size must be >= 1, got 0"),
        ({"train": TrainConfig(epochs=0.0)}, "train.epochs must be > 0"),
        ({"eval_blocks": -1}, "eval_blocks must be >= 0, got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(replace(good, **change))
    long = DataConfig(path=text, max_length=4096, held_out=0.9)
    large = replace(good.train, precision=PrecisionConfig(level="O2", min_size=4096))
    nowhere = ModelConfig(path="nowhere")
    for number, (changed, error, message) in enumerate(
        (
            (replace(good, data=long), DataError, "at least 513 tokens"),
            (replace(good, fresh=True, tokenizer="bytes", model=nowhere), ModelError, "cannot draw a model for 'nowh"),
            (replace(good, train=large), ModelError, "4096"),
        )
    ):
        with pytest.raises(error, match=message):
            run(replace(changed, runtime=RuntimeConfig(folder=str(tmp_path / f"{number}"), quiet=True)))


@pytest.mark.parametrize("level", ["off", pytest.param("O2", marks=pytest.mark.slow)])
def test_two_ranks_end_as_one(level: str, tmp_path: Path, text: str) -> None:
    """The same losses under torchrun: the same blocks, their sums in another order, or rounded once more."""
    settings = config(tmp_path / "alone", text, level)
    settings = replace(settings, train=replace(settings.train, max_steps=6, log_every=1))
    run(settings)
    (tmp_path / "recipe.toml").write_text(dump_config(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "postgrad"]
    command += ["pretrain", str(tmp_path / "recipe.toml"), "--runtime.folder", str(tmp_path / "ranks")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    close = 1e-5 if level == "off" else 0.02
    assert losses(tmp_path / "ranks") == pytest.approx(losses(tmp_path / "alone"), rel=close)
    results = [json.loads((tmp_path / name / "result.json").read_text())["results"] for name in ("alone", "ranks")]
    assert results[1] == pytest.approx(results[0], rel=close)


def test_a_saved_model_is_gone_on_with(tmp_path: Path, text: str) -> None:
    """The second run begins where the first ended."""
    first = config(tmp_path / "first", text)
    run(first)
    second = config(tmp_path / "second", text, model=ModelConfig(path=str(tmp_path / "first/model")))
    run(replace(second, train=replace(second.train, optim=OptimConfig(lr=1e-3))))
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "first")[-1] * 1.1
    model, tokenizer = load_lm(second.model, job(tmp_path))
    save_model(model, tokenizer, tmp_path / "copy")
    assert (tmp_path / "copy/tokenizer.json").is_file()
