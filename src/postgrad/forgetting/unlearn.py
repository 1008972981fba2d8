"""Unlearn rows: a language model loses the answers it is asked to forget and keeps the others.

Formula:   NLL(x_r) + beta mean relu(bound - NLL(x_f)) + alpha sum_g ||g||_2 (forgetting/text_losses.py), trained by
           low-rank pairs on the feed-forward layers, one group a block; a block whose group ends at zero is unchanged.
Source:    GS-LoRA (arXiv 2403.11530) carried over from classifiers; forget and retain sets as TOFU (arXiv 2401.06121).
Differs:   bounds that make forgotten rows look like rows never seen; NPO and a divergence from the base as options; a
           gold model that never saw the rows, where the model learns here. No ledger: that is for classifiers.

    postgrad unlearn --model.path my-model --forget private.jsonl --retain others.jsonl --held-out unseen.jsonl

Without arguments: a small Llama learns facts about people who do not exist, then forgets a tenth of the people.

Letters: N target tokens, S sequences.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from postgrad.core.adapters import unwrap
from postgrad.core.batches import num_steps, tree_batches
from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from postgrad.core.distributed import first_rank
from postgrad.core.layer_adapters import activate, export_adapter, initialise, inject, pairs, prune
from postgrad.core.loop import ENOUGH, Loss, train
from postgrad.core.models import (
    choose_layout,
    head_of,
    hidden_states,
    load_lm,
    load_tokenizer,
    planned_parameters,
    save_model,
    target_nll,
    training_memory_gib,
    within_context,
)
from postgrad.core.ops import token_logprobs
from postgrad.core.report import Report, read_metrics
from postgrad.core.rows import Rows, Tree
from postgrad.core.runtime import Job, finish, finished, stage_seed, start
from postgrad.errors import ConfigError, GateError
from postgrad.forgetting.blocks import Block, ffn_blocks
from postgrad.forgetting.losses import group_norms, lora_groups, snap, structure
from postgrad.forgetting.text_losses import (
    Gone,
    TextObjectiveConfig,
    lacking,
    matched_bounds,
    odds_against,
    token_kl,
    unlearn_loss,
)
from postgrad.forgetting.text_rows import (
    BothBatches,
    Measured,
    Packing,
    Part,
    Sources,
    Trees,
    both_batches,
    forget_steps,
    measure,
    read_texts,
    tokenised,
    with_facts,
)
from postgrad.forgetting.unlearn_report import Found, counts_table, summary, unlearn_sections

__all__ = ["UnlearnConfig", "check", "plan", "run", "unlearn_loss"]

NAME = "unlearn"
SLACK = 0.25
"""A row counts as forgotten once it lacks no more than this, in nats a token."""
WATCHED = 256
"""Retained rows that are looked at while training, at most; all are at the end."""
Plan = dict[str, str | int | float]
Steps = Callable[[Part, int], Loss]


@dataclass(frozen=True, kw_only=True)
class UnlearnConfig:
    """A model, rows to forget, and rows to keep."""

    forget: str = ""
    """File of rows to forget; "" = a share of data.path."""
    retain: str = ""
    """File of rows to keep; "" = the rest of data.path."""
    held_out: str = ""
    """File of rows the model never saw, to compare with; "" = data.held_out of those to keep, if it learns here."""
    share: float = 0.1
    """How much of data.path is forgotten, where no file says so."""
    learn: bool = False
    """Finetune on all rows first, those to forget included, as benchmarks do; the tiny model always does."""
    gold: bool = True
    """If the model learns here, have another learn without the rows to forget, to compare with."""
    kept: int = 4
    """Rows to keep that each row to forget is seen with."""
    rank: int = 16
    """Rank of the adapter's pairs."""
    scale: float = 16.0
    """LoRA alpha: the update is multiplied by scale / rank."""
    layers: str = ""
    """Regular expression for the layers that get pairs; "" = the feed-forward layers of every block."""
    snap: float = 0.05
    """Blocks whose group ends below this norm are left as they were."""
    tolerance: float = 0.02
    """Training stops when all rows are forgotten and the loss of rows to keep rose by at most so many nats a token."""
    objective: TextObjectiveConfig = TextObjectiveConfig()
    model: ModelConfig = ModelConfig(tiny_layers=4)
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig(epochs=30.0, batch_size=8, eval_every=25, optim=OptimConfig(lr=5e-3, warmup=0.05))
    learning: TrainConfig = TrainConfig(epochs=35.0, optim=OptimConfig(lr=4e-3, warmup=0.05, final=0.01))
    runtime: RuntimeConfig = RuntimeConfig()


