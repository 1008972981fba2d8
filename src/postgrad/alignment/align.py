"""Align: the whole pipeline, from a pretrained model to an aligned one, in one command.

    SFT -> its own answers -> judge -> reward model -> 64 scored answers a prompt -> rejection sampling -> DPO -> table

Source:    the six components of Xwin-LM (arXiv 2405.20335): SFT, Xwin-Pair, RM, Xwin-Set, RS, DPO.
Differs:   a copy trained on random picks at the same budget stands beside rejection sampling, so that what the reward
           model adds can be told from what more training adds. Rejection sampling and DPO start only if the reward
           model beats the rule "the longer answer is better" on held-out pairs.

    postgrad align                                          # built-in tasks, a tiny model from scratch
    postgrad align --model.path my-model --conversations sft.jsonl --prompts prompts.jsonl --preferences pairs.jsonl

Every stage is a method of its own with a run folder below this one; a stopped run goes on in the stage and row where
it stopped.
"""

import importlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from postgrad.alignment.annotate import AnnotateConfig
from postgrad.alignment.dpo import DPOConfig
from postgrad.alignment.evaluate import EvaluateConfig
from postgrad.alignment.judge import JudgeConfig
from postgrad.alignment.rejection import RejectionConfig
from postgrad.alignment.reward import RewardConfig
from postgrad.alignment.sample import SampleConfig
from postgrad.alignment.sft import SFTConfig
from postgrad.alignment.tasks import SCHEMA, TaskSizes, write_tasks
from postgrad.alignment.wiring import Plan
from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from postgrad.core.data import load_prompts
from postgrad.core.distributed import first_rank
from postgrad.core.files import atomic_path
from postgrad.core.items import Prompt
from postgrad.core.report import Cell, Note, Report, Section, Table, log_metrics, read_metrics
from postgrad.core.runtime import Job, finish, finished, stage_seed, start
from postgrad.errors import ConfigError, GateError

LOSS = None
STAGES = ("sft", "candidates", "annotate", "reward", "sample", "rejection", "control", "dpo", "evaluate")
SHORT = DataConfig(max_length=128)
"""The built-in tasks are short; a shorter context keeps caches small."""
TIMES = "stages.jsonl"


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """From a pretrained model to an aligned one; empty paths mean the built-in tasks."""

    conversations: str = ""
    """Conversations for supervised finetuning: a file, a folder or a hub data set."""
    prompts: str = ""
    """Prompts, split by hash: candidates for the judge, the response set, held-out ones for the table."""
    preferences: str = ""
    """Preference pairs for the reward model; "" = the judge compares the policy's own answers."""
    shares: tuple[float, float] = (0.5, 0.15)
    """Shares of the prompts that become candidates and held-out prompts; the rest become the response set."""
    sizes: TaskSizes = TaskSizes()
    """Built-in tasks: rows of each part."""
    control: bool = True
    """Also train on random picks at the same budget, beside rejection sampling."""
    dpo_from: Literal["rejection", "sft"] = "rejection"
    """The policy that DPO starts from."""
    gate: Literal["refuse", "warn"] = "refuse"
    """What happens when the reward model does not beat the length rule."""
    model: ModelConfig = ModelConfig(tiny_width=48)
    """The pretrained model; every stage goes on from the one before."""
    sft: SFTConfig = SFTConfig(
        data=SHORT, train=TrainConfig(epochs=3.5, batch_size=32, save_every=200, optim=OptimConfig(lr=5e-3))
    )
    """Supervised finetuning."""
    candidates: SampleConfig = SampleConfig(n=4, max_new_tokens=24, chunk=128, data=SHORT)
    """The policy's answers that the judge compares."""
    annotate: AnnotateConfig = AnnotateConfig(pairing="all", shard=500, judge=JudgeConfig(noise=0.1))
    """The judge and what becomes of ties."""
    reward: RewardConfig = RewardConfig(
        data=SHORT, train=TrainConfig(max_steps=800, batch_size=32, save_every=200, optim=OptimConfig(lr=1e-3))
    )
    """The reward model."""
    sample: SampleConfig = SampleConfig(n=64, max_new_tokens=24, chunk=16, data=SHORT)
    """The set of scored responses."""
    rejection: RejectionConfig = RejectionConfig(
        n=16, data=SHORT, train=TrainConfig(epochs=3, batch_size=32, optim=OptimConfig(lr=1e-3))
    )
    """Finetuning on the best responses."""
    dpo: DPOConfig = DPOConfig(
        beta=0.5, data=SHORT, train=TrainConfig(epochs=2, batch_size=32, optim=OptimConfig(lr=5e-4, warmup=0.1))
    )
    """Preference optimisation on the set."""
    evaluate: EvaluateConfig = EvaluateConfig(
        max_new_tokens=24, chunk=64, data=DataConfig(max_length=128, held_out=1.0)
    )
    """The table on held-out prompts."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Where and how the run happens."""


