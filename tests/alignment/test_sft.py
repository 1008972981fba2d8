"""Supervised finetuning: the loss by hand, what is learnt from, and a short run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from postgrad.alignment.sft import SFTConfig, check, evaluation, last_turn, load_trees, plan, run, sft_loss, sft_step
from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from postgrad.core.items import Example
from postgrad.core.models import load_lm
from postgrad.core.rows import Rows, Tree, pack
from postgrad.core.runtime import Job
from postgrad.core.text import byte_tokenizer, conversation_trees
from postgrad.errors import ConfigError, DataError

TINY = ModelConfig(tiny_width=32)


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    """One exchange."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(folder: Path, rows: list[dict[str, object]]) -> str:
    """Write rows as a .jsonl file."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave report.html out: drawing it takes longer than these runs."""
    monkeypatch.setattr("postgrad.core.runtime.write_report", lambda report, title: None)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job without a run folder of its own."""
    return Job("sft", tmp_path, 0, torch.device("cpu"), torch.float32, 0, 1, True)


def config(folder: Path, path: str, **more: object) -> SFTConfig:
    """A run of 20 steps in a second or two."""
    train = TrainConfig(max_steps=20, batch_size=8, log_every=5, optim=OptimConfig(lr=1e-2))
    return replace(
        SFTConfig(
            model=TINY,
            data=DataConfig(path=path, row_length=0, held_out=0.2),
            train=train,
            runtime=RuntimeConfig(folder=str(folder), quiet=True),
        ),
        **more,
    )


def test_loss_by_hand() -> None:
    """Conversation 0 (weight 1): -1, -2; conversation 1 (weight 0.5): -4. Sum 3 + 2 = 5, weight 2 + 0.5."""
    total, weight = sft_loss(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 1]), torch.tensor([1.0, 0.5]))
    assert (total.item(), weight.item()) == (5.0, 2.5)


@pytest.mark.parametrize(
    ("marks", "kept"),
    [("0110011", "0000011"), ("01100", "01100"), ("000", "000"), ("", ""), ("1", "1")],
)
def test_last_turn(marks: str, kept: str) -> None:
    """The last unbroken run of marks stays."""
    assert last_turn([mark == "1" for mark in marks]) == tuple(mark == "1" for mark in kept)


def gradient(model: torch.nn.Module, trees: list[Tree], index: list[list[int]], weighted: bool) -> Tensor:
    """Add up a step's micro-batches as the loop does, and give the gradient of the embedding."""
    model.zero_grad()
    weight = 0.0
    for part in index:
        rows: Rows = pack(trees, part, row_length=64, layout="tree", pad_id=256)
        loss = sft_step(model, trees, weighted, rows, 0)
        loss.sum.backward()
        weight += loss.weight
    grad = model.get_input_embeddings().weight.grad
    return grad / weight


def test_splits_and_weights(job: Job) -> None:
    """No split of a step changes its gradient; weight 0 is absence, equal weights are no weights."""
    model, tokenizer = load_lm(TINY, job)
    texts = [("a", "bcd"), ("what is it", "this"), ("hello", "a long answer to a short word")]
    examples = [Example(str(i), tuple(conversation(*text))) for i, text in enumerate(texts)]
    trees = conversation_trees(tokenizer, examples, DataConfig()).items
    whole = gradient(model, trees, [[0, 1, 2]], False)
    torch.testing.assert_close(gradient(model, trees, [[2], [0], [1]], False), whole)
    halved = [replace(tree, weight=0.5) for tree in trees]
    torch.testing.assert_close(gradient(model, halved, [[0, 1], [2]], True), whole)
    without = [trees[0], replace(trees[1], weight=0.0), trees[2]]
    torch.testing.assert_close(gradient(model, without, [[0, 1, 2]], True), gradient(model, trees, [[0, 2]], False))


def test_evaluation_by_hand() -> None:
    """4 nats over 2 tokens and 3 over 1: 7 / 3 a token; means 2 and 3 give 2.5."""
    trees = [Tree((1, 2, 3), supervised=(False, True, True)), Tree((1, 2), supervised=(True, True))]
    found = evaluation([[-4.0], [-3.0]], trees)
    assert found["loss"] == pytest.approx(7 / 3)
    assert found["perplexity"] == pytest.approx(math.exp(7 / 3))
    assert found["conversation_loss"] == 2.5


def test_run(tmp_path: Path) -> None:
    """The loss falls, a second call hands back what the first found, and the model can be loaded."""
    rows = [{"messages": conversation(f"say {i}", "ha ha ha")} for i in range(40)]
    settings = config(tmp_path / "run", write(tmp_path, rows))
    report = run(settings)
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in logged if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert report.results["loss"] < losses[0]
    assert {"perplexity", "conversation_loss_low"} <= report.results.keys()
    assert run(settings).results == report.results
    job = Job("sft", tmp_path, 0, torch.device("cpu"), torch.float32, 0, 1, True)
    load_lm(ModelConfig(path=str(tmp_path / "run/model")), job, frozen=True)


def test_the_last_turn_alone(tmp_path: Path) -> None:
    """A conversation of two exchanges trains on its last answer only."""
    messages = conversation("one", "first") + conversation("two", "second")
    settings = config(tmp_path, write(tmp_path, [{"messages": messages}]), turns="last")
    job = Job("sft", tmp_path, 0, torch.device("cpu"), torch.float32, 0, 1, True)
    trees, held, counts = load_trees(settings, byte_tokenizer(), job)
    assert len(trees) == 1 and not held
    learnt = [token for token, mark in zip(trees[0].prompt, trees[0].supervised, strict=True) if mark]
    assert byte_tokenizer().decode(learnt) == "second<|end|>"
    assert counts["read"] == 1


def test_plan_spends_nothing(tmp_path: Path) -> None:
    """Counts, steps and memory; no file is written."""
    rows = [{"messages": conversation(f"say {i}", "ha")} for i in range(10)] + [{"messages": conversation("x", "")}]
    found = plan(config(tmp_path / "run", write(tmp_path, rows)))
    assert found["rows read"] == 11 and found["rows dropped: empty response"] == 1
    assert found["optimizer steps"] == 20
    assert not (tmp_path / "run").exists()


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    """The message names the setting and what was found."""
    good = config(tmp_path, "x.jsonl")
    with pytest.raises(ConfigError, match="batch_size must be >= 1, got 0"):
        check(replace(good, train=TrainConfig(batch_size=0)))
    with pytest.raises(ConfigError, match="held_out is a share of the prompts, from 0 to below 1, got 1"):
        check(replace(good, data=DataConfig(held_out=1.0)))
    with pytest.raises(ConfigError, match="epochs must be > 0"):
        check(replace(good, train=TrainConfig(epochs=0.0)))
    with pytest.raises(DataError, match=r"x\.jsonl"):
        plan(good)
