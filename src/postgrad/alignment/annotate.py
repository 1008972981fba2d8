"""Let a judge compare responses, in both orders, and write the preference pairs (Xwin-Pair).

Changes no model: it makes the pairs that a reward model or DPO learns from. The judge sees the whole
conversation and scores both answers; each pair is judged twice, with either answer first, so that a liking for a
position cancels and shows. Raw scores and replies are kept; label, p_a and margin follow from both verdicts:

    p_a = (P(a better | a first) + P(a better | b first)) / 2,   margin = mean score gap of both orders

A judge that looks at positions instead of answers is noticed after the first shard, before it costs more.

Source:  Xwin-LM (arXiv 2405.20335): Xwin-Pair is multi-turn and annotated by GPT-4.
Differs: prompt wording, scale and handling of near ties are not published; ours are stated here and versioned.
Run:     postgrad annotate --data.path runs/sample
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from postgrad.alignment.builtin import with_data
from postgrad.alignment.candidates import Candidates, Question, form_questions, load_candidates, source_hash
from postgrad.alignment.judge import (
    EndpointJudge,
    Judge,
    JudgeConfig,
    Opinion,
    Verdict,
    check_judge,
    combine,
    compare_both,
    make_judge,
)
from postgrad.alignment.judge_report import check_quality, quality_results, quality_sections
from postgrad.alignment.wiring import counts_table
from postgrad.core.config import DataConfig, RuntimeConfig
from postgrad.core.report import Report
from postgrad.core.runtime import (
    Job,
    finish,
    finished,
    progress,
    start,
    stop_on_signals,
    stop_requested,
)
from postgrad.core.store import has_shard, seal, shard_path, write_shard
from postgrad.errors import ArtefactError, ConfigError, DataError, Interrupted

LOSS = None

TiePolicy = Literal["drop", "half", "soft", "margin"]
Row = dict[str, Any]

_SCORES = pa.list_(pa.float64(), 2)
SCHEMA = pa.schema(
    [("id", pa.string()), ("prompt_id", pa.string()), ("prompt_messages", pa.string()), ("turn", pa.int64())]
    + [(name, pa.string()) for name in ("response_a", "response_b", "model_a", "model_b")]
    + [("score_ab", _SCORES), ("score_ba", _SCORES), ("raw_ab", pa.string()), ("raw_ba", pa.string())]
    + [("label", pa.string())]
    + [(name, pa.float64()) for name in ("p_a", "margin", "p_ab", "p_ba")]
    + [("judge", pa.string()), ("prompt_version", pa.string()), ("tokens_in", pa.int64())]
    + [("tokens_out", pa.int64()), ("cost", pa.float64()), ("latency", pa.float64()), ("reason", pa.string())]
)
"""Scores stand as (a, b) in both orders; p_ab, p_ba: P(a better) with a first, with b first; reason: why dropped."""


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """Which pairs are judged, by whom, and what becomes of ties."""

    pairing: Literal["random", "first", "all"] = "random"
    """Pairs of a prompt's distinct responses: drawn by the seed, the first two, or all."""
    pairs_per_prompt: int = 1
    """Most pairs a prompt that "random" draws."""
    tie: TiePolicy = "drop"
    """drop: drop ties and contradictions, keep p_a; half: ties at 0.5; soft: all, p_a; margin: by mean scores."""
    shard: int = 32
    """Prompts judged at a time; after each shard the result is saved and the judge's quality is checked."""
    min_consistency: float = 0.25
    """Stop when surely fewer pairs than this share get the same verdict in both orders; 0 = never."""
    max_unreadable: float = 0.5
    """Stop when surely more than this share of pairs has an unreadable verdict; 1 = never."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Who judges."""
    data: DataConfig = field(default_factory=DataConfig)
    """Responses: a run folder of `sample`, a file with response_a and response_b, or one with responses."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Where and how the run happens."""


class Settled(NamedTuple):
    """What becomes of a judged pair."""

    label: Literal["a", "b", "tie"]
    p_a: float
    margin: float
    """Mean score gap, positive for a."""
    reason: str
    """Why the pair is dropped; empty when it is kept."""


