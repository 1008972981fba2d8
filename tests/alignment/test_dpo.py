"""DPO: choosing answers, the store of reference log-probabilities, the step, and short runs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from postgrad.alignment import reference as reference_module
from postgrad.alignment.dpo import (
    DPOConfig,
    PairData,
    answer_logprobs,
    check,
    displacement,
    dpo_loss,
    dpo_step,
    plan,
    run,
)
from postgrad.alignment.preference import MULTIWISE, REFERENCE_FREE
from postgrad.alignment.reference import reference_logprobs
from postgrad.alignment.selection import PickSettings, Selected, select
from postgrad.core.batches import eval_batches
from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from postgrad.core.models import load_lm, save_model
from postgrad.core.rows import Rows, Tree, pack
from postgrad.core.runtime import Job
from postgrad.core.store import read_store, seal, write_shard
from postgrad.errors import ArtefactError, ConfigError, DataError, Interrupted

TINY = ModelConfig(tiny_width=32)
TREES = [Tree((65, 66, 67 + i), ((70, 71, 260), (72, 260))) for i in range(5)]
IDS = [f"pair {i}" for i in range(5)]


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave report.html out: drawing it takes longer than these runs."""
    monkeypatch.setattr("postgrad.core.runtime.write_report", lambda report, title: None)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job in a fresh folder."""
    return Job("dpo", tmp_path, 0, torch.device("cpu"), torch.float32, 0, 1, True)


def sets_file(folder: Path, num: int = 40) -> str:
    """Sets of four answers, better with more a's, and three sets that give no pair."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"word {i}", "responses": ["bbbb", "abbb", "aabb", "aaaa"], "scores": [0.0, 1.0, 2.0, 4.0]}
        for i in range(num)
    ]
    rows.append({"prompt": "even", "responses": ["a", "b"], "scores": [1.0, 1.0]})
    rows.append({"prompt": "same", "responses": ["a", "a"], "scores": [1.0, 2.0]})
    rows.append({"prompt": "one", "responses": ["a"], "scores": [1.0]})
    return write(folder / "sets.jsonl", rows)


def pairs_file(folder: Path, num: int = 40) -> str:
    """Pairs whose chosen answer is all a's."""
    rows = [{"prompt": f"word {i}", "chosen": "aaaa", "rejected": "bbbb", "p": 0.8} for i in range(num)]
    return write(folder / "pairs.jsonl", rows)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(folder: Path, path: str, **more: Any) -> DPOConfig:
    """A run of 15 steps in a second or two."""
    base = DPOConfig(
        model=TINY,
        data=DataConfig(path=path, row_length=0, held_out=0.2),
        train=TrainConfig(max_steps=15, batch_size=8, log_every=5, optim=OptimConfig(lr=3e-3)),
        runtime=RuntimeConfig(folder=str(folder), quiet=True),
    )
    return replace(base, **more)


def choose(path: str, **settings: Any) -> Selected:
    """Choose answers of a file, none held out."""
    return select(DataConfig(path=path, held_out=0.0), PickSettings(**settings), Path("unused"))


def test_loss_by_hand() -> None:
    """Log-ratios 2 and -1, beta 0.5: -log s(1.5) = 0.201413."""
    policy, reference = torch.tensor([[-6.0, -11.0]]), torch.tensor([[-8.0, -10.0]])
    assert dpo_loss(policy, reference, beta=0.5).item() == pytest.approx(0.201413, abs=1e-6)
    with pytest.raises(ConfigError, match="beta must be > 0"):
        dpo_loss(policy, reference, beta=0.0)


def test_choosing_from_sets(tmp_path: Path) -> None:
    """Rank 1 is chosen; sets without a pair are counted by reason."""
    found = choose(sets_file(tmp_path, 3), rejected="worst")
    assert [(c.answers, c.places, c.scores) for c in found.train] == [(("aaaa", "bbbb"), (3, 0), (4.0, 0.0))] * 3
    assert found.counts["dropped: all scores equal"] == 1
    assert found.counts["dropped: fewer than two distinct responses"] == 2
    assert found.counts["prompts with a choice"] == 3


def test_choosing_a_ranking(tmp_path: Path) -> None:
    """Three rejected answers: the whole ranking, best first."""
    found = choose(sets_file(tmp_path, 1), num_rejected=3)
    assert found.train[0].answers == ("aaaa", "aabb", "abbb", "bbbb")


