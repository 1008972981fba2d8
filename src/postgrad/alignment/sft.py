"""Supervised finetuning: a pretrained model learns to answer as the conversations' assistant does.

Formula:   -sum_t m_t log p(y_t | y_<t) / sum_t m_t, with m = 1 on each assistant text and its stop token.
Source:    the first stage of Xwin-LM (arXiv 2405.20335).
Differs:   the paper's body was not available: settings are the field's common ones for Llama-2 (3 epochs, 2e-5,
           cosine with 3 % warm-up). The mean is over all supervised tokens of an optimizer step, over all ranks and
           micro-batches, so no split of a step changes it. Masks do not depend on marks in the chat template.

    postgrad sft --data.path conversations.jsonl --model.path meta-llama/Llama-2-7b-hf --model.chat-template vicuna

Letters: N target tokens, S sequences.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from postgrad.alignment.builtin import with_data
from postgrad.alignment.wiring import Plan, check_training, counts_table, spread_values, training_plan
from postgrad.core.batches import eval_batches, tree_batches
from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from postgrad.core.data import hold_out, load_examples
from postgrad.core.distributed import first_rank
from postgrad.core.loop import Loss, train
from postgrad.core.metrics import mean_interval
from postgrad.core.models import (
    choose_layout,
    load_lm,
    save_model,
    sequence_logprobs,
    target_logprobs,
    target_nll,
    within_context,
)
from postgrad.core.report import Report
from postgrad.core.rows import Rows, Tree
from postgrad.core.runtime import Job, finish, finished, start
from postgrad.core.text import conversation_trees


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Conversations to a model that answers."""

    turns: Literal["all", "last"] = "all"
    """Learn from every assistant turn, or from the last one only."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig(epochs=3.0, optim=OptimConfig(lr=2e-5))
    runtime: RuntimeConfig = RuntimeConfig()


def sft_loss(
    logprobs: Float[Tensor, " N"], sequence: Int[Tensor, " N"], weight: Float[Tensor, " S"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the weighted sum of the targets' negative log-probabilities, and the sum of their weights.

    Args: logprobs: of the supervised tokens, in nats. sequence: whose token it is. weight: of each conversation.
    """
    each = weight[sequence]  # [N]
    return -(each * logprobs).sum(), each.sum()


def last_turn(supervised: Sequence[bool]) -> tuple[bool, ...]:
    """Keep the last unbroken run of marks: the last assistant turn."""
    end = max((i + 1 for i, mark in enumerate(supervised) if mark), default=0)
    start = end
    while start > 0 and supervised[start - 1]:
        start -= 1
    return tuple(start <= i < end for i in range(len(supervised)))


def check(config: SFTConfig) -> None:
    """Refuse settings that contradict each other."""
    check_training(config.data, config.train)


def plan(config: SFTConfig) -> Plan:
    """Say what a run would do: rows, steps, parameters, memory."""
    check(config)
    with TemporaryDirectory() as folder:
        loaded = load_examples(with_data(config.data, "sft", Path(folder), config.runtime.seed))
    kept, _ = hold_out(loaded.items, config.data.held_out, config.runtime.seed)
    return training_plan(len(kept), loaded.counts, config.model, config.train)


def load_trees(
    config: SFTConfig, tokenizer: PreTrainedTokenizerBase, job: Job
) -> tuple[list[Tree], list[Tree], dict[str, int]]:
    """Load and tokenise conversations; give those to train on, those set aside, and what was dropped."""
    data = with_data(config.data, "sft", job.folder, job.seed)
    loaded = load_examples(data)
    both: list[list[Tree]] = []
    counts = dict(loaded.counts)
    for name, examples in zip(("training", "held out"), hold_out(loaded.items, data.held_out, job.seed), strict=True):
        trees, found = conversation_trees(tokenizer, examples, data)
        both.append([marked(tree, config.turns) for tree in trees])
        counts |= {f"{name} {reason}": num for reason, num in found.items()}
    return both[0], both[1], counts


def marked(tree: Tree, turns: str) -> Tree:
    """Mark the turns to learn from."""
    return replace(tree, supervised=last_turn(tree.supervised)) if turns == "last" else tree


def sft_step(model: nn.Module, trees: Sequence[Tree], weighted: bool, rows: Rows, step: int) -> Loss:
    """Return a micro-batch's summed loss; its weight is its supervised tokens, times their conversation's weight."""
    num = float(rows.target.shape[0])
    if not weighted:
        nll = target_nll(model, rows)
        return Loss(nll, num, {"nll": (nll.detach(), num)}, rows.num_tokens)
    logprobs = target_logprobs(model, rows)
    weight = torch.tensor([trees[i].weight for i in rows.index], device=logprobs.device)
    loss, total = sft_loss(logprobs, rows.sequence, weight)
    return Loss(loss, float(total), {"nll": (-logprobs.detach().sum(), num)}, rows.num_tokens)


def evaluation(values: Sequence[Sequence[float]], trees: Sequence[Tree]) -> dict[str, float]:
    """Return the held-out loss a token, its perplexity, and the mean over conversations with its interval."""
    nll = [-row[0] for row in values]
    num_tokens = [sum(tree.supervised[1:]) for tree in trees]
    loss = sum(nll) / sum(num_tokens)
    each = mean_interval([x / num for x, num in zip(nll, num_tokens, strict=True)])
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # e^709 is the largest number
        "conversation_loss": each.value,
        "conversation_loss_low": each.low,
        "conversation_loss_high": each.high,
    }


def run(config: SFTConfig) -> Report:
    """Finetune on conversations and report the loss on those set aside."""
    job = start(config, check, "sft")
    if report := finished(job):
        return report
    model, tokenizer = load_lm(config.model, job)
    config = replace(config, data=within_context(config.data, model))
    layout, pad = choose_layout(config.model, model, job), tokenizer.pad_token_id
    trees, held, counts = load_trees(config, tokenizer, job)
    micro_tokens = config.train.micro_tokens
    batches = tree_batches(trees, config.train, job, data=config.data, layout=layout, pad_id=pad)
    held_batches = eval_batches(
        held, row_length=0, micro_tokens=micro_tokens, layout=layout, pad_id=pad, device=job.device
    )

    def evaluate(step: int) -> dict[str, float]:
        return evaluation(spread_values(held, held_batches, partial(sequence_logprobs, model), job), held)

    weighted = any(tree.weight != 1 for tree in trees)
    loss_fn = partial(sft_step, model, trees, weighted)
    report = train(model, batches, loss_fn, evaluate if held else None, config.train, job)
    first_rank(lambda: save_model(model, tokenizer, job.folder / "model"))
    return finish(job, replace(report, sections=(*report.sections, counts_table(counts))))
