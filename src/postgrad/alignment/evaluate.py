"""Evaluate: compare policies on prompts no stage has trained on, each number with its interval.

Changes no model. Every policy answers every prompt several times; a judge independent of the reward model gives each
response a gold score and compares it, in both orders, with the first policy's response of the same number. With a
reward model, best-of-n curves say what picking by it is worth, against the oracle that picks by gold:

    E[gold of the best of n] = sum_{i=n}^{N} C(i-1, n-1) / C(N, n) gold_(i),   responses sorted by the proxy

Source:    the best-of-n protocol and the upper-bound study of Xwin-LM (arXiv 2405.20335); KL(best of n) <=
           log n - (n - 1) / n, Beirami et al. (arXiv 2401.01879).
Differs:   the paper judges with AlpacaEval and MT-bench; any rule, reward model or endpoint can judge here. Policies
           share the noise of their samples, so that differences are paired. A judge that only compares has no gold
           scores: P(better than the first policy's response) takes their place.

    postgrad evaluate --policies sft=runs/sft/model dpo=runs/dpo/model --data.path held_out.jsonl --reward runs/rm/model

data.held_out 1, the default, takes all prompts; a smaller share takes those that training with this seed sets aside.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from postgrad.alignment.builtin import with_data
from postgrad.alignment.curves import (
    Judged,
    is_absolute,
    judge_responses,
    own_opponents,
)
from postgrad.alignment.evaluate_report import read_policy, summarise
from postgrad.alignment.judge import Judge, JudgeConfig, check_judge, make_judge
from postgrad.alignment.responses import Answers, Draw, claim, load_policy, read_answers, sample_store
from postgrad.alignment.sample import check_draw
from postgrad.alignment.scoring import load_scorer, score_responses
from postgrad.alignment.wiring import Plan
from postgrad.core.config import DataConfig, ModelConfig, RuntimeConfig
from postgrad.core.data import Prompt, hold_out, load_prompts
from postgrad.core.distributed import first_rank
from postgrad.core.report import Report
from postgrad.core.runtime import Job, finish, finished, progress, start, stop_on_signals, stop_requested
from postgrad.core.store import has_shard, seal, store_hash, write_shard
from postgrad.errors import ConfigError, DataError, Interrupted

LOSS = None
JUDGED = pa.schema([("prompt_id", pa.string()), ("k", pa.int32()), ("gold", pa.float64()), ("win", pa.float64())])


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Policies side by side on held-out prompts."""

    policies: tuple[str, ...] = ("tiny=tiny",)
    """Name and model of each policy, "name=path"; the others are compared with the first."""
    samples: int = 16
    """Responses a prompt."""
    temperature: float = 1.0
    """Divides the logits; best-of-n curves describe the policy itself only at 1."""
    top_p: float = 1.0
    """Draw from the fewest tokens that hold this probability; 1 = all."""
    max_new_tokens: int = 256
    """Longest response, in tokens."""
    judged: int = 0
    """Judge the first responses of each prompt only, where judging costs money; 0 = all."""
    reward: str = ""
    """Reward model whose picks the best-of-n curves follow; "" = the oracle's curve only."""
    chunk: int = 32
    """Prompts answered and judged together and written as one shard."""
    show: int = 8
    """Prompts whose responses stand side by side in the report."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig(held_out=1.0)
    runtime: RuntimeConfig = RuntimeConfig()


def check(config: EvaluateConfig) -> None:
    """Refuse settings that contradict each other."""
    named_policies(config)
    check_draw(Draw(config.samples, config.max_new_tokens, config.temperature, config.top_p))
    check_judge(config.judge)
    if config.chunk < 1 or config.judged < 0 or config.show < 0:
        raise ConfigError(
            f"Expected chunk >= 1, judged >= 0 and show >= 0, found {config.chunk}, {config.judged}, {config.show}."
        )
    if not 0 < config.data.held_out <= 1:
        raise ConfigError(f"data.held_out: expected a share above 0 up to 1, found {config.data.held_out}.")


def named_policies(config: EvaluateConfig) -> dict[str, str]:
    """Read "name=path" of every policy.

    Raises: ConfigError: none, not of that form, or a name that is no file name or stands twice.
    """
    pairs = [text.partition("=") for text in config.policies]
    for (name, _, path), text in zip(pairs, config.policies, strict=True):
        if not (name and path and all(letter.isalnum() or letter in "-_." for letter in name)) or name[0] == ".":
            raise ConfigError(
                f"policies: expected name=path, with letters, digits, - and _ in the name, found {text!r}."
            )
    named = {name: path for name, _, path in pairs}
    if not named or len(named) < len(pairs):
        raise ConfigError(f"policies: expected one or more different names, found {list(config.policies)}.")
    return named


def plan(config: EvaluateConfig) -> Plan:
    """Say what a run would do: prompts, responses, comparisons."""
    check(config)
    with TemporaryDirectory() as folder:
        num = len(_prompts(config, Path(folder)))
    drawn = num * config.samples * len(config.policies)
    compared = num * min(config.samples, config.judged or config.samples) * len(config.policies)
    return {
        "prompts": num,
        "policies": len(config.policies),
        "responses": drawn,
        "tokens drawn, at most": drawn * config.max_new_tokens,
        "comparisons, both orders counted": 2 * compared,
        "judge": config.judge.kind,
    }


def run(config: EvaluateConfig) -> Report:
    """Sample, score and judge every policy, one after another, and report on all."""
    job = start(config, check, "evaluate")
    if report := finished(job):
        return report
    prompts = _prompts(config, job.folder)
    named = named_policies(config)
    draw = Draw(config.samples, config.max_new_tokens, config.temperature, config.top_p)
    folders = {name: job.folder / "policies" / name for name in named}
    for name, path in named.items():
        policy = load_policy(replace(config.model, path=path), job, config.data.max_length)
        sample_store(folders[name] / "responses", policy, prompts, draw, job, chunk=config.chunk)
        del policy
    scorer = load_scorer(replace(config.model, path=config.reward), job, config.data) if config.reward else None
    for folder in folders.values():
        if scorer is not None:
            score_responses(folder, scorer)
    judge = make_judge(config.judge, job, config.data)
    first = next(iter(folders.values()))
    for folder in folders.values():
        first_rank(partial(judge_store, folder, first, judge, config, job))
    seen = [read_policy(folder, config.judged or config.samples) for folder in folders.values()]
    return finish(job, Report("evaluate", job.folder, *summarise(seen, config.show, job.seed)))


def _prompts(config: EvaluateConfig, folder: Path) -> list[Prompt]:
    items = load_prompts(with_data(config.data, "held_out", folder, config.runtime.seed)).items
    return items if config.data.held_out == 1 else hold_out(items, config.data.held_out, config.runtime.seed)[1]


def judge_store(folder: Path, first: Path, judge: Judge, config: EvaluateConfig, job: Job) -> None:
    """Judge `folder`/responses against the first policy's, into `folder`/judged; continue where it stopped.

    The first policy's own responses are compared with one another.
    """
    store, most = folder / "judged", config.judged or config.samples
    against = {each.id: each.texts[:most] for each in read_answers(first / "responses")}
    answers = [each for each in read_answers(folder / "responses") if each.id in against]
    if not answers:
        raise DataError(f"{folder}: no prompt was answered by this policy and the first one too.")
    parents = {"responses": store_hash(folder / "responses"), "first": store_hash(first / "responses")}
    settings = {"judge": judge.name, "version": judge.version, "judged": most, "chunk": config.chunk}
    claim(store, {**settings, **parents})
    shards = [answers[at : at + config.chunk] for at in range(0, len(answers), config.chunk)]
    with stop_on_signals(), progress(job, len(answers), f"prompts judged ({folder.name})") as bar:
        for index, shard in enumerate(shards):
            if not has_shard(store, index):
                own = [each.texts[:most] for each in shard]
                others = own_opponents(own) if folder == first else [against[each.id] for each in shard]
                prompts = [each.messages for each in shard]
                found = judge_responses(judge, prompts, own, others, absolute=is_absolute(config.judge))
                write_shard(store, index, _rows(shard, found), JUDGED)
            bar.advance(len(shard))
            if stop_requested():
                raise Interrupted("Stopped; the verdicts so far are stored.")
    seal(store, stage="judged", settings=settings, parents=parents, counts={"prompts": len(answers)})


def _rows(answers: Sequence[Answers], found: Judged) -> list[dict[str, object]]:
    return [
        {"prompt_id": each.id, "k": k, "gold": gold[k], "win": wins[k]}
        for each, gold, wins in zip(answers, found.gold, found.wins, strict=True)
        for k in range(len(gold))
    ]