def test_choosing_from_pairs(tmp_path: Path) -> None:
    """Pairs keep their order and probability; a ranking cannot come of them."""
    path = pairs_file(tmp_path, 2)
    assert [(c.answers, c.p, c.places) for c in choose(path).train] == [(("aaaa", "bbbb"), 0.8, ())] * 2
    with pytest.raises(ConfigError, match="num_rejected 2 needs scored sets"):
        choose(path, num_rejected=2)


def test_choosing_by_log_probability(tmp_path: Path) -> None:
    """The store of responses has what near and likely need; a plain file has not."""
    with pytest.raises(ConfigError, match="need the run folder of `postgrad sample`"):
        choose(sets_file(tmp_path, 1), rejected="likely")
    texts, scores, sums = ["good", "bad", "worse"], [1.0, 0.5, 0.0], [-4.0, -9.0, -2.0]
    message = json.dumps([{"role": "user", "content": "hi"}])
    responses = [
        {"prompt_id": "p", "prompt_messages": message, "k": k, "response": texts[k], "logprob_sum": sums[k],
         "n_tokens": 2} for k in range(3)
    ]  # fmt: skip
    marks = [{"prompt_id": "p", "k": k, "score": scores[k]} for k in range(3)]
    for name, rows in (("responses", responses), ("scores", marks)):
        write_shard(tmp_path / "run" / name, 0, rows, pa.Table.from_pylist(rows).schema)
        seal(tmp_path / "run" / name, stage=name, settings={}, parents={}, counts={})
    run_folder = str(tmp_path / "run")
    assert choose(run_folder, rejected="likely").train[0].answers == ("good", "worse")
    assert choose(run_folder, rejected="near").train[0].answers == ("good", "worse")
    assert choose(run_folder, rejected="mu-1sigma").train[0].places == (0, 2)


def test_unscored_and_useless_sets_are_refused(tmp_path: Path) -> None:
    """No scores: what to run. No pair in any set: the counts."""
    path = write(tmp_path / "a.jsonl", [{"prompt": "x", "responses": ["a", "b"]}])
    with pytest.raises(DataError, match="Score the set first"):
        choose(path)
    path = write(tmp_path / "b.jsonl", [{"prompt": "x", "responses": ["a", "b"], "scores": [1, 1]}])
    with pytest.raises(DataError, match="all scores equal': 1"):
        choose(path)


class Scorer:
    """Score rows with a model and count the calls; stop the run after some of them."""

    def __init__(self, model: Any, stop_after: int = 10**9) -> None:
        self.model, self.calls, self.stop_after = model, 0, stop_after

    def __call__(self, rows: Rows) -> Tensor:
        self.calls += 1
        return answer_logprobs(self.model, 1.0, rows)

    def should_stop(self) -> bool:
        return self.calls >= self.stop_after


def batch(trees: list[Tree]) -> list[Rows]:
    """One micro-batch a shard."""
    return eval_batches(trees, row_length=0, micro_tokens=4096, layout="tree", pad_id=256)


def table(model: Any, scorer: Callable[[Rows], Tensor], job: Job, trees: list[Tree] = TREES) -> Tensor:
    """Run the store."""
    return reference_logprobs(model, trees, IDS, batch=batch, function=scorer, variant="", job=job)