def settle(opinion: Opinion, tie: TiePolicy) -> Settled:
    """Apply the tie policy to the opinion of both orders.

    drop:   contradictions and ties go; the others keep the soft p_a (0.75 where one order sees a tie).
    half:   contradictions and ties stay with p_a 0.5; the others get 1 or 0.
    soft:   all stay with the soft p_a.
    margin: the sign of the mean score gap decides, p_a is 1 or 0; only a gap of exactly 0 goes.
    """
    label, p_a, margin = opinion.label, opinion.p_a, opinion.margin
    reason = ""
    if opinion.orders == "unreadable":
        reason = "unreadable"
    elif tie == "drop" and label == "tie":
        reason = "orders contradict" if opinion.orders == "contradict" else "both orders see a tie"
    elif tie == "half":
        p_a = {"a": 1.0, "b": 0.0, "tie": 0.5}[label]
    elif tie == "margin":
        reason = "no score gap" if margin == 0 else ""
        label = "a" if margin > 0 else "b" if margin < 0 else "tie"
        p_a = {"a": 1.0, "b": 0.0, "tie": 0.5}[label]
    return Settled(label, p_a, margin, reason)


def to_row(question: Question, ab: Verdict, ba: Verdict, judge: Judge, tie: TiePolicy) -> Row:
    """Write down a judged pair."""
    shown = question.comparison
    settled = settle(combine(ab, ba), tie)
    return {
        "id": question.id,
        "prompt_id": question.prompt_id,
        "prompt_messages": json.dumps(shown.prompt, ensure_ascii=False),
        "turn": sum(message["role"] == "user" for message in shown.prompt),
        "response_a": shown.first,
        "response_b": shown.second,
        "model_a": question.model_a,
        "model_b": question.model_b,
        "score_ab": list(ab.scores),
        "score_ba": list(ba.scores[::-1]),
        "raw_ab": ab.raw,
        "raw_ba": ba.raw,
        **settled._asdict(),
        "p_ab": ab.p_first,
        "p_ba": 1 - ba.p_first,
        "judge": judge.name,
        "prompt_version": judge.version,
        "tokens_in": ab.tokens_in + ba.tokens_in,
        "tokens_out": ab.tokens_out + ba.tokens_out,
        "cost": ab.cost + ba.cost,
        "latency": ab.latency_s + ba.latency_s,
    }


def check(config: AnnotateConfig) -> None:
    """Refuse settings that cannot work."""
    check_judge(config.judge)
    if config.judge.kind != "rule" and not config.data.path:
        raise ConfigError(
            f"data.path is empty, which means the built-in task, but judge.kind is '{config.judge.kind}': expected "
            "responses to compare, a run folder of postgrad sample or a file with response_a and response_b."
        )
    if config.pairs_per_prompt < 1 or config.shard < 1:
        raise ConfigError(
            f"pairs_per_prompt and shard must be at least 1, found {config.pairs_per_prompt} and {config.shard}."
        )
    for name in ("min_consistency", "max_unreadable"):
        if not 0 <= vars(config)[name] <= 1:
            raise ConfigError(f"{name}: expected a share from 0 to 1, found {vars(config)[name]}.")


