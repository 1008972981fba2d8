"""Judges: given a conversation and two answers, which is better, and by how much.

Three kinds: a rule (a scoring function, with noise if wanted), a reward model, and a language model behind an
endpoint. All answer the same question about two answers in the order shown; `compare_both` asks in both
orders and `combine` makes one opinion of the two verdicts, so that a liking for a position cancels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

import torch

from postgrad.alignment.endpoint import Endpoint, EndpointConfig, check_endpoint
from postgrad.alignment.exchange import Chat, Ledger, Reply
from postgrad.alignment.judge_prompts import (
    UNREADABLE,
    Mode,
    Scores,
    build_question,
    prompt_version,
    read_letters,
    read_scores,
    read_single,
)
from postgrad.alignment.tasks import score as task_score
from postgrad.core.batches import eval_batches, sequence_values
from postgrad.core.config import DataConfig, ModelConfig
from postgrad.core.items import Message
from postgrad.core.models import choose_layout, load_reward_model, model_hash, sequence_scores
from postgrad.core.precision import autocast
from postgrad.core.rows import Layout, Rows
from postgrad.core.runtime import Job, stage_seed, stop_requested
from postgrad.core.text import answer_trees
from postgrad.errors import ConfigError, DataError, EndpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Conversation = tuple[Message, ...]
ScoreFunction = Callable[[Conversation, str], float]

SCORED_TOKENS = 16384
"""Packed tokens a forward pass of a reward model that judges."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who compares two answers, and how the question is put."""

    kind: Literal["rule", "reward", "endpoint"] = "rule"
    """The built-in task's own check, a reward model, or a language model behind an endpoint."""
    mode: Literal["scores", "logprobs", "single"] = "scores"
    """Endpoint: both answers scored 1 to 10 at once, the probability of one letter, or each scored alone."""
    reward: str = ""
    """Reward judge: folder of the reward model."""
    noise: float = 0.0
    """Rule judge: share of verdicts that are turned round, each order on its own, keyed by the seed."""
    tie: float = 0.0
    """Score gap up to which two answers count as equal."""
    max_tokens: int = 400
    """Endpoint: longest reply, in tokens; logprobs asks for one token whatever this says."""
    temperature: float = 0.0
    """Endpoint: sampling temperature; below 0 = not sent, for models that refuse the setting."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """Endpoint: the server."""


@dataclass(frozen=True)
class Comparison:
    """A conversation that ends with the user, and two answers in the order shown."""

    prompt: Conversation
    first: str
    second: str

    def swapped(self) -> "Comparison":
        """Return the same comparison in the other order."""
        return Comparison(self.prompt, self.second, self.first)


@dataclass(frozen=True)
class Verdict:
    """What a judge said about the two answers, in the order shown."""

    scores: Scores
    """NaN twice when the reply could not be read."""
    p_first: float
    """Probability that the first shown is better; 0.5 = equal, NaN = unreadable."""
    raw: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    latency_s: float = 0.0


class Opinion(NamedTuple):
    """One opinion from the verdicts of both orders, about answers a and b."""

    label: Literal["a", "b", "tie"]
    """What both orders support; "tie" when they contradict each other or both see none better."""
    p_a: float
    """Mean probability that a is better."""
    margin: float
    """Mean score gap, positive for a."""
    orders: Literal["agree", "partly", "contradict", "unreadable"]
    """Same outcome, one sees a tie, opposite outcomes, or a reply that could not be read."""
    p_first: float
    """Mean probability that the answer shown first is better: 0.5 for a judge that ignores positions."""


@runtime_checkable
class Judge(Protocol):
    """Compares pairs of answers, each in the order shown."""

    @property
    def name(self) -> str:
        """Who judges, for the record."""
        ...

    @property
    def version(self) -> str:
        """Hash of the question's wording; empty for judges that read no wording."""
        ...

    @property
    def ledger(self) -> Ledger:
        """What judging has cost; all zero for local judges."""
        ...

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return one verdict a comparison, in order."""
        ...


def check_judge(config: JudgeConfig, key: str = "judge") -> None:
    """Refuse judge settings that contradict each other.

    Raises:  ConfigError.
    """
    if not 0 <= config.noise < 0.5:
        raise ConfigError(f"{key}.noise: expected 0 up to (not with) 0.5, found {config.noise}.")
    if config.tie < 0:
        raise ConfigError(f"{key}.tie: expected at least 0, found {config.tie}.")
    if config.noise and config.kind != "rule":
        raise ConfigError(f"{key}.noise is for the rule judge; {key}.kind is '{config.kind}'. Set it to 0.")
    if config.kind == "reward" and not config.reward:
        raise ConfigError(f"{key}.kind is 'reward' but {key}.reward names no reward model's folder.")
    if config.kind == "endpoint":
        check_endpoint(config.endpoint, f"{key}.endpoint")
        if config.max_tokens < 1:
            raise ConfigError(f"{key}.max_tokens: expected at least 1, found {config.max_tokens}.")


def make_judge(config: JudgeConfig, job: Job, data: DataConfig) -> Judge:
    """Build the judge that the config describes; `data` says how long texts are cut for a reward model."""
    if config.kind == "rule":
        return RuleJudge(task_score, noise=config.noise, tie=config.tie, seed=job.seed)
    if config.kind == "endpoint":
        return EndpointJudge(config, stop_requested)
    model_config = ModelConfig(path=config.reward)
    model, tokenizer = load_reward_model(model_config, job, frozen=True)
    layout = choose_layout(model_config, model, job)
    name = f"reward:{model_hash(model)}"
    return RewardModelJudge(model, tokenizer, job, data=data, layout=layout, tie=config.tie, name=name)


def compare_both(judge: Judge, comparisons: Sequence[Comparison]) -> list[tuple[Verdict, Verdict]]:
    """Judge every comparison as given and swapped."""
    verdicts = judge.compare([shown for each in comparisons for shown in (each, each.swapped())])
    return list(zip(verdicts[::2], verdicts[1::2], strict=True))


def combine(ab: Verdict, ba: Verdict) -> Opinion:
    """Make one opinion of the verdicts with a shown first and with b shown first.

    p_a = (p_first(ab) + 1 - p_first(ba)) / 2. The label is a where no order prefers b and one prefers a.
    """
    first = (ab.p_first + ba.p_first) / 2
    if math.isnan(first):
        return Opinion("tie", 0.5, 0.0, "unreadable", math.nan)
    margin = (ab.scores[0] - ab.scores[1] + ba.scores[1] - ba.scores[0]) / 2
    p_a = (ab.p_first + 1 - ba.p_first) / 2
    outcomes = {_sign(ab.p_first - 0.5), _sign(0.5 - ba.p_first)}
    if outcomes == {1, -1}:
        return Opinion("tie", p_a, margin, "contradict", first)
    label: Literal["a", "b", "tie"] = "a" if 1 in outcomes else "b" if -1 in outcomes else "tie"
    return Opinion(label, p_a, margin, "agree" if len(outcomes) == 1 else "partly", first)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def prefer(scores: Scores, tie: float) -> float:
    """Return 1 when the first score is higher by more than `tie`, 0 when the second is, else 0.5."""
    gap = scores[0] - scores[1]
    if math.isnan(gap):
        return math.nan
    return 0.5 if abs(gap) <= tie else float(gap > 0)


class RuleJudge:
    """Prefers the answer with the higher score of a function; right but for the noise asked for.

    Args:    noise: chance that a verdict is turned round. Each order draws on its own, so that noise shows as
             contradiction between orders, as it does with real judges.
    """

    def __init__(
        self, score: ScoreFunction, *, noise: float = 0.0, tie: float = 0.0, seed: int = 0, name: str = "rule"
    ) -> None:
        self.name, self.version, self.ledger = name, "", Ledger()
        self._score, self._noise, self._tie, self._seed = score, noise, tie, seed

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Score both answers of each comparison."""
        return [self._judge(each) for each in comparisons]

    def _judge(self, shown: Comparison) -> Verdict:
        scores = self._score(shown.prompt, shown.first), self._score(shown.prompt, shown.second)
        draw = stage_seed(self._seed, "judge noise", shown.prompt, repr(shown.first), repr(shown.second)) / 2**63
        if draw < self._noise:
            scores = scores[::-1]
        return Verdict(scores, prefer(scores, self._tie))


