"""From preference pairs or scored sets to the answers each prompt is trained on, chosen first.

Letters: K answers of a prompt.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from postgrad.alignment.builtin import with_data
from postgrad.alignment.pairs import (
    Candidates,
    Pick,
    Strategy,
    distinct,
    parse_strategy,
    pick_pair,
    pick_ranking,
)
from postgrad.core.config import DataConfig
from postgrad.core.data import hold_out, load_pairs, load_sets, load_table
from postgrad.core.items import Message, Pair, ResponseSet
from postgrad.core.runtime import stage_seed
from postgrad.core.store import is_sealed, read_store, seal, store_hash, write_shard
from postgrad.errors import ConfigError, DataError

PAIR_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("k_chosen", pa.int32()),
        ("k_rejected", pa.int32()),
        ("strategy", pa.string()),
        ("score_gap", pa.float64()),
        ("prompt_messages", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
    ]
)
MeanLogprobs = Mapping[tuple[str, int], float]
"""(prompt id, number of the response) -> mean log-probability of a token under the policy that wrote it."""


@dataclass(frozen=True)
class Choice:
    """A prompt and the answers to compare: the chosen one, then the rejected ones, best first."""

    id: str
    prompt: tuple[Message, ...]
    answers: tuple[str, ...]
    p: float = 1.0
    """Probability that the chosen answer is the better one."""
    places: tuple[int, ...] = ()
    """Numbers of the answers in their set; none for pairs."""
    scores: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PickSettings:
    """Which answers of a set are compared."""

    chosen: int = 1
    """Rank of the chosen answer, from the best."""
    rejected: str = "mu-2sigma"
    """Strategy for the rejected one, see `pairs`."""
    num_rejected: int = 1
    """More than one: the rejected answers are spread evenly over the ranking."""
    seed: int = 0


@dataclass(frozen=True)
class Selected:
    """Choices to train on, those set aside, and what became of the rows."""

    train: list[Choice]
    held: list[Choice]
    counts: dict[str, int]


def select(data: DataConfig, settings: PickSettings, folder: Path) -> Selected:
    """Load a set or pairs, whichever data.path holds, set prompts aside and choose answers.

    Args: folder: where built-in data is written when data.path is empty.
    Raises: DataError: no prompt has answers to compare; the counts say why.
    """
    data = with_data(data, "sets", folder, settings.seed)
    if not holds_sets(data):
        return _from_pairs(data, settings)
    loaded = load_sets(data)
    strategy = parse_strategy(settings.rejected)
    logprobs = _mean_logprobs(data) if strategy.needs_logprobs and settings.num_rejected == 1 else None
    dropped: Counter[str] = Counter()
    both: list[list[Choice]] = []
    for part in hold_out(loaded.items, data.held_out, settings.seed):
        found = [choose(item, settings, strategy, logprobs) for item in part]
        dropped.update(f"dropped: {reason}" for reason in found if isinstance(reason, str))
        both.append([choice for choice in found if isinstance(choice, Choice)])
    counts = {**loaded.counts, **dropped, "prompts with a choice": len(both[0]) + len(both[1])}
    if not both[0]:
        raise DataError(f"{data.path}: no prompt to train on has answers to compare: {counts}.")
    return Selected(both[0], both[1], counts)


def holds_sets(data: DataConfig) -> bool:
    """Say whether the path holds sets of responses rather than pairs."""
    for store, answer in (("responses", True), ("pairs", False)):
        if is_sealed(Path(data.path) / store):
            return answer
    columns = load_table(data.path, data.split, 1)[0].keys()
    return not columns & {"chosen", "response_a"}


def _from_pairs(data: DataConfig, settings: PickSettings) -> Selected:
    if settings.num_rejected > 1:
        raise ConfigError(
            f"num_rejected {settings.num_rejected} needs scored sets; {data.path} holds pairs. Set it to 1."
        )
    loaded = load_pairs(data)
    both = [list(map(_pair_choice, part)) for part in hold_out(loaded.items, data.held_out, settings.seed)]
    return Selected(both[0], both[1], loaded.counts)


def _pair_choice(pair: Pair) -> Choice:
    return Choice(id=pair.id, prompt=pair.prompt, answers=(pair.chosen, pair.rejected), p=pair.p)


def choose(
    item: ResponseSet, settings: PickSettings, strategy: Strategy, logprobs: MeanLogprobs | None
) -> Choice | str:
    """Choose the answers of one set, or say why there are none; equal texts count once."""
    if len(item.scores) != len(item.responses):
        raise DataError(
            f"Prompt {item.id} has {len(item.responses)} responses and {len(item.scores)} scores; choosing "
            "needs a score for each. Score the set first (postgrad sample --reward)."
        )
    keep = distinct(item.responses)
    candidates = Candidates(
        scores=np.array([item.scores[k] for k in keep], dtype=np.float64),
        lengths=np.array([len(item.responses[k]) for k in keep]),
        logprobs=None if logprobs is None else np.array([logprobs[item.id, k] for k in keep]),
    )
    pick = _pick(candidates, item.id, settings, strategy)
    if pick.dropped:
        return pick.dropped
    places = tuple(keep[i] for i in (pick.chosen, *pick.rejected))
    return Choice(
        id=item.id,
        prompt=item.prompt,
        answers=tuple(item.responses[k] for k in places),
        places=places,
        scores=tuple(item.scores[k] for k in places),
    )


def _pick(candidates: Candidates, name: str, settings: PickSettings, strategy: Strategy) -> Pick:
    if settings.num_rejected > 1:
        return pick_ranking(candidates, num=settings.num_rejected + 1)
    generator = np.random.default_rng(stage_seed(settings.seed, "pairs", name))
    return pick_pair(candidates, rank=settings.chosen, strategy=strategy, generator=generator)


def _mean_logprobs(data: DataConfig) -> MeanLogprobs:
    """Read how likely each response was to the policy that wrote it, from the store of `postgrad sample`."""
    path = Path(data.path)
    folder = path / "responses" if is_sealed(path / "responses") else path
    if not is_sealed(folder):
        raise ConfigError(
            f"The strategies near and likely need the run folder of `postgrad sample`, which has log-probabilities;"
            f" found {data.path}. Choose another strategy, for instance mu-2sigma."
        )
    rows = read_store(folder, ["prompt_id", "k", "logprob_sum", "n_tokens"])
    return {(row["prompt_id"], row["k"]): row["logprob_sum"] / max(1, row["n_tokens"]) for row in rows}


def write_pairs(folder: Path, choices: Sequence[Choice], settings: PickSettings, path: str) -> None:
    """Write which answers of the sets were compared: a row for each rejected answer. Pairs are not repeated."""
    if is_sealed(folder) or not any(choice.places for choice in choices):
        return
    strategy = settings.rejected if settings.num_rejected == 1 else "spread"
    rows = [
        {
            "prompt_id": choice.id,
            "k_chosen": choice.places[0],
            "k_rejected": choice.places[i],
            "strategy": strategy,
            "score_gap": choice.scores[0] - choice.scores[i],
            "prompt_messages": json.dumps(choice.prompt),
            "chosen": choice.answers[0],
            "rejected": choice.answers[i],
        }
        for choice in choices
        for i in range(1, len(choice.answers))
    ]
    write_shard(folder, 0, rows, PAIR_SCHEMA)
    source = Path(path) / "responses"
    parents = {"responses": store_hash(source)} if path and is_sealed(source) else {}
    chosen = {"chosen": settings.chosen, "strategy": strategy, "num_rejected": settings.num_rejected}
    seal(folder, stage="dpo pairs", settings=chosen, parents=parents, counts={"rows": len(rows)})
