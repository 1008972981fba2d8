"""Unlearn rows: a language model loses the answers it is asked to forget and keeps the others.

Formula:   NLL(x_r) + beta mean relu(bound - NLL(x_f)) + alpha sum_g ||g||_2 (forgetting/text_losses.py), trained by
           low-rank pairs on the feed-forward layers, one group a block; a block whose group ends at zero is unchanged.
Source:    GS-LoRA (arXiv 2403.11530) carried over from classifiers; forget and retain sets, figures as TOFU (arXiv
           2401.06121).
Differs:   bounds that make forgotten rows look like rows never seen; published objectives and a divergence from the
           base as options. A request is an adapter in a service (forgetting/text_service.py), never merged.

    postgrad unlearn --model.path my-model --forget private.jsonl --retain others.jsonl --held-out unseen.jsonl

Without arguments: a small Llama learns facts about people who do not exist, then forgets a tenth of the people.

Letters: N target tokens, S sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from postgrad.core.adapters import unwrap
from postgrad.core.batches import num_steps, tree_batches
from postgrad.core.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
    dump_config,
    load_config,
)
from postgrad.core.distributed import first_rank
from postgrad.core.layer_adapters import drop
from postgrad.core.loop import Loss, train
from postgrad.core.models import (
    choose_layout,
    load_lm,
    load_tokenizer,
    planned_parameters,
    save_model,
    target_nll,
    training_memory_gib,
    within_context,
)
from postgrad.core.report import Report
from postgrad.core.rows import Rows, Tree
from postgrad.core.runtime import Job, finish, finished, start
from postgrad.errors import ArtefactError, ConfigError, ModelError
from postgrad.forgetting.entries import REQUEST_ID
from postgrad.forgetting.ledger import states
from postgrad.forgetting.network_service import Carried, NetworkService
from postgrad.forgetting.request import ForgetRequest, check_request, manifest_hash
from postgrad.forgetting.service_parts import adapter_name
from postgrad.forgetting.service_runs import entries_of_run
from postgrad.forgetting.text_batches import Packing, phases
from postgrad.forgetting.text_losses import BASELINES, TextObjectiveConfig, unlearn_loss
from postgrad.forgetting.text_measures import Known, know
from postgrad.forgetting.text_rows import Sources, Trees, check_given, read_texts, tokenised, with_facts
from postgrad.forgetting.text_service import LIMITS, rows_of, text_service
from postgrad.forgetting.unlearn_report import (
    Found,
    Record,
    Tried,
    counts_table,
    recorded,
    summary,
    unlearn_sections,
)
from postgrad.forgetting.unlearn_steps import AdapterConfig, Outcome, Place, Settings, prepare, unlearn_rows

__all__ = ["UnlearnConfig", "check", "plan", "run", "unlearn_loss"]

Plan = dict[str, str | int | float]
FIRST = "request-1"


@dataclass(frozen=True, kw_only=True)
class UnlearnConfig:
    """A model, rows to forget, and rows to keep."""

    forget: str = ""
    """File of rows to forget; "" = a share of data.path."""
    retain: str = ""
    """File of rows to keep; "" = the rest of data.path."""
    held_out: str = ""
    """File of rows the model never saw, to compare with; "" = data.held_out of those to keep, if it learns here."""
    utility: tuple[str, ...] = ()
    """Files of other rows that count towards model utility, as TOFU's real authors and world facts do."""
    share: float = 0.1
    """How much of data.path is forgotten, where no file says so."""
    learn: bool = False
    """Finetune on all rows first, those to forget included, as benchmarks do; the tiny model always does."""
    gold: str = "auto"
    """A model that never saw the rows to forget, to compare with: its path, or none; auto = if the model learns here,
    another learns without those rows."""
    compare: tuple[str, ...] = ()
    """Published objectives to forget the same rows with, for a table: ascent, difference, npo, idk."""
    request: str = ""
    """The request's id, or a file of its (JSON: id, legal_basis, deadline, salt, ...); "" = request-1."""
    service: str = ""
    """Service folder; "" = service/ in the run folder. A folder of an earlier run is gone on with."""
    objective: TextObjectiveConfig = TextObjectiveConfig()
    """What is asked of the rows."""
    adapter: AdapterConfig = AdapterConfig()
    """The low-rank pairs."""
    model: ModelConfig = ModelConfig(tiny_layers=4)
    """The model."""
    data: DataConfig = DataConfig()
    """Rows of both kinds, and how rows are read."""
    train: TrainConfig = TrainConfig(epochs=60.0, batch_size=8, eval_every=25, optim=OptimConfig(lr=5e-3, warmup=0.05))
    """How the adapter is trained; an epoch is a pass over the rows to forget."""
    learning: TrainConfig = TrainConfig(epochs=30.0, optim=OptimConfig(lr=5e-3, warmup=0.05, final=0.01))
    """How the model learns the rows first."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Where and how the run happens."""


