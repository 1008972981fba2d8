"""Sample: draw many responses to every prompt and score them, a set to select or to learn preferences from.

Source:    Xwin-Set of Xwin-LM (arXiv 2405.20335): 64 responses a prompt, drawn from the finetuned policy, each scored
           by the reward model.
Differs:   the paper's body was not available; temperature 1 without top_p is ours, because only then are the
           responses samples of the policy itself and best-of-n curves mean what they say. Responses keep their place:
           equal ones are counted (effective n), not removed. Prompts too long to answer are dropped and counted.

    postgrad sample --model.path runs/sft/model --data.path prompts.jsonl --reward runs/reward/model

All prompts of the data are answered; the stages that train set some of them aside. To score the responses of an
earlier run with another reward model, name that run in --responses.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
from transformers import AutoConfig

from postgrad.alignment.builtin import with_data
from postgrad.alignment.endpoint import EndpointConfig, check_endpoint
from postgrad.alignment.responses import (
    Answers,
    Draw,
    Policy,
    ServerPolicy,
    load_policy,
    read_answers,
    read_counts,
    sample_store,
)
from postgrad.alignment.scoring import load_scorer, score_responses
from postgrad.alignment.wiring import Plan, counts_table
from postgrad.core.config import DataConfig, ModelConfig, RuntimeConfig
from postgrad.core.data import load_prompts
from postgrad.core.distributed import first_rank
from postgrad.core.models import planned_parameters
from postgrad.core.report import TIMING, Note, Plot, Report, Section, Series, Table, read_metrics
from postgrad.core.runtime import Job, finish, finished, start
from postgrad.core.store import is_sealed, read_store
from postgrad.errors import ConfigError

LOSS = None
NUM_BINS = 30


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Many responses to every prompt, and their scores."""

    n: int = 64
    """Responses a prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 = the likeliest token always."""
    top_p: float = 1.0
    """Draw from the fewest tokens that hold this probability; 1 = all."""
    max_new_tokens: int = 256
    """Longest response, in tokens."""
    chunk: int = 8
    """Prompts answered together and written as one shard; chunk times n responses are in flight."""
    reward: str = ""
    """Reward model that scores the responses; "" = no scores."""
    responses: str = ""
    """Run folder of an earlier `sample` whose responses to score, instead of drawing new ones."""
    backend: Literal["transformers", "endpoint"] = "transformers"
    """Draw in this process, or from a server with an OpenAI-compatible interface (vLLM, SGLang, llama.cpp)."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """Backend "endpoint": the server."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    runtime: RuntimeConfig = RuntimeConfig()


def effective_n(responses: Sequence[str]) -> int:
    """Count distinct responses: how many of n say something of their own."""
    return len(set(responses))


def histogram(name: str, values: Sequence[float], num_bins: int = NUM_BINS) -> Series:
    """Count values in equal bins, as shares over the middles of the bins; whole numbers get bins of their own."""
    low, high = min(values), max(values)
    whole = all(float(value).is_integer() for value in values) and high - low < num_bins
    edges = np.arange(low - 0.5, high + 1.5) if whole else np.linspace(low, high + 1e-9, num_bins + 1)
    counts, _ = np.histogram(values, edges)
    middles = (edges[:-1] + edges[1:]) / 2
    return Series(name, tuple(middles.tolist()), tuple((counts / len(values)).tolist()))


def check(config: SampleConfig) -> None:
    """Refuse settings that contradict each other."""
    check_draw(draw_of(config))
    if config.chunk < 1:
        raise ConfigError(f"chunk: expected at least 1 prompt, found {config.chunk}.")
    if config.responses and not config.reward:
        raise ConfigError("responses names a run to score, but reward names no reward model; set it.")
    if config.responses and not is_sealed(Path(config.responses) / "responses"):
        raise ConfigError(
            f"responses: expected a finished run of `postgrad sample` in {config.responses}, found no sealed store "
            "`responses` there."
        )
    if config.backend == "endpoint" and not config.responses:
        check_endpoint(config.endpoint, "endpoint")


def check_draw(draw: Draw) -> None:
    """Refuse ways to draw that make no sense.

    Raises: ConfigError.
    """
    if draw.n < 1 or draw.max_new_tokens < 1:
        raise ConfigError(
            f"Expected at least 1 response of 1 token, found {draw.n} responses of {draw.max_new_tokens}."
        )
    if draw.temperature < 0 or not 0 < draw.top_p <= 1:
        raise ConfigError(
            "Expected temperature >= 0 and top_p above 0 up to 1, found temperature "
            f"{draw.temperature} and top_p {draw.top_p}."
        )
    if draw.temperature == 0 and draw.n > 1:
        raise ConfigError(f"At temperature 0 all {draw.n} responses to a prompt are equal; raise it or ask for 1.")


def draw_of(config: SampleConfig) -> Draw:
    """Say how responses are drawn."""
    return Draw(config.n, config.max_new_tokens, config.temperature, config.top_p)