@dataclass(frozen=True)
class Stage:
    """One stage: the method that does it and its settings."""

    name: str
    method: str
    config: Any


def check(config: AlignConfig) -> None:
    """Refuse settings that contradict each other, in any stage."""
    given = {"conversations": config.conversations, "prompts": config.prompts}
    if len(set(map(bool, given.values()))) > 1 or (config.preferences and not config.prompts):
        empty = [name for name, path in given.items() if not path]
        raise ConfigError(f"Data of your own needs both conversations and prompts; {' and '.join(empty)} is empty.")
    if min(config.shares) <= 0 or sum(config.shares) >= 1:
        raise ConfigError(f"shares: expected two positive shares that leave some for the set, found {config.shares}.")
    for name in STAGES:
        if name == "control":
            continue
        stage = vars(config)[name]
        default = vars(AlignConfig())[name]
        if stage.runtime != default.runtime or vars(stage).get("model") != vars(default).get("model"):
            raise ConfigError(
                f"{name}.model and {name}.runtime are set by align for all stages: use --model, --runtime."
            )
        if stage.data.path:
            raise ConfigError(f"{name}.data.path is set by align: use --conversations, --prompts or --preferences.")
    if config.prompts and not config.preferences and config.annotate.judge.kind == "rule":
        raise ConfigError(
            "The rule judge knows the built-in tasks only: give --preferences, or --annotate.judge.kind endpoint with "
            "--annotate.judge.endpoint, or a reward model."
        )


def stages(config: AlignConfig, folder: Path) -> list[Stage]:
    """List the stages in order, each with the paths of what it reads; a function of the settings alone."""
    data = folder / "data"
    policy, rewarder = str(folder / "sft" / "model"), str(folder / "reward" / "model")
    pairs = config.preferences or str(folder / "annotate")
    first = str(folder / config.dpo_from / "model")
    policies = [name for name in ("sft", "control", "rejection", "dpo") if config.control or name != "control"]
    shown = tuple(f"{name}={folder / name / 'model'}" for name in policies)
    conversations = config.conversations or str(data / "sft.parquet")
    rejection = replace(config.rejection, runtime=RuntimeConfig())
    control = replace(rejection, pick="random", gate=False)
    evaluate = replace(config.evaluate, policies=shown, reward=rewarder)

    def at(name: str, method: str, stage: Any, path: str, model: str) -> Stage:
        threads = config.runtime.threads or int(config.model.path == "tiny")
        runtime = replace(config.runtime, folder=str(folder / name), threads=threads, overwrite=False)
        changed: dict[str, Any] = {"runtime": runtime, "data": replace(stage.data, path=path)}
        if model:
            changed["model"] = replace(config.model, path=model)
        return Stage(name, method, replace(stage, **changed))

    found = [at("sft", "sft", config.sft, conversations, config.model.path)]
    if not config.preferences:
        found.append(at("candidates", "sample", config.candidates, str(data / "candidates.parquet"), policy))
        found.append(at("annotate", "annotate", config.annotate, str(folder / "candidates"), ""))
    sample = replace(config.sample, reward=rewarder)
    found.append(at("reward", "reward", config.reward, pairs, policy))
    found.append(at("sample", "sample", sample, str(data / "set.parquet"), policy))
    found.append(at("rejection", "rejection", rejection, str(folder / "sample"), policy))
    if config.control:
        found.append(at("control", "rejection", control, str(folder / "sample"), policy))
    found.append(at("dpo", "dpo", config.dpo, str(folder / "sample"), first))
    found.append(at("evaluate", "evaluate", evaluate, str(data / "held_out.parquet"), policy))
    return found


def split_prompts(prompts: Sequence[Prompt], shares: tuple[float, float], seed: int) -> dict[str, list[Prompt]]:
    """Split prompts into candidates, held-out ones and the set, by a hash of each prompt."""
    parts: dict[str, list[Prompt]] = {"candidates": [], "held_out": [], "set": []}
    for prompt in prompts:
        place = stage_seed(seed, "split", prompt.id) / 2**63
        name = "candidates" if place < shares[0] else "held_out" if place < sum(shares) else "set"
        parts[name].append(prompt)
    return parts


