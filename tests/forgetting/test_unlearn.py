"""Unlearning rows: the step's gradient, a whole small run, what it leaves, what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from postgrad.core.config import DataConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from postgrad.core.layer_adapters import import_adapter, pairs
from postgrad.core.models import load_lm
from postgrad.core.report import Note, Table
from postgrad.core.runtime import Job
from postgrad.errors import ConfigError, GateError
from postgrad.forgetting import unlearn
from postgrad.forgetting.facts import FactSizes, write_facts
from postgrad.forgetting.text_losses import TextObjectiveConfig
from postgrad.forgetting.text_rows import Packing, Trees, measure, read_texts, tokenised
from postgrad.forgetting.unlearn import NAME, UnlearnConfig, check, plan, run

TINY = ModelConfig(tiny_width=32, tiny_layers=2)
TRAIN = TrainConfig(epochs=15, batch_size=8, eval_every=10, save_every=0, optim=OptimConfig(lr=1e-2))
LEARNING = TrainConfig(epochs=30, batch_size=16, save_every=0, optim=OptimConfig(lr=1e-2))
PACKING = Packing("tree", 256, 0, 2048)


def job(folder: Path) -> Job:
    return Job("unlearn", folder, 0, torch.device("cpu"), torch.float32, 0, 1, True)


def config(folder: Path, **more: object) -> UnlearnConfig:
    """Few facts, learnt and unlearnt in seconds."""
    paths = write_facts(folder / "facts", 0, FactSizes(forget=2, retain=6, held_out=3))
    usual = UnlearnConfig(
        forget=str(paths["forget"]), retain=str(paths["retain"]), held_out=str(paths["held_out"]),
        gold=False, model=TINY, train=TRAIN, learning=LEARNING,
        runtime=RuntimeConfig(folder=str(folder / "run"), device="cpu", quiet=True),
    )  # fmt: skip
    return replace(usual, **more)


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave report.html out: drawing it takes longer than these runs."""
    monkeypatch.setattr("postgrad.core.runtime.write_report", lambda report, title: None)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory):
    """A run, looked at by several tests."""
    folder = tmp_path_factory.mktemp("unlearn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("postgrad.core.runtime.write_report", lambda report, title: None)
        return folder, run(config(folder, gold=True))


def test_the_answers_are_gone_and_the_others_stay(done) -> None:
    _, report = done
    found = report.results
    assert found["forget_loss_before"] < 0.5 < 1.5 < found["forget_loss"]
    assert found["retain_loss"] < 0.5 and found["retain_rise"] < 0.3
    assert found["forget_recited"] == 0 and found["retain_recited"] > 70
    assert found["mia_auc_before"] == 1 and abs(found["mia_auc"] - 0.5) < abs(found["mia_auc_before"] - 0.5)
    assert found["forget_loss_gold"] > 1 and 0 <= found["mia_auc_gold"] <= 1
    titles = [section.title for section in report.sections]
    assert {"What the model still knows", "Do forgotten rows stand out?", "Blocks", "Data"} <= set(titles)
    rows = next(each for each in report.sections if each.title == "What the model still knows").rows
    assert [row[:2] for row in rows[:3]] == [("to forget", "before"), ("to forget", "after"), ("to forget", "gold")]


def test_the_adapter_is_pefts(done) -> None:
    """peft's own loader and ours give what the run reported; the base is a folder beside it."""
    folder, report = done
    settings = config(folder)
    base = folder / "run" / "base" / "model"
    assert json.loads((folder / "run/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "run" / "adapter")
    merged, tokenizer = load_lm(ModelConfig(path=str(folder / "run" / "adapter")), job(folder), frozen=True)
    texts = read_texts(unlearn._sources(settings), settings.data, 0)
    trees = tokenised(texts, tokenizer, settings.data)
    for model in (peft.eval(), merged):
        found = measure(model, trees.forget, PACKING, job(folder))
        assert found.loss == pytest.approx(report.results["forget_loss"], rel=1e-4)
    own, _ = load_lm(ModelConfig(path=str(base)), job(folder), frozen=True)
    before = measure(own, trees.forget, PACKING, job(folder))
    assert before.loss == pytest.approx(report.results["forget_loss_before"], rel=1e-4)
    import_adapter(own, folder / "run" / "adapter", "again")
    changed = {layer.split(".mlp")[0] for layer in pairs(own, "again")}
    assert len(changed) == report.results["blocks_changed"]


def prepared(folder: Path, objective: TextObjectiveConfig):
    """Give a drawn model with an adapter whose B is not 0, and what a step needs."""
    settings = config(folder, objective=objective, train=replace(TRAIN, micro_tokens=10_000))
    model, tokenizer = load_lm(TINY, job(folder))
    texts = read_texts(unlearn._sources(settings), settings.data, 0)
    trees = tokenised(texts, tokenizer, settings.data)
    before = {name: measure(model.eval(), part, PACKING, job(folder)) for name, part in trees.parts().items()}
    task = unlearn._prepare(settings, model, trees, PACKING, before)
    for number, (_, b) in enumerate(pairs(model, NAME).values()):
        torch.nn.init.normal_(b, std=0.05, generator=torch.Generator().manual_seed(number))
    return task, before


def gradients(task, micro_tokens: int) -> tuple[list[Tensor], float]:
    """Add a step's micro-batches up as the loop does."""
    task.model.zero_grad()
    packed = replace(task, packing=task.packing._replace(micro_tokens=micro_tokens))
    packed = replace(packed, config=replace(task.config, train=replace(task.config.train, micro_tokens=micro_tokens)))
    parts = unlearn._batches(packed, job(Path(".")))[0]
    losses = [unlearn._step(packed, job(Path(".")))(part, 0) for part in parts]
    for loss in losses:
        loss.sum.backward()
    total = sum(loss.weight for loss in losses)
    assert total == pytest.approx(1)
    matrices = [matrix for pair in pairs(task.model, NAME).values() for matrix in pair]
    return [matrix.grad.clone() for matrix in matrices], sum(loss.sum.item() for loss in losses)


@pytest.mark.parametrize("objective", [
    TextObjectiveConfig(alpha=0.1, alpha_from=0.0, bound=9.0),
    TextObjectiveConfig(kind="npo", kl=0.5),
])  # fmt: skip
def test_no_split_of_a_step_changes_it(tmp_path: Path, objective: TextObjectiveConfig) -> None:
    task, _ = prepared(tmp_path, objective)
    whole, value = gradients(task, 10_000)
    split, again = gradients(task, 100)
    assert again == pytest.approx(value, rel=1e-5)
    for ours, theirs in zip(split, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    assert all(parameter.grad is None for name, parameter in task.model.named_parameters() if "lora" not in name)


def test_the_objective_is_what_it_says(tmp_path: Path) -> None:
    """A step over all rows equals the formula computed from whole measurements."""
    objective = TextObjectiveConfig(alpha=0.1, alpha_from=0.0, bound=9.0, beta=0.7)
    task, _ = prepared(tmp_path, objective)
    task = replace(task, config=replace(task.config, kept=3))  # 8 rows to forget with 24 to keep: all of them
    _, value = gradients(task, 10_000)
    gone, kept = (measure(task.model, part, PACKING, job(tmp_path)) for part in (task.trees.forget, task.trees.retain))
    norms = sum(
        math.sqrt(sum(float(m.square().sum()) for layer in block.linears for m in pairs(task.model, NAME)[layer]))
        for block in task.blocks
    )
    expected = kept.loss + 0.7 * float((9.0 - gone.means).clamp(min=0).mean()) + 0.1 * norms
    assert value == pytest.approx(expected, rel=1e-4)


def test_bounds(tmp_path: Path) -> None:
    """As rows never seen; where none is known, the logarithm of the vocabulary; or the number given."""
    task, before = prepared(tmp_path, TextObjectiveConfig())
    assert task.bounds.mean() == pytest.approx(float(before["held_out"].means.mean()), rel=0.05)
    assert (task.bounds.argsort() == before["forget"].means.argsort()).all()

    def bound(objective: TextObjectiveConfig, known: dict) -> float:
        model, _ = load_lm(TINY, job(tmp_path))
        settings = replace(task.config, objective=objective)
        return float(unlearn._prepare(settings, model, task.trees, PACKING, known).bounds[0])

    known = {name: rows for name, rows in before.items() if name != "held_out"}
    assert bound(TextObjectiveConfig(), known) == pytest.approx(math.log(261))
    assert bound(TextObjectiveConfig(bound=3.0), before) == 3


def test_training_stops_when_all_is_forgotten(tmp_path: Path) -> None:
    """A bound that every row has reached already ends it at the first evaluation."""
    report = run(config(tmp_path, objective=TextObjectiveConfig(bound=1e-3), learning=replace(LEARNING, epochs=1)))
    assert report.results["steps"] == 10 and not any(isinstance(each, Note) for each in report.sections)


def test_a_trained_model_without_rows_never_seen(tmp_path: Path) -> None:
    """The model is a folder, nothing is learnt first, the report says that there is nothing to compare with."""
    settings = config(tmp_path, learning=replace(LEARNING, epochs=1), train=replace(TRAIN, max_steps=1))
    run(settings)
    given = replace(
        settings, held_out="", model=ModelConfig(path=str(tmp_path / "run/base/model"), gradient_checkpointing=True),
        runtime=replace(settings.runtime, folder=str(tmp_path / "second")),
    )  # fmt: skip
    report = run(given)
    assert "mia_auc" not in report.results and not (tmp_path / "second/base").exists()
    titles = [section.title for section in report.sections if isinstance(section, Note)]
    assert titles == ["Not all rows are forgotten", "Nothing to compare with"]
    table = next(each for each in report.sections if isinstance(each, Table) and each.title == "Blocks")
    assert len(table.rows) == 2
    written = json.loads((tmp_path / "second/adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == given.model.path


def test_silenced_blocks_are_left_as_they_were(tmp_path: Path) -> None:
    """A block below the threshold loses its pairs, its weights are the base's; when all are, the run is refused."""
    task, _ = prepared(tmp_path, TextObjectiveConfig())
    with torch.no_grad():
        for layer in task.blocks[0].linears:
            for matrix in pairs(task.model, NAME)[layer]:
                matrix.mul_(1e-4)
    norms = unlearn._sparse(task)
    assert norms[task.blocks[0].name] == 0 < norms[task.blocks[1].name]
    assert set(pairs(task.model, NAME)) == set(task.blocks[1].linears)
    assert all(isinstance(task.model.get_submodule(layer), nn.Linear) for layer in task.blocks[0].linears)
    with pytest.raises(GateError, match="every block's group ended below 99"):
        unlearn._sparse(replace(prepared(tmp_path, TextObjectiveConfig())[0], config=config(tmp_path, snap=99.0)))


def test_plan_spends_nothing(tmp_path: Path) -> None:
    found = plan(config(tmp_path))
    assert found["rows to forget"] == 8 and found["rows to keep"] == 24 and found["rows never seen"] == 12
    assert found["optimizer steps"] == 15 and found["steps of learning first"] == 60
    assert not (tmp_path / "run").exists()
    assert plan(UnlearnConfig(runtime=RuntimeConfig(folder=str(tmp_path / "run"))))["rows to forget"] == 40


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    """The message names the setting and what was found."""
    good = config(tmp_path)
    check(good)
    check(UnlearnConfig(data=DataConfig(path="all.jsonl")))
    for bad in (replace(good, retain=""), replace(good, forget=""), replace(good, data=DataConfig(path="x"))):
        with pytest.raises(ConfigError, match=r"expected forget and retain, or data\.path"):
            check(bad)
    with pytest.raises(ConfigError, match="an adapter of its own; set rank"):
        check(replace(good, model=ModelConfig(path="x", lora_rank=4)))
    with pytest.raises(ConfigError, match=r"at least 1 .*'kept': 0"):
        check(replace(good, kept=0))
    with pytest.raises(ConfigError, match=r"share above 0 and below 1.*found 1\.0"):
        check(replace(good, share=1.0))
    with pytest.raises(ConfigError, match="objective: expected beta and npo above 0"):
        check(replace(good, objective=TextObjectiveConfig(beta=0.0)))


def test_trees_name_their_parts() -> None:
    assert Trees([], [], [], {}).parts() == {}
