"""Rejection sampling: finetune the policy on the best of its own responses to every prompt.

Formula:   -log pi(y_r | x) averaged over tokens, where y_r is the response of rank r among n by the reward model.
Source:    Xwin-LM-RS of Xwin-LM (arXiv 2405.20335), which trains on the highest-scoring of 64 responses.
Differs:   the paper's body was not available: rank, count and n are options, to repeat its study of ranks; training
           settings are the field's common ones. A random pick of the same number of responses is the control: what
           it gains is self-distillation, not the reward model. A gate on held-out prompts caps n where the judge says
           that more responses make the pick worse, and refuses when the reward model's picks are no better than one.

    postgrad rejection --model.path runs/sft/model --data.path runs/sample
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from postgrad.alignment.builtin import with_data
from postgrad.alignment.curves import gate, is_absolute, judge_responses, own_opponents
from postgrad.alignment.judge import JudgeConfig, check_judge, make_judge
from postgrad.alignment.pairs import ranking
from postgrad.alignment.sft import SFTConfig, evaluation, load_trees, sft_loss, sft_step
from postgrad.alignment.wiring import Plan, check_training, counts_table, spread_values, training_plan
from postgrad.core.batches import eval_batches, tree_batches
from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from postgrad.core.data import ResponseSet, hold_out, load_sets
from postgrad.core.distributed import first_rank
from postgrad.core.loop import train
from postgrad.core.models import choose_layout, load_lm, save_model, sequence_logprobs, within_context
from postgrad.core.report import Note, Plot, Report, Section, Table
from postgrad.core.runtime import Job, finish, finished, stage_seed, start
from postgrad.core.store import content_hash, is_sealed, read_manifest, seal, write_shard
from postgrad.errors import ArtefactError, ConfigError, DataError

rejection_loss = sft_loss
"""The selected responses are learnt as conversations are."""

SELECTED = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_messages", pa.string()),
        ("response", pa.string()),
        ("rank", pa.int32()),
        ("score", pa.float64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class RejectionConfig:
    """Scored responses to a policy that gives the best of them."""

    pick: Literal["rank", "random"] = "rank"
    """Pick by score, or at random from the same responses: the control."""
    rank: int = 1
    """Rank of the first response picked; 1 = the best."""
    count: int = 1
    """Different responses picked of every prompt, from `rank` on."""
    n: int = 0
    """Pick from the first n responses of every prompt; 0 = all."""
    gate: bool = False
    """Judge held-out prompts first: refuse when picks do not get better with n, cap n where they are best."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The gate's judge."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig(epochs=2.0, optim=OptimConfig(lr=1e-5))
    runtime: RuntimeConfig = RuntimeConfig()


def select(order: Int[np.ndarray, " N"], texts: Sequence[str], first: int, count: int) -> list[int]:
    """List `count` positions in the order given, from place `first` (0 = front) on; equal and empty texts once, never.

    Fewer where there are not so many; the last usable ones before `first` where nothing usable follows.
    """
    usable = [int(i) for i in [*order[first:], *order[:first][::-1]] if texts[i].strip()]
    different = list({texts[i]: i for i in reversed(usable)}.values())[::-1]
    return different[:count]


def pick_responses(item: ResponseSet, config: RejectionConfig, n: int, seed: int) -> list[dict[str, Any]]:
    """Pick from the first n responses of a prompt, as rows of the store; none if all are empty."""
    texts = item.responses[:n]
    scores: Float[np.ndarray, " N"] = np.array(item.scores[:n] or [0.0] * len(texts))
    by_score = ranking(scores)
    rank_of = {int(position): rank for rank, position in enumerate(by_score, start=1)}
    if config.pick == "rank":
        chosen = select(by_score, texts, min(config.rank, len(texts)) - 1, config.count)
    else:
        noise = np.random.Generator(np.random.Philox(stage_seed(seed, "random pick", item.id)))
        chosen = select(noise.permutation(len(texts)), texts, 0, config.count)
    prompt = json.dumps(list(item.prompt), ensure_ascii=False)
    same = {"prompt_id": item.id, "prompt_messages": prompt}
    return [same | {"response": texts[i], "rank": rank_of[i], "score": float(scores[i])} for i in chosen]


def check(config: RejectionConfig) -> None:
    """Refuse settings that contradict each other."""
    check_training(config.data, config.train)
    if config.rank < 1 or config.count < 1 or config.n < 0:
        raise ConfigError(
            f"Expected rank and count >= 1 and n >= 0, found rank {config.rank}, count {config.count}, n {config.n}."
        )
    if config.n and config.rank > config.n:
        raise ConfigError(f"rank {config.rank} is beyond n: only {config.n} responses are ranked. Lower rank.")
    if config.gate:
        check_judge(config.judge)
        if config.data.held_out <= 0:
            raise ConfigError("gate judges held-out prompts, but data.held_out is 0; set prompts aside.")