def test_the_store_is_kept_and_continued(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after two of three shards, the run computes the third only, and ends in the same bytes."""
    monkeypatch.setattr(reference_module, "SHARD_TREES", 2)
    model, _ = load_lm(TINY, job, frozen=True)
    straight = table(model, Scorer(model), replace(job, folder=tmp_path / "straight"))
    first = Scorer(model, stop_after=2)
    monkeypatch.setattr(reference_module, "stop_requested", first.should_stop)
    with pytest.raises(Interrupted, match="2 of 3 shards"):
        table(model, first, job)
    monkeypatch.setattr(reference_module, "stop_requested", lambda: False)
    second = Scorer(model)
    assert torch.equal(table(model, second, job), straight)
    assert second.calls == 1
    third = Scorer(model)
    assert torch.equal(table(model, third, job), straight) and third.calls == 0
    for path in sorted((tmp_path / "straight/reference").iterdir()):
        assert (tmp_path / "reference" / path.name).read_bytes() == path.read_bytes()
    rows = read_store(tmp_path / "reference")
    assert [(row["id"], row["side"], row["n_tokens"]) for row in rows[:2]] == [
        ("pair 0", "chosen", 3),
        ("pair 0", "rejected", 2),
    ]


def test_a_damaged_or_foreign_shard_is_written_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the store is sealed, what does not fit is computed anew."""
    monkeypatch.setattr(reference_module, "SHARD_TREES", 2)
    model, _ = load_lm(TINY, job, frozen=True)
    folder = job.folder / "reference"
    folder.mkdir()
    (folder / "part-00000.parquet").write_bytes(b"half a file")
    other, _ = load_lm(replace(TINY, tiny_layers=1), job, frozen=True)
    stopped = Scorer(other, stop_after=1)
    monkeypatch.setattr(reference_module, "stop_requested", stopped.should_stop)
    with pytest.raises(Interrupted):
        table(other, stopped, job)
    monkeypatch.setattr(reference_module, "stop_requested", lambda: False)
    scorer = Scorer(model)
    found = table(model, scorer, job)
    assert scorer.calls == 3
    rows = pack(TREES, range(5), row_length=64, layout="tree", pad_id=256)
    torch.testing.assert_close(found, answer_logprobs(model, 1.0, rows).view(5, 2), atol=1e-5, rtol=1e-5)


def test_another_model_or_other_answers_are_refused(job: Job) -> None:
    """A finished store answers only for what it was made of."""
    model, _ = load_lm(TINY, job, frozen=True)
    table(model, Scorer(model), job)
    other, _ = load_lm(replace(TINY, tiny_layers=1), job, frozen=True)
    with pytest.raises(ArtefactError, match="another model or of other answers"):
        table(other, Scorer(other), job)
    changed = [*TREES[:4], Tree((1, 2), ((3, 260), (4, 260)))]
    with pytest.raises(ArtefactError, match="another model or of other answers"):
        table(model, Scorer(model), job, changed)


def saved(job: Job, folder: Path) -> ModelConfig:
    """Save the tiny model, since adapters need a base that stays."""
    save_model(*load_lm(TINY, job), folder)
    return ModelConfig(path=str(folder))


def step_sum(model: Any, data: PairData, index: list[list[int]], settings: DPOConfig) -> Tensor:
    """Add up micro-batches as the loop does; give the gradient of the sum."""
    model.zero_grad()
    for part in index:
        rows = pack(data.trees, part, row_length=32, layout="tree", pad_id=256)
        dpo_step(settings, model, data, rows, 0).sum.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "cdpo", "simpo"])
def test_no_split_of_a_step_changes_it(job: Job, name: str) -> None:
    """Micro-batches in any order add up to the whole batch."""
    model, _ = load_lm(TINY, job)
    generator = torch.Generator().manual_seed(0)
    data = PairData(TREES, IDS, torch.rand(5, generator=generator), -20 * torch.rand(5, 2, generator=generator))
    if name in REFERENCE_FREE:
        data = replace(data, reference=None)
    settings = DPOConfig(loss=name)
    whole = step_sum(model, data, [[0, 1, 2, 3, 4]], settings)
    torch.testing.assert_close(step_sum(model, data, [[4, 1], [3], [0, 2]], settings), whole, atol=1e-5, rtol=1e-4)


def test_only_the_adapter_has_gradients(job: Job, tmp_path: Path) -> None:
    """With LoRA the base stays as it is; a fresh adapter changes nothing, so log-ratios start at 0."""
    path = saved(job, tmp_path / "base")
    model, _ = load_lm(replace(path, lora_rank=2), job)
    base, _ = load_lm(path, job, frozen=True)
    rows = pack(TREES, range(5), row_length=32, layout="tree", pad_id=256)
    with torch.no_grad():
        reference = answer_logprobs(base, 1.0, rows).view(5, 2)
    loss = dpo_step(DPOConfig(), model, PairData(TREES, IDS, torch.ones(5), reference), rows, 0)
    assert loss.metrics["margin"][0].item() == pytest.approx(0.0, abs=1e-5)
    loss.sum.backward()
    assert {"lora" in name for name, p in model.named_parameters() if p.grad is not None} == {True}