def write_data(config: AlignConfig, folder: Path) -> None:
    """Write the data of all stages: the built-in tasks, or the user's prompts in three parts."""
    if not config.prompts:
        write_tasks(folder, config.runtime.seed, config.sizes)
        return
    loaded = load_prompts(DataConfig(path=config.prompts)).items
    for name, part in split_prompts(loaded, config.shares, config.runtime.seed).items():
        if not part:
            raise ConfigError(f"{config.prompts}: {len(loaded)} prompts are too few, none is left for {name}.")
        table = pa.table({"messages": [list(prompt.messages) for prompt in part]}, schema=SCHEMA)
        with atomic_path(folder / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary)


def plan(config: AlignConfig) -> Plan:
    """Say what a run would do: the stages, the plan of the first, and the counts that are known beforehand."""
    check(config)
    with TemporaryDirectory() as folder:
        write_data(config, Path(folder) / "data")
        known = stages(config, Path(folder))
        first = importlib.import_module(f"postgrad.alignment.{known[0].method}").plan(known[0].config)
        sizes = {path.stem: pq.read_metadata(path).num_rows for path in sorted((Path(folder) / "data").iterdir())}
    responses = sizes["set"] * config.sample.n
    return {
        "stages": ", ".join(stage.name for stage in known),
        **{f"sft: {key}": value for key, value in first.items()},
        **{f"{name} prompts": num for name, num in sizes.items() if name != "sft"},
        "responses in the set": responses,
        "tokens drawn for the set, at most": responses * config.sample.max_new_tokens,
    }


def reward_gate(results: dict[str, Cell], gate: str) -> Note:
    """Let the pipeline go on only with a reward model that knows more than length.

    Raises: GateError: held-out accuracy is not above the length rule's and ``gate`` is "refuse".
    """
    accuracy, rule = float(results.get("accuracy", "nan")), float(results.get("length_rule", "nan"))
    text = f"Held-out pairs: reward model {accuracy:.3f}, the rule that longer is better {rule:.3f}."
    if accuracy > max(rule, 1 - rule, 0.5):
        return Note("Reward model", text, "good")
    if gate == "warn":
        return Note("Reward model", f"{text} It knows no more than length: expect over-optimisation.", "warning")
    raise GateError(
        f"{text} Rejection sampling and DPO would follow a reward model that knows no more than length. Give it more "
        "pairs or a better judge, or go on all the same with --gate warn."
    )


def run(config: AlignConfig) -> Report:
    """Run the stages in order and put their policies side by side."""
    job = start(config, check, "align")
    if report := finished(job):
        return report
    first_rank(lambda: write_data(config, job.folder / "data"))
    notes: list[Section] = []
    reports: dict[str, Report] = {}
    for stage in stages(config, job.folder):
        module = importlib.import_module(f"postgrad.alignment.{stage.method}")
        began = time.monotonic()
        reports[stage.name] = module.run(stage.config)
        _note_time(job, stage.name, time.monotonic() - began)
        if stage.name == "reward":
            notes.append(reward_gate(dict(reports["reward"].results), config.gate))
    return finish(job, summarise(job, reports, notes))


def _note_time(job: Job, name: str, seconds: float) -> None:
    if job.rank == 0:
        log_metrics(job.folder, {"stage": name, "seconds": seconds}, name=TIMES)


def summarise(job: Job, reports: dict[str, Report], notes: list[Section]) -> Report:
    """Put the table of policies first, then what each stage cost and found."""
    evaluation = reports["evaluate"]
    seconds: dict[str, float] = {}
    for row in read_metrics(job.folder, TIMES):
        seconds[str(row["stage"])] = seconds.get(str(row["stage"]), 0.0) + float(str(row["seconds"]))
    total = sum(seconds.values()) or 1.0
    costs = [
        (name, round(spent, 1), f"{spent / total:.0%}", _findings(reports[name])) for name, spent in seconds.items()
    ]
    table = Table("What each stage cost and found", ("stage", "seconds", "share", "found"), tuple(costs))
    results = {key: value for key, value in evaluation.results.items() if re.search(r"_gold(_low|_high)?$", key)}
    return Report("align", job.folder, results, (*evaluation.sections, *notes, table))


def _findings(report: Report) -> str:
    """Write the first results of a stage in one line."""
    shown = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in list(report.results.items())[:4]]
    return ", ".join(shown)