def plan(config: RejectionConfig) -> Plan:
    """Say what a run would do: prompts, responses picked, steps, parameters, memory."""
    check(config)
    with TemporaryDirectory() as folder:
        loaded = load_sets(with_data(config.data, "sets", Path(folder), config.runtime.seed))
    kept, held = hold_out(loaded.items, config.data.held_out, config.runtime.seed)
    judged = {"responses the gate judges": sum(map(_size(config), held))} if config.gate else {}
    return {**training_plan(len(kept) * config.count, loaded.counts, config.model, config.train), **judged}


def run(config: RejectionConfig) -> Report:
    """Pick responses, finetune on them, and report which were picked and the loss on held-out prompts' picks."""
    job = start(config, check, "rejection")
    if report := finished(job):
        return report
    sections = _select(config, job)
    data = replace(config.data, path=str(job.folder / "selected"), limit=0)
    model, tokenizer = load_lm(config.model, job)
    data = within_context(data, model)
    settings = SFTConfig(turns="last", model=config.model, data=data, train=config.train, runtime=config.runtime)
    layout, pad = choose_layout(config.model, model, job), tokenizer.pad_token_id
    trees, held, counts = load_trees(settings, tokenizer, job)
    batches = tree_batches(trees, config.train, job, data=data, layout=layout, pad_id=pad)
    held_batches = eval_batches(
        held, row_length=0, micro_tokens=config.train.micro_tokens, layout=layout, pad_id=pad, device=job.device
    )

    def evaluate(step: int) -> dict[str, float]:
        return evaluation(spread_values(held, held_batches, partial(sequence_logprobs, model), job), held)

    loss_fn = partial(sft_step, model, trees, False)
    report = train(model, batches, loss_fn, evaluate if held else None, config.train, job)
    first_rank(lambda: save_model(model, tokenizer, job.folder / "model"))
    return finish(job, replace(report, sections=(*sections, *report.sections, counts_table(counts))))


def _select(config: RejectionConfig, job: Job) -> tuple[Section, ...]:
    """Write the store of picked responses; give what to show of it and of the gate."""
    loaded = load_sets(with_data(config.data, "sets", job.folder, job.seed))
    sets = loaded.items
    if config.pick == "rank" and not all(item.scores for item in sets):
        raise DataError(
            f"{config.data.path}: expected a score for each response, found none. Give `postgrad sample` a reward "
            "model (--reward), or set pick to random."
        )
    n = max(map(_size(config), sets))
    shown: tuple[Section, ...] = ()
    if config.gate and config.pick == "rank":
        n, shown = first_rank(lambda: _gate(config, sets, n, job))
    if config.rank > n:
        raise ConfigError(f"rank {config.rank} is asked for, but at most {n} responses are ranked. Lower rank.")
    rows = [row for item in sets for row in pick_responses(item, config, n, job.seed)]
    first_rank(lambda: _write(job.folder / "selected", rows, sets, n, config))
    return (*shown, _summary(sets, rows, n))


def _summary(sets: Sequence[ResponseSet], rows: Sequence[dict[str, Any]], n: int) -> Table:
    offered = [text for item in sets for text in item.responses[:n]]
    scores = [score for item in sets for score in item.scores[:n]]
    columns = ("", "responses", "mean score", "mean length (characters)")
    lines = (
        ("offered", len(offered), _mean(scores), _mean([len(text) for text in offered])),
        ("picked", len(rows), _mean([r["score"] for r in rows]), _mean([len(r["response"]) for r in rows])),
    )
    return Table("Picked responses", columns, lines, f"From the first {n} responses of each prompt.")


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _size(config: RejectionConfig) -> Callable[[ResponseSet], int]:
    return lambda item: len(item.responses[: config.n or None])


def _gate(
    config: RejectionConfig, sets: Sequence[ResponseSet], n: int, job: Job
) -> tuple[int, tuple[Plot | Table | Note, ...]]:
    """Judge the responses to held-out prompts."""
    _, held = hold_out(sets, config.data.held_out, job.seed)
    responses = [item.responses[:n] for item in held]
    found = judge_responses(
        make_judge(config.judge, job, config.data),
        [item.prompt for item in held],
        responses,
        own_opponents(responses),
        absolute=is_absolute(config.judge),
    )
    return gate([list(item.scores[:n]) for item in held], found.gold, n, job.seed)


def _write(
    folder: Path, rows: Sequence[dict[str, Any]], sets: Sequence[ResponseSet], n: int, config: RejectionConfig
) -> None:
    parent = content_hash([[item.id, list(item.responses), list(item.scores)] for item in sets])
    settings = {"pick": config.pick, "rank": config.rank, "count": config.count, "n": n}
    if is_sealed(folder):
        expected = {"sets": parent}
        if read_manifest(folder)["parents"] != expected:
            raise ArtefactError(f"{config.data.path} has changed since this run began. Use another runtime.folder.")
        return
    write_shard(folder, 0, rows, SELECTED)
    seal(folder, stage="rejection", settings=settings, parents={"sets": parent}, counts={"picked": len(rows)})
