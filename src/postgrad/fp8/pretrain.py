"""Pretraining: a language model learns text, from scratch or going on from trained weights, in FP8 or not.

Formula:   -sum_t log p(y_t | y_<t) / T over the T targets of a step; every token but a block's first is one.
Source:    FP8-LM (arXiv 2310.18313), section 3: AdamW with b2 0.95 and weight decay 0.1, cosine to 10 %.
Differs:   warm-up is a share of the steps, 2 % (the paper: 1,000 steps); blocks hold 256 tokens by default (2,048),
           batches 16 blocks (4M tokens), as fits the tiny model. Blocks are cut from documents laid end to end;
           tokens see all that stands before them in their block. Layers from 16 inputs and outputs on have 8 bits.

    postgrad pretrain                                                        # a tiny model, Python's own library
    postgrad pretrain --data.path texts/ --model.path gpt2 --fresh --precision.level O2

Letters: R blocks, T tokens of a block, N (held out M) target tokens, D width, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from postgrad.core import segments
from postgrad.core.adapters import unwrap
from postgrad.core.batches import CPU, check_train, num_steps
from postgrad.core.blocks import Stream, block_batches, cut, require_blocks, spread_blocks
from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, PrecisionConfig, RuntimeConfig, TrainConfig
from postgrad.core.distributed import first_rank, gather_objects
from postgrad.core.documents import Corpus, load_corpus
from postgrad.core.loop import Loss, train
from postgrad.core.metrics import mean_interval
from postgrad.core.models import count_parameters, head_of, load_lm, load_tokenizer, save_model, within_context
from postgrad.core.ops import Head, token_logprobs, token_nll
from postgrad.core.report import Cell, Note, Report, Section, Table
from postgrad.core.runtime import Job, finish, finished, stage_seed, start
from postgrad.errors import ConfigError, ModelError
from postgrad.fp8.linear import LinearConfig, swap_linears

BYTES = {"off": 16.0, "O1": 11.0, "O2": 6.0}
"""Weight, gradient and both states of a parameter that is kept as codes; what is not takes 16."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Text to a language model."""

    fresh: bool = False
    """Draw new weights for the model's config.json, from the seed, instead of going on from its trained ones."""
    tokenizer: str = ""
    """A hub name or folder, for fresh weights; "bytes" = 256 bytes and 5 marks; "" = the model's own."""
    text_column: str = "text"
    """Column of a table that holds the text."""
    eval_blocks: int = 256
    """Held-out blocks an evaluation reads, evenly spaced; 0 = all."""
    model: ModelConfig = ModelConfig(tiny_width=96)
    data: DataConfig = DataConfig(max_length=256)
    train: TrainConfig = TrainConfig(
        batch_size=16,
        eval_every=100,
        optim=OptimConfig(lr=4e-3, weight_decay=0.1, beta2=0.95, warmup=0.02),
        precision=PrecisionConfig(min_size=16),
    )
    runtime: RuntimeConfig = RuntimeConfig()


def pretrain_loss(hidden: Float[Tensor, "N D"], head: Head, target: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """Return the summed negative log-likelihood of the next tokens, in nats."""
    return token_nll(hidden, head, target)


def hidden_of(model: nn.Module, blocks: Int[Tensor, "R T"]) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]:
    """Run the backbone, causally and without a mask, on all tokens but the last; give states and next tokens."""
    output = unwrap(model).base_model(input_ids=blocks[:, :-1], use_cache=False)
    states: Tensor = output.last_hidden_state  # [R, T - 1, D]
    return states.flatten(0, 1), blocks[:, 1:].flatten()


def pretrain_step(model: nn.Module, blocks: Int[Tensor, "R T"], step: int) -> Loss:
    """Return a micro-batch's summed loss; its weight is the number of targets."""
    hidden, target = hidden_of(model, blocks)
    return Loss(pretrain_loss(hidden, head_of(model), target), float(len(target)), {}, len(target))


@torch.no_grad()
def block_losses(model: nn.Module, stream: Stream, index: Sequence[int], length: int, rows: int) -> list[float]:
    """Compute the mean loss of each block, `rows` at a time, in nats a token."""
    device = next(model.parameters()).device
    found: list[float] = []
    for part in cut(index, rows):
        hidden, target = hidden_of(model, stream.blocks(part, length).to(device))
        found += (-token_logprobs(hidden, head_of(model), target)).view(len(part), length).mean(1).tolist()
    return found