class RewardModelJudge:
    """Prefers by the reward model's scores: P(first better) = sigmoid(score gap), as in Bradley-Terry.

    All answers to one prompt are scored once, in rows that share the prompt.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        job: Job,
        *,
        data: DataConfig,
        layout: Layout,
        tie: float = 0.0,
        name: str = "reward",
    ) -> None:
        self.name, self.version, self.ledger = name, "", Ledger()
        self._model, self._tokenizer, self._job = model.eval(), tokenizer, job
        self._data, self._layout, self._tie = data, layout, tie

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Score every answer once; an answer that does not fit the model makes its comparisons unreadable."""
        answers: dict[str, tuple[Conversation, dict[str, float]]] = {}
        for each in comparisons:
            scores = answers.setdefault(repr(each.prompt), (each.prompt, {}))[1]
            scores |= dict.fromkeys((each.first, each.second), math.nan)
        self._fill(list(answers.values()))
        return [self._judge(each, answers[repr(each.prompt)][1]) for each in comparisons]

    def _judge(self, shown: Comparison, scores: dict[str, float]) -> Verdict:
        first, second = scores[shown.first], scores[shown.second]
        if math.isnan(first + second):
            return Verdict(UNREADABLE, math.nan, raw="does not fit data.max_length")
        equal = abs(first - second) <= self._tie
        return Verdict((first, second), 0.5 if equal else 1 / (1 + math.exp(min(second - first, 700.0))))

    @torch.no_grad()
    def _fill(self, answers: list[tuple[Conversation, dict[str, float]]]) -> None:
        """Replace the NaN of every answer that fits by its score."""
        texts = [(prompt, tuple(scores)) for prompt, scores in answers]
        try:
            trees, kept, _ = answer_trees(self._tokenizer, texts, self._data)
        except DataError:  # nothing of it fits
            return
        pad_id = self._tokenizer.pad_token_id or 0
        batches = eval_batches(
            trees,
            row_length=self._data.row_length,
            micro_tokens=SCORED_TOKENS,
            layout=self._layout,
            pad_id=pad_id,
            device=self._job.device,
        )
        moved: list[Rows] = [rows.to(self._job.device) for rows in batches]
        with autocast(self._job):
            values = sequence_values(trees, moved, partial(sequence_scores, self._model))
        for i, found in zip(kept, values, strict=True):
            answers[i][1].update(zip(texts[i][1], found, strict=True))