def test_run_from_sets(tmp_path: Path) -> None:
    """The policy learns to prefer the chosen answers on prompts set aside; all artefacts are there."""
    settings = config(tmp_path / "run", sets_file(tmp_path), rejected="worst")
    report = run(settings)
    assert report.results["accuracy"] > 0.9 and report.results["margin"] > 0
    assert report.results["loss"] < 0.69
    assert {"chosen_logratio", "rejected_logratio", "kl", "chosen_length", "shortened"} <= report.results.keys()
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert logged[0]["loss"] > logged[2]["loss"]
    pairs = read_store(tmp_path / "run/pairs")
    assert len(pairs) == 40
    assert {(row["k_chosen"], row["k_rejected"], row["strategy"], row["score_gap"]) for row in pairs} == {
        (3, 0, "worst", 4.0)
    }
    assert len(read_store(tmp_path / "run/reference")) == 80
    assert (tmp_path / "run/model/model.safetensors").is_file()
    assert run(settings).results == report.results


@pytest.mark.parametrize("name", sorted(MULTIWISE))
def test_run_on_rankings(tmp_path: Path, name: str) -> None:
    """Four answers that share a prompt train together."""
    report = run(config(tmp_path / "run", sets_file(tmp_path), loss=name, num_rejected=3))
    assert report.results["accuracy"] > 0.6
    assert len(read_store(tmp_path / "run/reference")) == 160


def test_run_without_reference(tmp_path: Path) -> None:
    """SimPO on pairs computes no reference and writes no pairs again."""
    report = run(config(tmp_path / "run", pairs_file(tmp_path), loss="simpo", beta=2.0))
    assert report.results["accuracy"] == 1.0 and "chosen_logprob" in report.results
    assert not (tmp_path / "run/reference").exists() and not (tmp_path / "run/pairs").exists()


def test_run_with_another_reference_and_adapter(tmp_path: Path, job: Job) -> None:
    """The reference is scored once and freed; LD-DPO's weights are part of its key."""
    base = saved(job, tmp_path / "base")
    settings = config(
        tmp_path / "run", pairs_file(tmp_path), reference=base.path, ld_alpha=0.5, model=replace(base, lora_rank=2)
    )
    slow = TrainConfig(max_steps=2, batch_size=8, optim=OptimConfig(lr=1e-7))
    report = run(replace(settings, train=slow))
    assert report.results["margin"] == pytest.approx(0.0, abs=1e-3)  # still the reference
    assert (tmp_path / "run/model/adapter_config.json").is_file()


def test_plan_and_bad_settings(tmp_path: Path) -> None:
    """Counts without a run; contradictions are refused in the user's words."""
    good = config(tmp_path / "run", sets_file(tmp_path, 10))
    found = plan(good)
    assert found["rows dropped: all scores equal"] == 1 and found["optimizer steps"] == 15
    assert not (tmp_path / "run").exists()
    for more, message in (
        ({"loss": "hinj"}, "did you mean 'hinge'"),
        ({"beta": -1.0}, "beta must be > 0"),
        ({"rejected": "wurst"}, "did you mean 'worst'"),
        ({"chosen": 0}, "chosen and num_rejected must be >= 1"),
        ({"num_rejected": 2}, "needs the loss pl_dpo or s_dpo, got 'sigmoid'"),
        ({"ld_alpha": 1.5}, r"ld_alpha must lie in \[0, 1\]"),
        ({"loss": "orpo", "reference": "x"}, "uses no reference"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(replace(good, **more))


def test_displacement_is_told() -> None:
    """Both log-ratios below 0 give a warning; one of them does not."""
    note = displacement({"chosen_logratio": -1.0, "rejected_logratio": -3.0})
    assert note and note[0].kind == "warning"
    assert not displacement({"chosen_logratio": 0.5, "rejected_logratio": -3.0}) and not displacement({})


def test_strategies_see_the_set_once(tmp_path: Path) -> None:
    """The same seed chooses the same answers whatever else is in the file."""
    few = choose(sets_file(tmp_path, 5), rejected="random").train
    many = choose(sets_file(tmp_path, 30), rejected="random").train
    assert few == many[:5]
    assert len({choice.places[1] for choice in many}) > 1
    assert np.mean([choice.scores[0] for choice in many]) == 4.0