def evaluation(losses: Sequence[float], stream: Stream) -> dict[str, float]:
    """Return the held-out loss a token with its interval over blocks, perplexity, and bits a byte of text."""
    loss = mean_interval(losses)
    return {
        "loss": loss.value,
        "loss_low": loss.low,
        "loss_high": loss.high,
        "perplexity": math.exp(min(loss.value, 700.0)),  # e^709 is the largest number
        "bits_per_byte": loss.value / math.log(2) * len(stream.tokens) / stream.num_bytes,
    }


def unigram_loss(train: Integer[np.ndarray, " N"], held: Integer[np.ndarray, " M"], vocabulary: int) -> float:
    """Compute the held-out loss of the training text's token frequencies: what a model without context reaches.

    Every token of the vocabulary counts once more than it was seen.
    """
    seen = np.bincount(train, minlength=vocabulary) + 1.0
    wanted = np.bincount(held, minlength=vocabulary)
    return float(-(wanted * np.log(seen / seen.sum())).sum() / wanted.sum())


def check(config: PretrainConfig) -> None:
    """Refuse settings that contradict each other."""
    tiny = config.model.path == "tiny"
    if config.tokenizer and (tiny or not config.fresh):
        raise ConfigError(
            f"tokenizer: {config.tokenizer!r} needs fresh weights of a model.path (--fresh); "
            + ("the tiny model reads bytes." if tiny else "trained weights know the tokens of their own only.")
        )
    if config.fresh and config.model.lora_rank:
        raise ConfigError("fresh: adapters need trained weights beneath them; set model.lora_rank to 0.")
    if not 0 <= config.data.held_out < 1:
        raise ConfigError(f"data.held_out is a share of the documents, from 0 to below 1, got {config.data.held_out}.")
    if config.data.max_length < 1:
        raise ConfigError(f"data.max_length must be >= 1, got {config.data.max_length}.")
    if config.eval_blocks < 0:
        raise ConfigError(f"eval_blocks must be >= 0, got {config.eval_blocks}.")
    check_train(config.train)


def choose_tokenizer(config: PretrainConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer asked for, or the model's own."""
    path = {"": config.model.path, "bytes": "tiny"}.get(config.tokenizer, config.tokenizer)
    return load_tokenizer(replace(config.model, path=path))


def load_model(config: PretrainConfig, job: Job) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, or draw new weights for its architecture."""
    if not config.fresh or config.model.path == "tiny":
        return load_lm(config.model, job)
    tokenizer = choose_tokenizer(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage_seed(job.seed, "fresh weights"))
        model = _draw(config, tokenizer)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model.to(job.device), tokenizer


def _draw(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Draw weights for a config.json; its vocabulary becomes the tokenizer's where that is another's or larger."""
    try:
        settings: PretrainedConfig = AutoConfig.from_pretrained(config.model.path)
        text = settings.get_text_config()
        if config.tokenizer or text.vocab_size < len(tokenizer):
            text.vocab_size = len(tokenizer)
        text.pad_token_id, text.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        text.bos_token_id = tokenizer.bos_token_id
        return AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation=segments.NAME)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"cannot draw a model for {config.model.path!r}: {first} Give a hub name you can reach or a folder with "
            "the config.json of a causal language model."
        ) from error


def plan(config: PretrainConfig) -> dict[str, str | int | float]:
    """Say what a run would do: tokens, blocks, steps, parameters, memory by level."""
    check(config)
    tokenizer = choose_tokenizer(config)
    with torch.device("meta"):
        model = _planned_model(config, tokenizer)
    total, trains = count_parameters(model)
    coded = coded_size(model, config.train.precision.min_size)
    length = within_context(config.data, model).max_length
    with TemporaryDirectory() as folder:
        job = Job("pretrain", Path(folder), config.runtime.seed, CPU, torch.float32, 0, 1, True)
        corpus = load_corpus(config.data, config.text_column, tokenizer, job)
        num = require_blocks(corpus.train, length)
        text = _text_counts(corpus, length)
    gib = {level: (4 * (total - trains) + 16 * (trains - coded) + coded * each) / 2**30 for level, each in _levels()}
    return {
        **text,
        "tokens of a block": length,
        "optimizer steps": num_steps(num, config.train),
        "tokens a step": config.train.batch_size * length,
        "parameters": total,
        "trainable parameters": trains,
        "of them in 8 bits at O1, O2, O3": coded,
        **{f"memory at {name}, without activations (GiB)": round(size, 3) for name, size in gib.items()},
    }