def plan(config: SampleConfig) -> Plan:
    """Say what a run would do: prompts, responses, tokens, memory of the cache."""
    check(config)
    if config.responses:
        return dict(read_counts(Path(config.responses) / "responses"))
    with TemporaryDirectory() as folder:
        loaded = load_prompts(with_data(config.data, "set", Path(folder), config.runtime.seed))
    num = len(loaded.items)
    rows: Plan = {f"rows {reason}": number for reason, number in loaded.counts.items()}
    rows |= {"responses": num * config.n, "tokens drawn, at most": num * config.n * config.max_new_tokens}
    if config.backend == "endpoint":
        return rows | {"server": config.endpoint.base_url, "model": config.endpoint.model}
    return rows | {
        "parameters": planned_parameters(config.model)[0],
        "cache, at most (GiB)": round(cache_gib(config), 3),
    }


def cache_gib(config: SampleConfig) -> float:
    """Estimate the key-value cache of a chunk whose responses are all as long as they may be."""
    if config.model.path == "tiny":
        width = config.model.tiny_layers * config.model.tiny_width
    else:
        known = AutoConfig.from_pretrained(config.model.path).get_text_config()
        heads = known.num_key_value_heads / known.num_attention_heads
        width = known.num_hidden_layers * known.hidden_size * heads
    size = 2 if config.runtime.precision == "bf16" else 4
    return float(2 * width * size * config.chunk * config.n * config.data.max_length / 2**30)


def run(config: SampleConfig) -> Report:
    """Draw the responses, score them, and report how alike, how long and how good they are."""
    job = start(config, check, "sample")
    if report := finished(job):
        return report
    folder = job.folder / "responses"
    if config.responses:
        first_rank(lambda: _copy(Path(config.responses) / "responses", folder))
    elif not is_sealed(folder):
        prompts = load_prompts(with_data(config.data, "set", job.folder, job.seed)).items
        sample_store(folder, _policy(config, job), prompts, draw_of(config), job, chunk=config.chunk)
    if config.reward:
        score_responses(job.folder, load_scorer(replace(config.model, path=config.reward), job, config.data))
    return finish(job, summarise(job))


def _policy(config: SampleConfig, job: Job) -> Policy:
    if config.backend == "endpoint":
        return ServerPolicy(config.endpoint)
    return load_policy(config.model, job, config.data.max_length)


def _copy(source: Path, target: Path) -> None:
    """Copy a store whole or not at all."""
    if not is_sealed(target):
        work = target.with_name(".responses.copy")
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(source, work)
        read_store(work, ["k"])  # the hashes hold
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)


def summarise(job: Job) -> Report:
    """Report on the stores of a run folder."""
    answers = read_answers(job.folder / "responses")
    counts = read_counts(job.folder / "responses")
    rows = [row for each in answers for row in each.rows]
    distinct = [effective_n(each.texts) for each in answers]
    finish_reasons = Counter(row["finish_reason"] for row in rows)
    lengths = [row["n_tokens"] for row in rows]
    results: dict[str, str | int | float] = {
        "prompts": len(answers),
        "responses": len(rows),
        "effective_n": float(np.mean(distinct)),
        "tokens": sum(lengths),
        "mean_length": float(np.mean(lengths)),
        "cut_at_max_new_tokens": finish_reasons["length"] / len(rows),
    }
    sections: list[Section] = [
        counts_table(counts),
        Plot("Length", "tokens", "share of responses", (histogram("responses", lengths),)),
        Plot("Distinct responses of a prompt", "effective n", "share of prompts", (histogram("prompts", distinct),)),
    ]
    if is_sealed(job.folder / "scores"):
        results |= _add_scores(job.folder, answers, sections)
    return Report("sample", job.folder, results, (*sections, *_rate(job.folder)))


def _add_scores(folder: Path, answers: Sequence[Answers], sections: list[Section]) -> dict[str, float]:
    """Add the histogram of scores and the best and worst responses of a few prompts."""
    scores = {(row["prompt_id"], row["k"]): row["score"] for row in read_store(folder / "scores")}
    sets = [[scores[each.id, row["k"]] for row in each.rows] for each in answers]
    flat = [score for own in sets for score in own]
    best = [max(own) for own in sets]
    series = (histogram("all responses", flat), replace(histogram("best of each prompt", best), dashed=True))
    sections.append(counts_table(read_counts(folder / "scores")))
    sections.append(Plot("Scores", "score", "share", series))
    shown = []
    for each, own in list(zip(answers, sets, strict=True))[:6]:
        order = np.argsort(own, kind="stable")
        places = (("best", order[-1]), ("middle", order[len(order) // 2]), ("worst", order[0]))
        shown += [(each.messages[-1]["content"][:200], name, own[k], each.texts[k][:200]) for name, k in places]
    sections.append(Table("Responses", ("prompt", "", "score", "response"), tuple(shown)))
    return {"mean_score": float(np.mean(flat)), "mean_best_score": float(np.mean(best))}


def _rate(folder: Path) -> tuple[Section, ...]:
    """Say how fast responses were drawn; seconds differ from run to run, so they are no result."""
    rows = {row["step"]: row for row in read_metrics(folder, TIMING) if "tokens_per_second" in row}
    if not rows:
        return ()
    seconds = sum(float(str(row["seconds"])) for row in rows.values())
    tokens = sum(int(str(row["tokens"])) for row in rows.values())
    return (Note("Speed", f"{tokens / max(seconds, 1e-9):,.0f} tokens a second on the first rank."),)