def check(config: UnlearnConfig) -> None:
    """Refuse settings that contradict each other."""
    given = bool(config.forget), bool(config.retain), bool(config.data.path)
    if given not in ((True, True, False), (False, False, True), (False, False, False)):
        raise ConfigError(
            "expected forget and retain, or data.path of which a share is forgotten, or none of the three; found "
            f"forget {config.forget!r}, retain {config.retain!r}, data.path {config.data.path!r}."
        )
    if config.model.lora_rank:
        raise ConfigError("model.lora_rank: the rows are unlearnt by an adapter of its own; set rank instead.")
    least = {"rank": config.rank, "kept": config.kept, "train.batch_size": config.train.batch_size}
    if low := {name: value for name, value in least.items() if value < 1}:
        raise ConfigError(f"expected at least 1 for each of {', '.join(least)}; found {low}.")
    if not 0 < config.share < 1 or not 0 <= config.data.held_out < 1:
        raise ConfigError(
            "expected share above 0 and below 1, and data.held_out from 0 to below 1; found "
            f"{config.share} and {config.data.held_out}."
        )
    _check_objective(config.objective)


def _check_objective(objective: TextObjectiveConfig) -> None:
    weights = objective.bound, objective.beta, objective.kl, objective.alpha, objective.alpha_from
    if min(weights) < 0 or objective.beta == 0 or objective.npo <= 0:
        raise ConfigError(f"objective: expected beta and npo above 0 and no number below 0; found {objective}.")


def plan(config: UnlearnConfig) -> Plan:
    """Say what a run would do: rows, steps, parameters, memory."""
    check(config)
    with TemporaryDirectory() as folder:
        sources = with_facts(_sources(config), config.data, Path(folder), config.runtime.seed)
        texts = read_texts(sources, config.data, config.runtime.seed)
    trees = tokenised(texts, load_tokenizer(config.model), config.data)
    total, _ = planned_parameters(config.model)
    trained = len(trees.forget) + len(trees.retain)
    return {
        **{f"rows {reason}": num for reason, num in trees.counts.items()},
        "rows to forget": len(trees.forget), "rows to keep": len(trees.retain), "rows never seen": len(trees.held_out),
        "steps of learning first": num_steps(trained, config.learning) if _learns(config) else 0,
        "optimizer steps": num_steps(len(trees.forget), forget_steps(config.train, len(trees.forget))),
        "parameters": total,
        "memory without activations (GiB)": round(training_memory_gib(total, total if _learns(config) else 0), 3),
    }  # fmt: skip


def run(config: UnlearnConfig) -> Report:
    """Unlearn the rows and report what is gone, what stayed, and whether it shows."""
    job = start(config, check, "unlearn")
    if report := finished(job):
        return report
    model, tokenizer, trees, packing = _load(config, job)
    base = config.model.path
    if _learns(config):
        _learn(model, [*trees.forget, *trees.retain], packing, config, replace(job, folder=job.folder / "base"))
        base = str(job.folder / "base" / "model")
        first_rank(lambda: save_model(model, tokenizer, Path(base)))
    before = _measure_all(model.eval(), trees, packing, job)
    gold = _gold(trees, packing, config, job)
    task = _prepare(config, model, trees, packing, before)
    report = train(model, _batches(task, job), _step(task, job), _Watch(task, before, job), config.train, job)
    norms = _sparse(task)
    after = _measure_all(model, trees, packing, job)
    found = Found(before, after, gold, int((~task.forgotten(after["forget"])).sum()), norms)
    first_rank(lambda: export_adapter(unwrap(model), NAME, job.folder / "adapter", base=base))
    sections = (*unlearn_sections(found), *report.sections, counts_table(trees.counts))
    return finish(job, Report("unlearn", job.folder, summary(found, _steps_taken(job)), sections))


def _steps_taken(job: Job) -> int:
    """Read how many steps the unlearning took."""
    return first_rank(lambda: max(int(str(row["step"])) for row in read_metrics(job.folder)))


def _learns(config: UnlearnConfig) -> bool:
    return config.learn or config.model.path == "tiny"


def _sources(config: UnlearnConfig) -> Sources:
    return Sources(config.forget, config.retain, config.held_out, config.share, aside=_learns(config))