def coded_size(model: nn.Module, min_size: int) -> int:
    """Count the parameters that FP8 keeps as codes; the model, of which nothing is computed, is changed."""
    try:
        names = swap_linears(model, LinearConfig(min_inputs=min_size, min_outputs=min_size))
    except ModelError:  # no layer is large enough
        return 0
    weights = {model.get_parameter(f"{name}.weight") for name in names}
    return sum(weight.numel() for weight in weights if weight.requires_grad)


def _levels() -> list[tuple[str, float]]:
    """List levels and their bytes of a parameter that is kept as codes."""
    return [*BYTES.items(), ("O3 on 8 ranks", 2 + 5 / 8)]


def _planned_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Build the model without weights; what has adapters is loaded, for they are few."""
    if config.model.path == "tiny" or config.model.lora_rank:
        job = Job("pretrain", Path(), config.runtime.seed, CPU, torch.float32, 0, 1, True)
        with torch.device("cpu"):
            return load_lm(config.model, job)[0]
    return _draw(config, tokenizer)


def _text_counts(corpus: Corpus, length: int) -> dict[str, str | int | float]:
    """Say how much text there is."""
    return {
        f"{name} {what}": num
        for name, stream in (("training", corpus.train), ("held-out", corpus.held))
        for what, num in (
            ("documents", stream.num_documents),
            ("bytes", stream.num_bytes),
            ("tokens", len(stream.tokens)),
            ("blocks", stream.num_blocks(length)),
        )
    }


def run(config: PretrainConfig) -> Report:
    """Train on text and report the loss on what was set aside."""
    job = start(config, check, "pretrain")
    if report := finished(job):
        return report
    model, tokenizer = load_model(config, job)
    length = within_context(config.data, model).max_length
    corpus = load_corpus(config.data, config.text_column, tokenizer, job)
    batches = block_batches(corpus.train, length, config.train, job)
    index = spread_blocks(corpus.held, length, config.eval_blocks)

    def evaluate(step: int) -> dict[str, float]:
        mine = block_losses(model, corpus.held, index[job.rank :: job.world], length, batches.micro_rows)
        parts = gather_objects(mine)
        return evaluation([parts[i % job.world][i // job.world] for i in range(len(index))], corpus.held)

    report = train(model, batches, partial(pretrain_step, model), evaluate if index else None, config.train, job)
    first_rank(lambda: save_model(model, tokenizer, job.folder / "model"))
    results: dict[str, Cell] = dict(report.results)
    notes: list[Section] = []
    if index:
        results["unigram_loss"] = unigram_loss(corpus.train.tokens, corpus.held.tokens, len(tokenizer))
        notes.append(_learnt(results))
    results["tokens_trained_on"] = len(batches) * config.train.batch_size * length
    total, trains = count_parameters(model)
    told = {"parameters": total, "that train": trains, **_text_counts(corpus, length)}
    table = Table("Model and text", ("what", "number"), tuple(told.items()))
    return finish(job, replace(report, results=results, sections=(*notes, *report.sections, table)))


def _learnt(results: dict[str, Cell]) -> Note:
    """Say in words how far the model is beyond counting tokens."""
    loss, counted = float(results["loss"]), float(results["unigram_loss"])
    text = (
        f"Held-out text costs {loss:.3f} nats a token, {float(results['bits_per_byte']):.3f} bits a byte; by the "
        f"frequencies of its tokens alone, {counted:.3f} nats. The model chooses as among "
        f"{float(results['perplexity']):,.4g} equally likely tokens."
    )
    return Note("What was learnt", text, "good" if loss < counted else "warning")