def plan(config: AnnotateConfig) -> dict[str, str | int | float]:
    """Say how many comparisons a run makes and, for an endpoint, what they cost at most."""
    check(config)
    with TemporaryDirectory() as folder:
        loaded = load_candidates(with_data(config.data, "sets", Path(folder), config.runtime.seed))
    groups = _questions(config, loaded.items)
    shown = [each for group in groups for q in group for each in (q.comparison, q.comparison.swapped())]
    costs = EndpointJudge(config.judge).estimate(shown) if config.judge.kind == "endpoint" else {}
    counts = {f"rows {name}": count for name, count in loaded.counts.items()}
    return {**counts, "pairs": len(shown) // 2, "comparisons": len(shown), "judge": config.judge.kind, **costs}


def _questions(config: AnnotateConfig, items: Sequence[Candidates]) -> list[list[Question]]:
    return form_questions(items, config.pairing, config.pairs_per_prompt, config.runtime.seed)


def judge_shards(config: AnnotateConfig, groups: list[list[Question]], judge: Judge, job: Job) -> list[Row]:
    """Judge shard by shard, writing each; shards already there are read, their costs count against the budget.

    Raises:  GateError: the judge is worthless.   EndpointError, Interrupted: all shards so far are kept.
    """
    pairs, dropped = job.folder / "pairs", job.folder / "dropped"
    rows: list[Row] = []
    shards = [groups[i : i + config.shard] for i in range(0, len(groups), config.shard)]
    done = sum(len(shard) for index, shard in enumerate(shards) if has_shard(pairs, index))
    with progress(job, len(groups), "prompts judged", done) as bar:
        for index, shard in enumerate(shards):
            if has_shard(pairs, index):
                known = _read_shard(job.folder, index, shard)
                judge.ledger.cost += sum(row["cost"] for row in known)
                judge.ledger.tokens_in += sum(row["tokens_in"] for row in known)
                judge.ledger.tokens_out += sum(row["tokens_out"] for row in known)
                rows += known
                continue
            if stop_requested():
                raise Interrupted(f"{len(rows)} pairs are saved in {pairs}.")
            questions = [question for group in shard for question in group]
            verdicts = compare_both(judge, [question.comparison for question in questions])
            found = [
                to_row(question, ab, ba, judge, config.tie)
                for question, (ab, ba) in zip(questions, verdicts, strict=True)
            ]
            rows += found
            check_quality(rows, min_consistency=config.min_consistency, max_unreadable=config.max_unreadable)
            # A shard counts as done by its file of kept pairs, so that one is written last.
            write_shard(dropped, index, [row for row in found if row["reason"]], SCHEMA)
            write_shard(pairs, index, [row for row in found if not row["reason"]], SCHEMA)
            bar.advance(len(shard), f"{judge.ledger.cost:.4g} spent" if judge.ledger.cost else "")
    return rows


def _read_shard(folder: Path, index: int, shard: list[list[Question]]) -> list[Row]:
    """Read what an earlier process judged, kept and dropped rows, in the order of the questions."""
    paths = [shard_path(folder / name, index) for name in ("pairs", "dropped")]
    try:
        rows = {row["id"]: row for path in paths for row in pq.read_table(path).to_pylist()}
        return [rows[question.id] for group in shard for question in group]
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise ArtefactError(
            f"{paths[0]} and {paths[1]}: expected the pairs of this run's prompts, found other ones or damage "
            f"({error!r}). The data changed since, or the files did: set runtime.overwrite to judge anew."
        ) from error


def run(config: AnnotateConfig) -> Report:
    """Judge the pairs of all prompts and write the stores `pairs` and `dropped`."""
    job = start(config, check, "annotate")
    if report := finished(job):
        return report
    if job.world > 1:
        raise ConfigError(f"annotate runs in one process, found {job.world}; start it without torchrun.")
    data = with_data(config.data, "sets", job.folder, job.seed)
    loaded = load_candidates(data)
    groups = _questions(config, loaded.items)
    judge = make_judge(config.judge, job, config.data)
    with stop_on_signals():
        rows = judge_shards(config, groups, judge, job)
    if all(row["reason"] for row in rows):
        raise DataError(
            f"{data.path}: expected pairs to keep, but all {len(rows)} were dropped "
            f"({', '.join(sorted({row['reason'] for row in rows}))}). Use tie = 'soft', or another judge."
        )
    settings = {"tie": config.tie, "pairing": config.pairing, "judge": judge.name, "prompt": judge.version}
    parents = {"data": source_hash(data, loaded.items)}
    num_kept = sum(not row["reason"] for row in rows)
    for name, count in (("dropped", len(rows) - num_kept), ("pairs", num_kept)):
        counts = {**loaded.counts, "judged": len(rows), "pairs": count}
        seal(job.folder / name, stage="annotate", settings=settings, parents=parents, counts=counts)
    sections = (counts_table(loaded.counts), *quality_sections(rows, judge.ledger))
    return finish(job, Report("annotate", job.folder, quality_results(rows), sections))