def check(config: UnlearnConfig) -> None:
    """Refuse settings that contradict each other."""
    check_given(config.forget, config.retain, config.data.path)
    if config.model.lora_rank:
        raise ConfigError("model.lora_rank: the rows are unlearnt by an adapter of its own; set adapter.rank instead.")
    least = {
        "adapter.rank": config.adapter.rank, "objective.kept": config.objective.kept,
        "train.batch_size": config.train.batch_size,
    }  # fmt: skip
    if low := {name: value for name, value in least.items() if value < 1}:
        raise ConfigError(f"expected at least 1 for each of {', '.join(least)}; found {low}.")
    if not 0 < config.share < 1 or not 0 <= config.data.held_out < 1:
        raise ConfigError(
            "expected share above 0 and below 1, and data.held_out from 0 to below 1; found "
            f"{config.share} and {config.data.held_out}."
        )
    if unknown := [name for name in config.compare if name not in BASELINES]:
        raise ConfigError(f"compare: expected some of {', '.join(BASELINES)}; found {unknown}.")
    if config.gold == "tiny":
        raise ConfigError("gold: expected a trained model, auto or none; found 'tiny', which is drawn anew.")
    request_of(config, ())
    _check_objective(config.objective)


def _check_objective(objective: TextObjectiveConfig) -> None:
    weights = objective.bound, objective.beta, objective.kl, objective.alpha, objective.alpha_until
    if min(weights) < 0 or objective.beta == 0 or objective.npo <= 0:
        raise ConfigError(f"objective: expected beta and npo above 0 and no number below 0; found {objective}.")


def request_of(config: UnlearnConfig, samples: Sequence[str]) -> ForgetRequest:
    """Read the request, or make one, for rows of these ids.

    A request without a salt of its own gets the seed for one, which is no secret: give a file where that matters.
    """
    asked = ForgetRequest(id=config.request or FIRST)
    if config.request and (Path(config.request).is_file() or not REQUEST_ID.fullmatch(config.request)):
        asked = load_config(ForgetRequest, config.request, "request")
    if asked.classes or asked.samples or asked.shots:
        raise ConfigError(f"{config.request}: expected no classes, samples or shots: the rows say what to forget.")
    salt = asked.salt or f"{config.runtime.seed % 16**32:032x}"
    request = replace(asked, samples=tuple(samples), salt=salt)
    check_request(replace(request, samples=request.samples or ("0" * 16,)))
    return request


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
        "steps of learning first": num_steps(trained, config.learning) if _learns(config) else 0,
        "optimizer steps": sum(phase.steps for phase in phases(config.train, len(trees.forget), 1.0)),
        "other objectives": len(config.compare),
        "parameters": total,
        "memory without activations (GiB)": round(training_memory_gib(total, total if _learns(config) else 0), 3),
    }  # fmt: skip