def _load(config: UnlearnConfig, job: Job) -> tuple[nn.Module, PreTrainedTokenizerBase, Trees, Packing]:
    """Load the model and the rows."""
    model, tokenizer = load_lm(config.model, job, frozen=not _learns(config))
    if config.model.gradient_checkpointing:
        unwrap(model).gradient_checkpointing_enable({"use_reentrant": False})
    data = within_context(config.data, model)
    texts = read_texts(with_facts(_sources(config), data, job.folder, job.seed), data, job.seed)
    layout = choose_layout(config.model, model, job)
    packing = Packing(layout, tokenizer.pad_token_id, data.row_length, config.train.micro_tokens)
    return model, tokenizer, tokenised(texts, tokenizer, data), packing


def _learn(model: nn.Module, trees: Sequence[Tree], packing: Packing, config: UnlearnConfig, job: Job) -> None:
    """Finetune all weights on rows."""
    job.folder.mkdir(parents=True, exist_ok=True)
    data = replace(config.data, row_length=packing.row_length)
    batches = tree_batches(trees, config.learning, job, data=data, layout=packing.layout, pad_id=packing.pad_id)

    def loss_fn(rows: Rows, step: int) -> Loss:
        return Loss(target_nll(model, rows), float(len(rows.target)), {}, rows.num_tokens)

    train(model, batches, loss_fn, None, config.learning, job)


def _gold(trees: Trees, packing: Packing, config: UnlearnConfig, job: Job) -> dict[str, Measured]:
    """Measure a model that learnt from the same first weights without the rows to forget."""
    if not (config.gold and _learns(config)):
        return {}
    model, _ = load_lm(config.model, job)
    _learn(model, trees.retain, packing, config, replace(job, folder=job.folder / "gold"))
    return _measure_all(model, trees, packing, job)


def _measure_all(model: nn.Module, trees: Trees, packing: Packing, job: Job) -> dict[str, Measured]:
    return {name: measure(model, part, packing, job) for name, part in trees.parts().items()}


@dataclass(frozen=True, eq=False)
class _Task:
    """What stays the same while rows are unlearnt."""

    config: UnlearnConfig
    model: nn.Module
    trees: Trees
    packing: Packing
    blocks: Sequence[Block]
    objective: TextObjectiveConfig
    before: Measured
    """What the model as it was made of the rows to forget."""
    bounds: Float[Tensor, " N"]
    """Of the tokens to forget, row after row."""

    def forgotten(self, found: Measured) -> Bool[Tensor, " S"]:
        """Say which rows to forget have all but reached their bounds."""
        gone = Gone(-found.losses, found.row, found.tokens, self.bounds, -self.before.nll)
        return lacking(gone, self.objective) <= SLACK

    def groups(self) -> list[list[Tensor]]:
        """Give the adapter's matrices block by block."""
        own = pairs(self.model, NAME)
        return lora_groups([[own[layer] for layer in block.linears] for block in self.blocks])


def _prepare(
    config: UnlearnConfig, model: nn.Module, trees: Trees, packing: Packing, before: Mapping[str, Measured]
) -> _Task:
    """Put the adapter in place and set each row's bound."""
    blocks = ffn_blocks(model, config.layers)
    linears = [layer for block in blocks for layer in block.linears]
    inject(model, NAME, linears, rank=config.rank, alpha=config.scale)
    initialise(model, NAME, seed=stage_seed(config.runtime.seed, "adapter", NAME))
    activate(model, [NAME], trainable=NAME)
    seen, objective = before["forget"], config.objective
    if objective.kind == "matched" and "held_out" not in before:
        objective = replace(objective, kind="bounded")
    if objective.kind == "matched":
        bounds = matched_bounds(*(odds_against(-rows.losses) for rows in (seen, before["held_out"])))
    else:
        bounds = torch.full_like(seen.losses, objective.bound or math.log(head_of(model).weight.shape[0]))
    return _Task(config, model, trees, packing, blocks, objective, seen, bounds)


def _batches(task: _Task, job: Job) -> BothBatches:
    return both_batches(task.trees, task.config.kept, task.config.train, task.packing, job)


