"""Direct preference optimisation: a policy learns from chosen and rejected answers, without a reward model.

Formula:   -log s(beta d), d = log(pi / ref)(chosen) - log(pi / ref)(rejected); twenty more losses in `preference`.
Source:    the last stage of Xwin-LM (arXiv 2405.20335), on pairs from a set of 64 responses a prompt; DPO, Rafailov
           et al. 2023 (arXiv 2305.18290), eq. 7.
Differs:   the paper's body was not available: beta 0.1, lr 5e-7, one epoch are the field's common settings. The
           rejected answer defaults to mean - 2 sigma of the set's scores (arXiv 2502.16825), not to the worst.
           Reference log-probabilities are computed once and stored, so no reference model is held in training.
           Multiwise losses train on a whole ranking of answers that share their prompt.

    postgrad dpo --data.path runs/sample --model.path runs/sft/model

Letters: B prompts, K answers of a prompt (2 but for multiwise losses), S sequences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from postgrad.alignment.logratios import Logprobs, length_desensitised, logratio_metrics
from postgrad.alignment.pairs import parse_strategy
from postgrad.alignment.preference import (
    MULTIWISE,
    REFERENCE_FREE,
    LossSettings,
    check_loss,
    preference_loss,
)
from postgrad.alignment.reference import reference_logprobs
from postgrad.alignment.selection import PickSettings, select, write_pairs
from postgrad.alignment.wiring import Plan, check_training, counts_table, spread_values, training_plan
from postgrad.core.batches import eval_batches, tree_batches
from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from postgrad.core.distributed import first_rank
from postgrad.core.loop import Loss, Metric, train
from postgrad.core.metrics import mean_interval
from postgrad.core.models import choose_layout, load_lm, save_model, sequence_logprobs, target_logprobs, within_context
from postgrad.core.report import Cell, Note, Report, Section
from postgrad.core.rows import Rows, Tree
from postgrad.core.runtime import Job, finish, finished, start
from postgrad.core.text import answer_trees
from postgrad.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Chosen and rejected answers to a policy that prefers the chosen ones."""

    loss: str = "sigmoid"
    """Name in `preference.LOSSES`: sigmoid (DPO), cdpo, robust, hinge, ipo, sigmoid_norm, simpo, pl_dpo, ..."""
    beta: float = 0.1
    """Pull towards the reference, > 0."""
    smoothing: float = 0.0
    """Chance that a label is wrong, in [0, 0.5), for the losses that know it."""
    gamma: float = 0.5
    """SimPO: margin by which the chosen answer should lead."""
    nll: float = 0.0
    """Weight of the chosen answer's mean negative log-likelihood, added to the loss."""
    divergence: str = "reverse_kl"
    """f-divergence to the reference: reverse_kl (plain DPO), forward_kl, js, alpha:<number>."""
    ld_alpha: float = 1.0
    """Weight of tokens past the pair's shorter length (LD-DPO); 1 = plain sums."""
    chosen: int = 1
    """Sets: rank of the chosen answer, from the best."""
    rejected: str = "mu-2sigma"
    """Sets: worst, random, rank:<r>, mu-<k>sigma, gap:<low>:<high>, length, near or likely."""
    num_rejected: int = 1
    """Sets, losses pl_dpo and s_dpo: rejected answers a prompt, spread evenly over the ranking."""
    reference: str = ""
    """Another reference model's folder or hub name; "" = the policy as it starts."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig(batch_size=64, optim=OptimConfig(lr=5e-7))
    runtime: RuntimeConfig = RuntimeConfig()


@dataclass(frozen=True)
class PairData:
    """Trees of compared answers, chosen first, with what is known of them."""

    trees: list[Tree]
    ids: list[str]
    p: Float[Tensor, " G"]
    reference: Float[Tensor, "G K"] | None = None


def dpo_loss(policy: Float[Tensor, "B 2"], reference: Float[Tensor, "B 2"], *, beta: float) -> Float[Tensor, " B"]:
    """Return -log s(beta d) of each pair; columns are chosen, rejected, summed log-probabilities in nats.

    Source: Rafailov et al. 2023, eq. 7. The other losses are in `preference`.
    """
    return preference_loss("sigmoid", Logprobs(policy, reference), LossSettings(beta=beta))


def loss_settings(config: DPOConfig) -> LossSettings:
    """Gather the numbers of the loss."""
    return LossSettings(
        beta=config.beta,
        smoothing=config.smoothing,
        gamma=config.gamma,
        nll=config.nll,
        divergence=config.divergence,
    )


def pick_settings(config: DPOConfig) -> PickSettings:
    """Gather what chooses the answers."""
    return PickSettings(
        chosen=config.chosen,
        rejected=config.rejected,
        num_rejected=config.num_rejected,
        seed=config.runtime.seed,
    )


def check(config: DPOConfig) -> None:
    """Refuse settings that contradict each other."""
    check_training(config.data, config.train)
    check_loss(config.loss, loss_settings(config))
    parse_strategy(config.rejected)
    if config.chosen < 1 or config.num_rejected < 1:
        raise ConfigError(f"chosen and num_rejected must be >= 1, got {config.chosen}, {config.num_rejected}.")
    if config.num_rejected > 1 and config.loss not in MULTIWISE:
        names = " or ".join(sorted(MULTIWISE))
        raise ConfigError(f"num_rejected {config.num_rejected} needs the loss {names}, got {config.loss!r}.")
    if not 0 <= config.ld_alpha <= 1 or (config.ld_alpha < 1 and config.num_rejected > 1):
        raise ConfigError(f"ld_alpha must lie in [0, 1], and be 1 with several rejected, got {config.ld_alpha}.")
    if config.reference and config.loss in REFERENCE_FREE:
        raise ConfigError(f"The loss {config.loss!r} uses no reference; leave reference empty.")


def plan(config: DPOConfig) -> Plan:
    """Say what a run would do: rows, steps, parameters, memory."""
    check(config)
    with TemporaryDirectory() as folder:
        found = select(config.data, pick_settings(config), Path(folder))
    return training_plan(len(found.train), found.counts, config.model, config.train)


def answer_logprobs(model: nn.Module, ld_alpha: float, rows: Rows) -> Float[Tensor, " S"]:
    """Return each answer's log-probability, tokens past the pair's shorter length weighted by ``ld_alpha``."""
    if ld_alpha == 1:
        return sequence_logprobs(model, rows)
    values, lengths = target_logprobs(model, rows), rows.lengths.view(-1, 2)
    return length_desensitised(values, rows.sequence, lengths, alpha=ld_alpha).flatten()


def batch_of(policy: Float[Tensor, " S"], data: PairData, index: Sequence[int], lengths: Tensor) -> Logprobs:
    """Lay log-probabilities out by prompt and put those of the reference beside them."""
    at, device = list(index), policy.device
    reference = None if data.reference is None else data.reference[at].to(device)
    shape = (len(at), -1)
    return Logprobs(policy.view(shape), reference, lengths.view(shape), data.p[at].to(device))


def dpo_step(config: DPOConfig, model: nn.Module, data: PairData, rows: Rows, step: int) -> Loss:
    """Return a micro-batch's summed loss; its weight is its number of prompts."""
    batch = batch_of(answer_logprobs(model, config.ld_alpha, rows), data, rows.index, rows.lengths)
    loss = preference_loss(config.loss, batch, loss_settings(config))
    metrics: dict[str, Metric] = {**logratio_metrics(batch, config.beta)}
    return Loss(loss.sum(), float(loss.shape[0]), metrics, rows.num_tokens)


