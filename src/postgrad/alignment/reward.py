"""Reward model: a scalar head on a language model that scores the better answer higher.

Formula:   -log s(r_w - r_l - margin) + center * (r_w + r_l)^2, mean over pairs; with a judge's probability p,
           -p log s(r_w - r_l - margin) - (1 - p) log s(r_l - r_w + margin).
Source:    the reward models of Xwin-LM (arXiv 2405.20335), trained on multi-turn pairs; Bradley-Terry loss as in
           Ouyang et al. 2022 (arXiv 2203.02155), margin as in Llama 2 (arXiv 2307.09288), eq. 2.
Differs:   the paper's body was not available, so loss and settings are the field's common ones. Soft labels, the
           centre term and losses over whole sets are ours to choose; accuracy is reported by turn and by margin,
           beside the rule "the longer answer is better".

    postgrad reward --data.path runs/annotate --model.path runs/sft/model

Letters: B prompts, K answers of a prompt, S sequences, P pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from postgrad.alignment.builtin import with_data
from postgrad.alignment.comparisons import (
    Comparisons,
    accuracy_minus_length,
    accuracy_tables,
    comparisons,
    judge,
    length_accuracy,
    prompt_accuracy,
    to_table,
)
from postgrad.alignment.wiring import Plan, check_training, counts_table, spread_values, training_plan
from postgrad.core.batches import eval_batches, tree_batches
from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from postgrad.core.data import hold_out, load_pairs, load_sets
from postgrad.core.distributed import first_rank
from postgrad.core.items import Pair, ResponseSet
from postgrad.core.loop import Loss, Metric, train
from postgrad.core.models import choose_layout, load_reward_model, save_model, sequence_scores, within_context
from postgrad.core.report import Report
from postgrad.core.rows import Rows
from postgrad.core.runtime import Job, finish, finished, start
from postgrad.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Preference pairs or scored sets to a model that scores answers."""

    loss: Literal["pairs", "all_pairs", "plackett_luce"] = "pairs"
    """Pairs; or, on scored sets, every pair of a prompt's answers (a prompt counts once) or their whole ranking."""
    center: float = 0.01
    """Weight of the squared sum of a pair's scores, which keeps scores near 0; 0 = off."""
    margin: float = 0.0
    """Times the data's margin, this is how far the better score should lead; 0 = margins are not used."""
    soft_labels: bool = True
    """Use the data's probabilities that the chosen answer is better; otherwise round them."""
    num_buckets: int = 4
    """Number of margin buckets in the report."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig(batch_size=64, optim=OptimConfig(lr=1e-5))
    runtime: RuntimeConfig = RuntimeConfig()


def reward_loss(
    scores: Float[Tensor, "B 2"],
    p: Float[Tensor, " B"] | None = None,
    margin: Float[Tensor, " B"] | None = None,
    *,
    center: float = 0.0,
) -> Float[Tensor, " B"]:
    """Return the Bradley-Terry loss of each pair; columns are chosen, rejected.

    Args: p: probability that chosen is better, none means 1. margin: how far chosen should lead. center: weight of
    the squared sum of the two scores.
    """
    lead = scores[:, 0] - scores[:, 1] - (0 if margin is None else margin)  # [B]
    loss = -F.logsigmoid(lead)
    if p is not None:
        loss = p * loss - (1 - p) * F.logsigmoid(-lead)
    return loss + center * scores.sum(1) ** 2


def all_pairs_loss(scores: Float[Tensor, "B K"], gold: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Return the mean of -log s(r_i - r_j) over a prompt's pairs with gold_i > gold_j; 0 where there are none.

    Args: gold: NaN where a prompt has fewer than K answers.
    Source: InstructGPT, Ouyang et al. 2022 (arXiv 2203.02155), eq. 1.
    """
    better = gold[:, :, None] > gold[:, None, :]  # [B, K, K]; False beside a NaN
    loss = -F.logsigmoid(scores[:, :, None] - scores[:, None, :])
    return (loss * better).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)