class Bench(NamedTuple):
    """A model, its rows, and how they are laid out."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    trees: Trees
    packing: Packing

    def know(self, job: Job, model: nn.Module | None = None) -> dict[str, Known]:
        """Measure the model, or another one."""
        return know((model or self.model).eval(), self.trees, self.tokenizer, self.packing, job)


def run(config: UnlearnConfig) -> Report:
    """Unlearn the rows and report what is gone, what stayed, and whether it shows."""
    job = start(config, check, "unlearn")
    if report := finished(job):
        return report
    model, tokenizer = load_lm(config.model, job, frozen=not _learns(config))
    if config.model.gradient_checkpointing:
        unwrap(model).gradient_checkpointing_enable({"use_reentrant": False})
    base = config.model.path
    if _learns(config):
        bench = _bench(config, model, tokenizer, {}, job)
        both = [*bench.trees.forget, *bench.trees.retain]
        _learn(model, both, bench.packing, config, replace(job, folder=job.folder / "base"))
        base = str(job.folder / "base" / "model")
        first_rank(lambda: save_model(model, tokenizer, Path(base)))
    folder = Path(config.service) if config.service else job.folder / "service"
    with text_service(folder, unwrap(model), base).open() as service:
        mine = first_rank(lambda: [entry.body for entry in entries_of_run(folder, job)])
        name = request_of(config, ()).id
        done = name in states(service.ledger.entries())
        if done and not mine:
            raise ArtefactError(f"request {name!r} was applied before in {folder}. Set request to an id of its own.")
        earlier = [each for each in service.active if each != name]
        service.show(earlier)
        bench = _bench(config, model, tokenizer, rows_of(service, earlier), job)
        report = _serve(config, bench, service, earlier, job)
    return finish(job, report)


def _serve(config: UnlearnConfig, bench: Bench, service: NetworkService, earlier: Sequence[str], job: Job) -> Report:
    """Carry the request out, unless an earlier part of this run did, and measure it."""
    request = request_of(config, sorted(bench.trees.samples))
    before, gold = bench.know(job), _gold(bench, config, job)
    others = _compare(config, bench, before, earlier, job)
    outcome = _unlearn(config, config.objective, bench, before, (request.id, earlier), job)
    done = request.id in states(service.ledger.entries())
    if not done:
        service.write(request)
    else:
        service.show(earlier)  # and without what was trained again, to load what was written
        service.show([*earlier, request.id])
    found = Found(before, bench.know(job), gold, outcome, len(earlier))
    if not done:
        service.enter(request, Carried(
            blocks=outcome.blocks, num_forget=len(request.samples), num_retain=len(bench.trees.retain),
            manifest_hash=manifest_hash(request.salt, request.samples), config=dump_config(config), seed=job.seed,
            hardware=str(job.device), metrics=recorded(found), policy=LIMITS,
        ))  # fmt: skip
    record = Record(service.undone(request.id), service.findings())
    sections = (*unlearn_sections(found, others, record), *outcome.sections, counts_table(bench.trees.counts))
    return Report("unlearn", job.folder, summary(found, record), sections)


def _unlearn(
    config: UnlearnConfig, objective: TextObjectiveConfig, bench: Bench, before: Mapping[str, Known],
    names: tuple[str, Sequence[str]], job: Job,
) -> Outcome:  # fmt: skip
    """Train an adapter. Args: names: the request, and those in use before it."""
    request, earlier = names
    place = Place(unwrap(bench.model), adapter_name(request), tuple(map(adapter_name, earlier)), bench.packing)
    settings = Settings(config.adapter, objective, config.train)
    measured = {part: known.measured for part, known in before.items()}
    return unlearn_rows(prepare(place, bench.trees, measured, settings, job.seed), job)


def _compare(
    config: UnlearnConfig, bench: Bench, before: Mapping[str, Known], earlier: Sequence[str], job: Job
) -> dict[str, Tried]:
    """Forget the same rows with other objectives, each with an adapter that is dropped again."""
    found = {}
    for name in config.compare:
        part = replace(job, folder=job.folder / "compare" / name)
        outcome = _unlearn(config, BASELINES[name], bench, before, (f"compare-{name}", earlier), part)
        found[name] = Tried(bench.know(job), outcome)
        drop(unwrap(bench.model), adapter_name(f"compare-{name}"))
    return found


def _learns(config: UnlearnConfig) -> bool:
    return config.learn or config.model.path == "tiny"


def _sources(config: UnlearnConfig) -> Sources:
    aside = _learns(config)
    return Sources(config.forget, config.retain, config.held_out, config.share, aside, config.utility)


def _bench(
    config: UnlearnConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase, earlier: Mapping[str, str], job: Job
) -> Bench:
    """Read the rows."""
    data = within_context(config.data, model)
    texts = read_texts(with_facts(_sources(config), data, job.folder, job.seed), data, job.seed, earlier)
    layout = choose_layout(config.model, model, job)
    packing = Packing(layout, tokenizer.pad_token_id, data.row_length, config.train.micro_tokens)
    refuse = "idk" in (config.objective.kind, *config.compare)
    return Bench(model, tokenizer, tokenised(texts, tokenizer, data, refuse=refuse), packing)


def _learn(model: nn.Module, trees: Sequence[Tree], packing: Packing, config: UnlearnConfig, job: Job) -> None:
    """Finetune all weights on rows."""
    job.folder.mkdir(parents=True, exist_ok=True)
    data = replace(config.data, row_length=packing.row_length)
    batches = tree_batches(trees, config.learning, job, data=data, layout=packing.layout, pad_id=packing.pad_id)

    def loss_fn(rows: Rows, step: int) -> Loss:
        return Loss(target_nll(model, rows), float(len(rows.target)), {}, rows.num_tokens)

    train(model, batches, loss_fn, None, config.learning, job)


def _gold(bench: Bench, config: UnlearnConfig, job: Job) -> dict[str, Known]:
    """Measure a model that never saw the rows to forget: one given, or one that learnt from the same first weights."""
    if config.gold == "none" or (config.gold == "auto" and not _learns(config)):
        return {}
    path = config.model if config.gold == "auto" else replace(config.model, path=config.gold)
    model, tokenizer = load_lm(path, job, frozen=config.gold != "auto")
    if tokenizer.get_vocab() != bench.tokenizer.get_vocab():
        raise ModelError(
            f"gold: {config.gold} splits text into other tokens than {config.model.path}. Give a model that "
            "was trained from the same one."
        )
    if config.gold == "auto":
        _learn(model, bench.trees.retain, bench.packing, config, replace(job, folder=job.folder / "gold"))
    return bench.know(job, model)