def evaluation(config: DPOConfig, held: PairData, values: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return held-out loss, accuracy with its interval, and the log-ratios."""
    lengths = torch.tensor([[len(answer) for answer in tree.answers] for tree in held.trees])
    policy = torch.tensor([value for row in values for value in row])
    batch = batch_of(policy, held, range(len(held.trees)), lengths)
    loss = preference_loss(config.loss, batch, loss_settings(config)).mean()
    means = {name: float(total) / num for name, (total, num) in logratio_metrics(batch, config.beta).items()}
    reward = batch.mean_policy if batch.reference is None else batch.ratio  # [G, K]
    gap = reward[:, :1] - reward[:, 1:]  # [G, K-1]
    right = (gap > 0) + 0.5 * (gap == 0)
    interval = mean_interval(right.double().mean(1).numpy())
    return {"loss": float(loss), **means, "accuracy_low": interval.low, "accuracy_high": interval.high}


def load_trees(config: DPOConfig, tokenizer: PreTrainedTokenizerBase, job: Job) -> tuple[PairData, int, dict[str, int]]:
    """Choose and tokenise answers; give all of them, the number to train on (they come first), and the counts."""
    found = select(config.data, pick_settings(config), job.folder)
    first_rank(
        lambda: write_pairs(job.folder / "pairs", [*found.train, *found.held], pick_settings(config), config.data.path)
    )
    choices = [*found.train, *found.held]
    trees, kept, counts = answer_trees(tokenizer, [(c.prompt, c.answers) for c in choices], config.data)
    num_train = sum(i < len(found.train) for i in kept)
    p = torch.tensor([choices[i].p for i in kept])
    found_counts = {**found.counts, **{f"answers {reason}": num for reason, num in counts.items()}}
    return PairData(trees, [choices[i].id for i in kept], p), num_train, found_counts


def part(data: PairData, start: int, end: int) -> PairData:
    """Cut a run of prompts out."""
    reference = None if data.reference is None else data.reference[start:end]
    return PairData(data.trees[start:end], data.ids[start:end], data.p[start:end], reference)


def with_reference(
    config: DPOConfig, policy: nn.Module, data: PairData, batch: Callable[..., list[Rows]], job: Job
) -> PairData:
    """Add the reference's log-probabilities; another reference model than the policy is loaded, used and freed."""
    if config.loss in REFERENCE_FREE:
        return data
    model = policy.eval()
    if config.reference:
        # Its own adapter is merged when it loads; the policy's settings for new ones do not concern it.
        model, _ = load_lm(replace(config.model, path=config.reference, lora_rank=0), job, frozen=True)
    table = reference_logprobs(
        model, data.trees, data.ids, batch=batch, function=partial(answer_logprobs, model, config.ld_alpha),
        variant="" if config.ld_alpha == 1 else f"ld_alpha {config.ld_alpha}", job=job,
    )  # fmt: skip
    return replace(data, reference=table)


def displacement(results: Mapping[str, Cell]) -> tuple[Section, ...]:
    """Warn where both log-ratios fell: the policy moved away from both answers, towards neither."""
    chosen, rejected = results.get("chosen_logratio", 0.0), results.get("rejected_logratio", 0.0)
    if isinstance(chosen, str) or isinstance(rejected, str) or chosen >= 0 or rejected >= 0:
        return ()
    text = (
        f"Both answers became less likely (chosen {chosen:.3g}, rejected {rejected:.3g} nats). Their probability went "
        "to other answers. A term on the chosen answer (nll 0.1 to 1), a larger beta or fewer steps hold it back."
    )
    return (Note("Likelihood displacement", text, "warning"),)


def run(config: DPOConfig) -> Report:
    """Choose answers, score them under the reference once, train the policy, judge it on prompts set aside."""
    job = start(config, check, "dpo")
    if report := finished(job):
        return report
    model, tokenizer = load_lm(config.model, job)
    config = replace(config, data=within_context(config.data, model))
    layout, pad = choose_layout(config.model, model, job), tokenizer.pad_token_id
    micro_tokens = config.train.micro_tokens
    everything, num_train, counts = load_trees(config, tokenizer, job)
    batch = partial(eval_batches, row_length=0, micro_tokens=micro_tokens, layout=layout, pad_id=pad, device=job.device)
    everything = with_reference(config, model, everything, batch, job)
    data, held = part(everything, 0, num_train), part(everything, num_train, len(everything.trees))
    batches = tree_batches(data.trees, config.train, job, data=config.data, layout=layout, pad_id=pad)
    held_batches = batch(held.trees)

    def evaluate(step: int) -> dict[str, float]:
        function = partial(answer_logprobs, model, config.ld_alpha)
        return evaluation(config, held, spread_values(held.trees, held_batches, function, job))

    loss_fn = partial(dpo_step, config, model, data)
    report = train(model, batches, loss_fn, evaluate if held.trees else None, config.train, job)
    first_rank(lambda: save_model(model, tokenizer, job.folder / "model"))
    sections = (*report.sections, *displacement(report.results), counts_table(counts))
    shortened = counts["answers shortened"] / len(everything.trees)
    return finish(job, replace(report, results={**report.results, "shortened": shortened}, sections=sections))