class EndpointJudge:
    """A language model behind an endpoint, asked in one of three ways (see `judge_prompts`)."""

    def __init__(self, config: JudgeConfig, stop: Callable[[], bool] = lambda: False) -> None:
        self.endpoint = Endpoint(config.endpoint, stop)
        self.name, self.version = f"{config.endpoint.model}:{config.mode}", prompt_version(config.mode)
        self.ledger = self.endpoint.ledger
        self._config = config
        self._mode: Mode = config.mode
        self._probed = False

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Ask about every comparison.

        Raises:  EndpointError: the server is down, the budget is spent, or it gives no log-probabilities that
                 the mode needs (found out with the first request).   Interrupted.
        """
        chats = [self.chats(each) for each in comparisons]
        flat = [chat for group in chats for chat in group]
        if flat and not self._probed:
            self._require_logprobs(self.endpoint.ask(flat[:1])[0])
            self._probed = True
        replies = iter(self.endpoint.ask(flat))
        paid: set[str] = set()
        return [self._judge([(chat, next(replies)) for chat in group], paid) for group in chats]

    def estimate(self, comparisons: Sequence[Comparison]) -> dict[str, str | int | float]:
        """Say what comparing would cost at most, without asking."""
        return self.endpoint.estimate([chat for each in comparisons for chat in self.chats(each)])

    def chats(self, shown: Comparison) -> list[Chat]:
        """Write the requests of one comparison: one, or one an answer where each is scored alone."""
        groups = [(shown.first, shown.second)] if self._mode != "single" else [(shown.first,), (shown.second,)]
        letters = self._mode == "logprobs"
        return [
            Chat(
                messages=build_question(self._mode, shown.prompt, group),
                max_tokens=1 if letters else self._config.max_tokens,
                temperature=self._config.temperature,
                top_logprobs=5 if letters else 0,
            )
            for group in groups
        ]

    def _require_logprobs(self, reply: Reply) -> None:
        if self._mode == "logprobs" and not reply.first_token and not reply.problem:
            raise EndpointError(
                f"{self.endpoint.url}: judge.mode 'logprobs' reads the log-probabilities of the first token, "
                f"but the server gave none with its reply {reply.text[:40]!r}. Use judge.mode 'scores', or a "
                "server that honours logprobs and top_logprobs."
            )

    def _judge(self, asked: list[tuple[Chat, Reply]], paid: set[str]) -> Verdict:
        """Read the replies of one comparison; a request that stands twice in a batch costs once."""
        new = [reply for chat, reply in asked if repr(chat) not in paid]
        paid.update(repr(chat) for chat, _ in asked)
        scores = self._read([reply for _, reply in asked])
        soft = self._mode == "logprobs" and abs(scores[0] - scores[1]) > self._config.tie
        tokens_in, tokens_out = sum(r.tokens_in for r in new), sum(r.tokens_out for r in new)
        return Verdict(
            scores=scores,
            p_first=scores[0] if soft else prefer(scores, self._config.tie),
            raw="\n\n".join(reply.problem or reply.text for _, reply in asked),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            cost=self.endpoint.cost(tokens_in, tokens_out),
            latency_s=sum(reply.latency_s for reply in new),
        )

    def _read(self, replies: list[Reply]) -> Scores:
        if self._mode == "scores":
            return read_scores(replies[0].text)
        if self._mode == "logprobs":
            return read_letters(replies[0].first_token)
        first, second = (read_single(reply.text) for reply in replies)
        return UNREADABLE if math.isnan(first + second) else (first, second)
