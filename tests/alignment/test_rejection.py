"""Rejection sampling: which responses are picked, the control, the gate, and that they are learnt."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_stages import MODEL, runtime, write_sets

from postgrad.alignment.judge import JudgeConfig
from postgrad.alignment.rejection import RejectionConfig, check, pick_responses, plan, rejection_loss, run, select
from postgrad.alignment.sft import sft_loss
from postgrad.core.config import OptimConfig, TrainConfig
from postgrad.core.data import ResponseSet, hold_out, load_sets
from postgrad.core.report import read_metrics
from postgrad.core.store import read_store
from postgrad.errors import ConfigError, DataError, GateError

MESSAGES = ({"role": "user", "content": "copy mako"},)
ITEM = ResponseSet("p", MESSAGES, ("c", "a", "", "b", "a", "d"), (0.3, 0.9, 1.0, 0.5, 0.9, 0.1))
TRAIN = TrainConfig(max_steps=20, batch_size=8, log_every=1, optim=OptimConfig(lr=1e-2, schedule="constant"))


def picked(**changes) -> list[tuple[str, int]]:
    n = changes.pop("n", 6)
    rows = pick_responses(ITEM, RejectionConfig(**changes), n, seed=0)
    return [(row["response"], row["rank"]) for row in rows]


def test_ranks_by_hand():
    """By score: "" 1.0, a 0.9, a 0.9, b 0.5, c 0.3, d 0.1; the empty one keeps its rank and is never picked."""
    assert picked() == [("a", 2)]
    assert picked(rank=4) == [("b", 4)]
    assert picked(rank=2, count=3) == [("a", 2), ("b", 4), ("c", 5)]  # the second "a" says nothing new
    assert picked(rank=6) == [("d", 6)]
    assert picked(rank=9) == [("d", 6)]  # a prompt with fewer responses gives its last
    assert picked(n=1) == [("c", 1)]
    assert picked(count=9) == [("a", 2), ("b", 4), ("c", 5), ("d", 6)]


def test_select_falls_back_to_earlier_places():
    assert select(np.array([0, 1, 2]), ["x", "y", " "], 2, 1) == [1]
    assert select(np.array([0]), [""], 0, 1) == []


def test_the_random_pick_is_keyed_and_ignores_scores():
    texts = tuple(f"t{i}" for i in range(50))
    sets = [ResponseSet(f"p{i}", MESSAGES, texts, tuple(map(float, range(50)))) for i in range(40)]
    config = RejectionConfig(pick="random", count=2)
    rows = [pick_responses(item, config, 50, seed=0) for item in sets]
    assert rows == [pick_responses(item, config, 50, seed=0) for item in sets]
    assert all(len({row["response"] for row in own}) == 2 for own in rows)
    ranks = [row["rank"] for own in rows for row in own]
    assert 18 < np.mean(ranks) < 33 and len(set(ranks)) > 30  # uniform over 1..50: mean 25.5, sd of the mean 1.6
    unscored = replace(sets[0], scores=())
    assert [row["response"] for row in pick_responses(unscored, config, 50, 0)] == [r["response"] for r in rows[0]]


def test_its_loss_is_that_of_sft():
    assert rejection_loss is sft_loss


@pytest.fixture
def config(tmp_path) -> RejectionConfig:
    texts = ("aaaa", "abab", "bbbb")
    data = write_sets(tmp_path / "sets.jsonl", [(texts, (0.9, 0.5, 0.1)) for _ in range(16)])
    return RejectionConfig(model=MODEL, data=data, train=TRAIN, runtime=runtime(tmp_path / "run"))


def test_the_best_responses_are_learnt(config, tmp_path):
    report = run(config)
    rows = read_store(tmp_path / "run" / "selected")
    assert {row["response"] for row in rows} == {"aaaa"} and {row["score"] for row in rows} == {0.9}
    losses = [float(str(row["loss"])) for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len(losses) == 20 and losses[-1] < 0.3 < losses[0]
    assert report.results["loss"] < 0.3 and (tmp_path / "run" / "model" / "model.safetensors").is_file()
    table = next(section for section in report.sections if section.title == "Picked responses")
    assert table.rows == (("offered", 48, pytest.approx(0.5), 4.0), ("picked", 16, pytest.approx(0.9), 4.0))


def test_the_gate_caps_n_by_the_judge(config, tmp_path, monkeypatch):
    """Of "right", "wrong" and a "hack" that the reward model likes best; two draws rarely hold the third."""
    sets = [((f"{i}", "+" * 9, "-"), (0.2, 0.1, 0.3)) for i in range(30)]
    data = write_sets(tmp_path / "hacked.jsonl", sets)
    gold = {"-": 0.0, "+" * 9: 0.1}
    monkeypatch.setattr("postgrad.alignment.judge.task_score", lambda messages, text: gold.get(text, 1.0))
    gated = replace(config, data=data, gate=True, train=replace(TRAIN, max_steps=1))
    with pytest.raises(GateError, match="do not get better with n"):
        run(gated)
    # Among the first two the reward model is right: n=1 gives 0.55 on average, n=2 gives 1.
    report = run(replace(gated, n=2, runtime=runtime(tmp_path / "two")))
    assert "Best of n on held-out prompts" in [section.title for section in report.sections]
    assert {row["response"] for row in read_store(tmp_path / "two" / "selected")} == {f"{i}" for i in range(30)}


def test_gate_and_training_hold_out_the_same_prompts(config, tmp_path, monkeypatch):
    seen: list[int] = []
    judge = "postgrad.alignment.rejection.judge_responses"

    def spy(judge, prompts, responses, opponents, *, absolute):
        seen.append(len(prompts))
        raise GateError("enough")

    monkeypatch.setattr(judge, spy)
    with pytest.raises(GateError, match="enough"):
        run(replace(config, gate=True))
    assert seen == [len(hold_out(load_sets(config.data).items, config.data.held_out, 0)[1])]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank and count >= 1"),
        ({"count": 0}, "rank and count >= 1"),
        ({"n": 4, "rank": 5}, "rank 5 is beyond n"),
        ({"gate": True, "judge": JudgeConfig(noise=0.7)}, "judge.noise"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        check(replace(config, **changes))


def test_a_gate_needs_held_out_prompts(config):
    with pytest.raises(ConfigError, match=r"data\.held_out is 0"):
        check(replace(config, gate=True, data=replace(config.data, held_out=0.0)))


def test_ranks_need_scores_and_enough_responses(config, tmp_path):
    with pytest.raises(ConfigError, match="rank 4 is asked for, but at most 3"):
        run(replace(config, rank=4))
    data = write_sets(tmp_path / "unscored.jsonl", [(("a", "b"), ()) for _ in range(8)])
    with pytest.raises(DataError, match="expected a score for each response"):
        run(replace(config, data=data, runtime=runtime(tmp_path / "unscored")))
    one = replace(TRAIN, max_steps=1)
    run(replace(config, pick="random", data=data, train=one, runtime=runtime(tmp_path / "random")))


def test_plan(config, tmp_path):
    found = plan(replace(config, count=2, gate=True))
    num_held = len(hold_out(load_sets(config.data).items, 0.3, 0)[1])
    assert found["items trained on"] == 2 * (16 - num_held)
    assert found["responses the gate judges"] == 3 * num_held
    assert not (tmp_path / "run").exists()
