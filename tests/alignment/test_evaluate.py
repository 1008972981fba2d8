"""Evaluation: policies side by side, resumed piece by piece, read back from the stores."""

import math
from dataclasses import replace

import pytest
from tiny_stages import MODEL, contents, job, runtime, write_prompts, write_reward_model

from postgrad.alignment.evaluate import EvaluateConfig, check, named_policies, plan, run
from postgrad.alignment.evaluate_report import Seen, common_prompts, read_policy, summarise
from postgrad.alignment.judge import JudgeConfig
from postgrad.alignment.responses import Answers
from postgrad.core.models import load_lm, save_model
from postgrad.core.report import Plot, Table
from postgrad.core.runtime import progress
from postgrad.core.store import read_store
from postgrad.errors import ConfigError, DataError


@pytest.fixture
def config(tmp_path) -> EvaluateConfig:
    model, tokenizer = load_lm(MODEL, job(tmp_path / "job", seed=9))
    save_model(model, tokenizer, tmp_path / "other")
    return EvaluateConfig(
        policies=("base=tiny", f"other={tmp_path / 'other'}"),
        samples=3,
        max_new_tokens=6,
        chunk=3,
        show=2,
        model=MODEL,
        data=write_prompts(tmp_path / "prompts.jsonl", 7),
        runtime=runtime(tmp_path / "run"),
    )


def test_a_policy_against_itself_and_another(config, tmp_path):
    config = replace(config, policies=(*config.policies, "same=tiny"), reward=write_reward_model(tmp_path / "rm"))
    report = run(config)
    found = report.results
    assert found["prompts"] == 7
    assert found["same_gold"] == found["base_gold"] and found["same_difference"] == 0
    assert found["same_win_rate"] == 0.5 and 0 <= found["other_win_rate"] <= 1
    assert "base_win_rate" not in found and "other_best_of_3" in found
    assert found["base_oracle_of_3"] >= found["base_best_of_3"]
    titles = [section.title for section in report.sections]
    assert {"Policies", "Best of n: other", "Best of n", "Responses side by side"} <= set(titles)
    gold = [row["gold"] for row in read_store(tmp_path / "run" / "policies" / "base" / "judged")]
    assert len(gold) == 21 and sum(gold) / 21 == pytest.approx(found["base_gold"])
    wins = [row["win"] for row in read_store(tmp_path / "run" / "policies" / "base" / "judged")]
    assert sum(wins) / 21 == pytest.approx(0.5)  # each response is once first and once second


def test_without_a_reward_model_there_is_the_oracle(config):
    report = run(replace(config, policies=("base=tiny",), judged=2))
    assert "base_best_of_2" not in report.results and "base_oracle_of_2" in report.results
    plots = [section.title for section in report.sections if isinstance(section, Plot)]
    assert plots == ["Best of n by the oracle"]


def test_a_run_killed_anywhere_ends_in_the_same_bytes(config, tmp_path, monkeypatch):
    config = replace(config, reward=write_reward_model(tmp_path / "rm"))
    run(config)
    stopped = replace(config, runtime=runtime(tmp_path / "stopped"))
    advance = progress.advance
    left = [0]

    def die(self: progress, n: int = 1, note: str = "") -> None:
        advance(self, n, note)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    for calls in (2, 4, 5):
        left[0] = calls
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(progress, "advance", die)
            run(stopped)
    run(stopped)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "run")


def test_held_out_prompts_only(config):
    assert plan(replace(config, data=replace(config.data, held_out=0.4)))["prompts"] < plan(config)["prompts"] == 7
    found = plan(replace(config, judged=2))
    assert found["responses"] == 42 and found["comparisons, both orders counted"] == 2 * 2 * 2 * 7


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ((), "one or more different names"),
        (("a=x", "a=y"), "one or more different names"),
        (("x",), "expected name=path"),
        (("=x",), "expected name=path"),
        (("../a=x",), "expected name=path"),
    ],
)
def test_policies_need_names(config, policies, message):
    with pytest.raises(ConfigError, match=message):
        check(replace(config, policies=policies))


def test_policies_may_have_equal_signs_in_their_paths():
    assert named_policies(EvaluateConfig(policies=("a=b=c", "d.1-x=e"))) == {"a": "b=c", "d.1-x": "e"}


@pytest.mark.parametrize("changes", [{"samples": 0}, {"chunk": 0}, {"judge": JudgeConfig(noise=0.9)}])
def test_settings_that_make_no_sense_are_refused(config, changes):
    with pytest.raises(ConfigError):
        check(replace(config, **changes))


def seen(name: str, gold: dict[str, list[float]], wins: dict[str, list[float]] | None = None) -> Seen:
    answers = {
        key: Answers(
            key,
            ({"role": "user", "content": key},),
            tuple({"response": "r", "n_tokens": 2, "finish_reason": "stop"} for _ in own),
        )
        for key, own in gold.items()
    }
    return Seen(name, answers, gold, wins or {key: [0.5] * len(own) for key, own in gold.items()}, {})


def test_unreadable_verdicts_are_left_out_and_counted():
    nan = math.nan
    first = seen("first", {"a": [0.0, nan], "b": [0.5, 0.5], "c": [0.1, 0.1]})
    other = seen("other", {"a": [1.0, 0.0], "b": [1.0, nan], "d": [0.0, 0.0], "c": [nan, nan]})
    assert common_prompts([first, other]) == ["a", "b"]
    results, sections = summarise([first, other], 1, 0)
    assert results["first_gold"] == 0.25 and results["other_gold"] == 0.75
    assert results["other_difference"] == 0.5  # of 0.5 - 0 and 1 - 0.5
    table = sections[0]
    assert isinstance(table, Table) and "left out: 4" in table.note
    assert table.rows[1][2] == "0.5000 (0.5000 to 0.5000)"


def test_one_prompt_has_no_interval():
    results, _ = summarise([seen("first", {"a": [0.5]})], 0, 0)
    assert results["first_gold"] == 0.5 and "first_gold_low" not in results


def test_no_common_prompt_is_an_error():
    with pytest.raises(DataError, match="could read no prompt"):
        common_prompts([seen("a", {"x": [0.1]}), seen("b", {"y": [0.1]})])


def test_scores_of_responses_that_were_not_judged_are_left_out(config, tmp_path):
    run(replace(config, policies=("base=tiny",), judged=2, reward=write_reward_model(tmp_path / "rm")))
    policy = read_policy(tmp_path / "run" / "policies" / "base", 2)
    assert {len(own) for own in policy.proxy.values()} == {len(own) for own in policy.gold.values()} == {2}
    assert {len(each.rows) for each in policy.answers.values()} == {3}