def plackett_luce_loss(scores: Float[Tensor, "B K"], gold: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Return -log P(ranking by gold) / (answers - 1), P a product of softmaxes over the answers not yet ranked.

    Equal gold counts in the order given. Args: gold: NaN where a prompt has fewer than K answers.
    Source: Plackett 1975; for reward models, Zhu et al. 2023 (arXiv 2301.11270), eq. 3.
    """
    present = ~gold.isnan()  # [B, K]
    order = gold.nan_to_num(nan=-torch.inf, neginf=-torch.inf).argsort(dim=1, descending=True, stable=True)
    present = present.gather(1, order)
    ranked = scores.gather(1, order).masked_fill(~present, torch.finfo(scores.dtype).min)  # [B, K] best first
    tail = ranked.flip(1).logcumsumexp(1).flip(1)  # [B, K] over the answers from k on
    stages = torch.where(present, tail - ranked, 0.0)  # the last answer's stage is 0
    return stages.sum(1) / (present.sum(1) - 1).clamp(min=1)


def check(config: RewardConfig) -> None:
    """Refuse settings that contradict each other."""
    check_training(config.data, config.train)
    if config.center < 0 or config.margin < 0:
        raise ConfigError(f"center and margin must be >= 0, got {config.center} and {config.margin}.")
    if config.margin > 0 and config.loss != "pairs":
        raise ConfigError(f"margin applies to loss 'pairs' only, got loss {config.loss!r}. Set margin to 0.")
    if config.num_buckets < 1:
        raise ConfigError(f"num_buckets must be >= 1, got {config.num_buckets}.")


def plan(config: RewardConfig) -> Plan:
    """Say what a run would do: rows, steps, parameters, memory."""
    check(config)
    with TemporaryDirectory() as folder:
        train_items, _, counts = load_items(config, Path(folder))
    return training_plan(len(train_items), counts, config.model, config.train)


def prompt_losses(
    config: RewardConfig, data: Comparisons, index: Sequence[int], scores: Float[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """Return the configured loss of the prompts at ``index``, given their scores as a table."""
    gold = data.at(index).to(scores.device)
    if config.loss == "pairs":
        p = gold[:, 0] if config.soft_labels else gold[:, 0].round()
        margin = config.margin * data.margin[list(index)].to(scores.device)
        return reward_loss(scores, p, margin, center=config.center)
    ranking = all_pairs_loss if config.loss == "all_pairs" else plackett_luce_loss
    mean = scores.sum(1) / (~gold.isnan()).sum(1)  # [B]
    return ranking(scores, gold) + config.center * (2 * mean) ** 2


def reward_step(config: RewardConfig, model: nn.Module, data: Comparisons, rows: Rows, step: int) -> Loss:
    """Return a micro-batch's summed loss; its weight is its number of prompts."""
    gold = data.at(rows.index)  # [B, K]
    scores = to_table(sequence_scores(model, rows), ~gold.isnan())  # [B, K]
    losses = prompt_losses(config, data, rows.index, scores)
    num = float(losses.shape[0])
    gold = gold.nan_to_num(-torch.inf).to(scores.device)
    best = scores.detach().masked_fill(gold.isinf(), -torch.inf).argmax(1) == gold.argmax(1)
    metrics: dict[str, Metric] = {
        "best_found": (best.float().sum(), num),
        "score": (scores.detach().sum(), float(rows.num_sequences)),
    }
    return Loss(losses.sum(), num, metrics, rows.num_tokens)


def held_out_scores(model: nn.Module, held: Comparisons, batches: Sequence[Rows], job: Job) -> Float[Tensor, "G K"]:
    """Score the held-out answers, as a table."""
    values = spread_values(held.trees, batches, partial(sequence_scores, model), job)
    return to_table(torch.tensor([x for row in values for x in row]), ~held.gold.isnan())


def evaluation(config: RewardConfig, held: Comparisons, scores: Float[Tensor, "G K"]) -> dict[str, float]:
    """Return loss, pair accuracy with its interval, and the length rule's accuracy of held-out prompts."""
    loss = prompt_losses(config, held, range(len(held.trees)), scores).mean()
    judged = judge(held, scores)
    if not judged.better.size:
        return {"loss": float(loss)}
    accuracy, lead = prompt_accuracy(judged), accuracy_minus_length(judged)
    return {
        "loss": float(loss),
        "pairs": float(judged.better.size),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "length_rule": length_accuracy(judged).value,
        "accuracy_minus_length": lead.value,
        "accuracy_minus_length_low": lead.low,
        "accuracy_minus_length_high": lead.high,
    }


def load_items(
    config: RewardConfig, folder: Path
) -> tuple[list[Pair] | list[ResponseSet], list[Pair] | list[ResponseSet], dict[str, int]]:
    """Load pairs or scored sets; give those to train on, those set aside, and what became of the rows."""
    seed, share = config.runtime.seed, config.data.held_out
    if config.loss == "pairs":
        pairs = load_pairs(with_data(config.data, "pairs", folder, seed))
        return (*hold_out(pairs.items, share, seed), pairs.counts)
    sets = load_sets(with_data(config.data, "sets", folder, seed))
    return (*hold_out(sets.items, share, seed), sets.counts)


def run(config: RewardConfig) -> Report:
    """Train a reward model and judge it on prompts it has not seen."""
    job = start(config, check, "reward")
    if report := finished(job):
        return report
    model, tokenizer = load_reward_model(config.model, job)
    config = replace(config, data=within_context(config.data, model))
    layout, pad = choose_layout(config.model, model, job), tokenizer.pad_token_id
    items, held_items, counts = load_items(config, job.folder)
    data, held = (comparisons(part, tokenizer, config.data) for part in (items, held_items))
    micro_tokens = config.train.micro_tokens
    batches = tree_batches(data.trees, config.train, job, data=config.data, layout=layout, pad_id=pad)
    held_batches = eval_batches(
        held.trees, row_length=0, micro_tokens=micro_tokens, layout=layout, pad_id=pad, device=job.device
    )

    def evaluate(step: int) -> dict[str, float]:
        return evaluation(config, held, held_out_scores(model, held, held_batches, job))

    loss_fn = partial(reward_step, config, model, data)
    report = train(model, batches, loss_fn, evaluate if held.trees else None, config.train, job)
    first_rank(lambda: save_model(model, tokenizer, job.folder / "model"))
    judged = judge(held, held_out_scores(model, held, held_batches, job))
    tables = accuracy_tables(judged, config.num_buckets)
    found = counts_table({**counts, **data.counts_as("training"), **held.counts_as("held out")})
    return finish(job, replace(report, sections=(*report.sections, *tables, found)))