def _step(task: _Task, job: Job) -> Steps:
    """Make the loss of a micro-batch."""
    model, objective = task.model, task.objective
    num_kept, steps = len(task.trees.retain), len(_batches(task, job))

    def loss_fn(part: Part, step: int) -> Loss:
        rows, share = part
        hidden, head = hidden_states(model, rows)[rows.source], head_of(model)
        logprobs = token_logprobs(hidden, head, rows.target)  # [N]
        index = torch.tensor(rows.index, device=hidden.device)  # [S], each row is one sequence
        forgotten = index >= num_kept
        kept = ~forgotten[rows.sequence]  # [N]
        retain = -logprobs[kept].sum()
        apart = hidden.new_zeros((), dtype=torch.float32)
        if objective.kl:
            apart = token_kl(hidden[kept], _as_it_was(model, rows)[kept], head)
        gone = _gone(task, rows, logprobs, index - num_kept)
        on = objective.alpha > 0 and step >= objective.alpha_from * steps
        penalty = structure(task.groups()) if on else retain.new_zeros(())
        terms = unlearn_loss(retain + objective.kl * apart, gone, penalty, share, objective)
        tokens, num = float(kept.sum()), float(len(gone.lengths))
        shown = {
            "retain_loss": (retain.detach(), tokens),
            "forget_loss": (-(gone.rows(gone.logprobs.detach()) / gone.lengths).sum(), num),
            "structure": (terms.structure, share.part),
            **({"kl": (apart.detach(), tokens)} if objective.kl else {}),
        }
        return Loss(terms.total, share.part, shown, rows.num_tokens)

    return loss_fn


def _gone(task: _Task, rows: Rows, logprobs: Float[Tensor, " N"], place: Int[Tensor, " S"]) -> Gone:
    """Pick the tokens of rows to forget. Args: place: of each row among those to forget, negative for others."""
    forgotten = place >= 0
    ours = forgotten[rows.sequence]  # [N]
    sequence = (forgotten.cumsum(0) - 1)[rows.sequence[ours]]
    bounds = torch.split(task.bounds.float(), task.before.tokens.tolist())
    chosen = place[forgotten].tolist()
    own = torch.cat([bounds[i] for i in chosen]) if chosen else task.bounds[:0].float()
    base = -task.before.nll.float()[chosen]
    return Gone(logprobs[ours], sequence, rows.lengths[forgotten], own.to(logprobs.device), base.to(logprobs.device))


def _as_it_was(model: nn.Module, rows: Rows) -> Tensor:
    """Compute hidden states of the targets without the adapter, and without dropout."""
    was_training = model.training
    activate(model.eval(), [])
    with torch.no_grad():
        hidden = hidden_states(model, rows)[rows.source]
    activate(model.train(was_training), [NAME], trainable=NAME)
    return hidden


class _Watch:
    """Evaluates the rows to forget and some to keep, and says when it is enough."""

    def __init__(self, task: _Task, before: Mapping[str, Measured], job: Job) -> None:
        self._task, self._job = task, job
        num = len(task.trees.retain)
        self._some = torch.linspace(0, num - 1, min(num, WATCHED), dtype=torch.float64).round().long()
        was = before["retain"]
        self._was = float(was.nll[self._some].sum() / was.tokens[self._some].sum())

    def __call__(self, step: int) -> dict[str, float]:
        task = self._task
        some = [task.trees.retain[i] for i in self._some.tolist()]
        gone, kept = (measure(task.model, part, task.packing, self._job) for part in (task.trees.forget, some))
        reached = float(task.forgotten(gone).double().mean())
        rise = kept.loss - self._was
        norms = group_norms(task.groups())
        figures = {
            "forget_loss": gone.loss, "retain_loss": kept.loss, "forgotten": reached,
            "blocks": float((norms >= task.config.snap).sum()),
        }  # fmt: skip
        return {**figures, ENOUGH: float(reached == 1.0 and rise <= task.config.tolerance)}


def _sparse(task: _Task) -> dict[str, float]:
    """Take the adapter off blocks whose group is near zero; return the norms at the end of all blocks."""
    norms = group_norms(task.groups()).tolist()
    gone = snap(task.groups(), task.config.snap)
    if len(gone) == len(task.blocks):
        raise GateError(
            f"every block's group ended below {task.config.snap}, so nothing is forgotten. Lower objective.alpha, or "
            "raise objective.alpha_from or objective.beta."
        )
    prune(task.model, NAME, [layer for i in gone for layer in task.blocks[i].linears])
    return {block.name: 0.0 if i in gone else norms[i] for i, block in enumerate(task.blocks)}
