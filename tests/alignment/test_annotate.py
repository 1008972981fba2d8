"""Annotating: tie policies by hand, both orders, resuming to the same bytes, and judges that are worth nothing."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from fake_server import Answer, Body, FakeServer, answers_in, chat

from postgrad.alignment import annotate, judge
from postgrad.alignment.annotate import SCHEMA, AnnotateConfig, settle
from postgrad.alignment.endpoint import EndpointConfig
from postgrad.alignment.judge import Comparison, JudgeConfig, Opinion, RuleJudge, Verdict
from postgrad.alignment.tasks import score
from postgrad.core.config import DataConfig, ModelConfig, RuntimeConfig, dump_config, load_config
from postgrad.core.data import load_pairs
from postgrad.core.models import load_reward_model, save_model
from postgrad.core.report import Note, Table
from postgrad.core.runtime import Job
from postgrad.core.store import read_manifest, read_store
from postgrad.errors import ArtefactError, ConfigError, EndpointError, GateError

WORDS = ["lomak", "pifas", "rudol", "semit", "tavon", "bikel", "gonur", "hapim", "dorek", "nusil"]


def write_sets(folder: Path, num: int = 20, turns: int = 1) -> Path:
    """Write prompts of the built-in task with four responses, one, two, three, four letters of five right."""
    lines = []
    for i in range(num):
        word = WORDS[i % 10] + "abcdefghij"[i // 10] * (i >= 10)
        answers = [word[:k] + "x" * (len(word) - k) for k in (1, 2, 3, 4)]
        prompt = [{"role": "user", "content": f"copy {word}"}]
        if i % turns:
            prompt += [{"role": "assistant", "content": "hm"}, {"role": "user", "content": "same again"}]
        lines.append(json.dumps({"prompt": prompt, "responses": answers}))
    path = folder / "sets.jsonl"
    path.write_text("\n".join(lines))
    return path


def settings(folder: Path, data: Path, **changes: object) -> AnnotateConfig:
    config = AnnotateConfig(
        data=DataConfig(path=str(data)), runtime=RuntimeConfig(folder=str(folder), quiet=True, device="cpu")
    )
    return replace(config, **changes)


def served(server: FakeServer, cache: Path, **changes: object) -> JudgeConfig:
    place = EndpointConfig(
        base_url=server.url, model="m", cache=str(cache), price_in=1e4, price_out=1e5, max_retries=0, concurrency=2
    )
    return JudgeConfig(kind="endpoint", endpoint=replace(place, **changes))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in ("pairs", "dropped")
        for path in sorted((folder / name).iterdir())
    }


AGREE = Opinion("a", 1.0, 3.0, "agree", 0.5)
PARTLY = Opinion("b", 0.25, -1.5, "partly", 0.75)
CONTRADICT = Opinion("tie", 0.5, 0.5, "contradict", 1.0)
TIE = Opinion("tie", 0.5, 0.0, "agree", 0.5)
UNREAD = Opinion("tie", 0.5, 0.0, "unreadable", math.nan)


@pytest.mark.parametrize(
    ("tie", "opinion", "expected"),
    [
        ("drop", AGREE, ("a", 1.0, 3.0, "")),
        ("drop", PARTLY, ("b", 0.25, -1.5, "")),
        ("drop", CONTRADICT, ("tie", 0.5, 0.5, "orders contradict")),
        ("drop", TIE, ("tie", 0.5, 0.0, "both orders see a tie")),
        ("half", PARTLY, ("b", 0.0, -1.5, "")),
        ("half", CONTRADICT, ("tie", 0.5, 0.5, "")),
        ("soft", PARTLY, ("b", 0.25, -1.5, "")),
        ("soft", TIE, ("tie", 0.5, 0.0, "")),
        ("margin", CONTRADICT, ("a", 1.0, 0.5, "")),
        ("margin", PARTLY, ("b", 0.0, -1.5, "")),
        ("margin", TIE, ("tie", 0.5, 0.0, "no score gap")),
        *((tie, UNREAD, ("tie", 0.5, 0.0, "unreadable")) for tie in ("drop", "half", "soft", "margin")),
    ],
)
def test_tie_policies_by_hand(tie: annotate.TiePolicy, opinion: Opinion, expected: tuple[object, ...]) -> None:
    assert tuple(settle(opinion, tie)) == expected


# ---- runs with the rule judge


def test_the_rule_judge_orders_every_pair_rightly(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", write_sets(tmp_path, turns=2), pairing="all", shard=8)
    report = annotate.run(config)
    rows = read_store(tmp_path / "run" / "pairs")
    assert len(rows) == 20 * 6 and list(rows[0]) == SCHEMA.names
    for row in rows:
        prompt = json.loads(row["prompt_messages"])
        a, b = score(prompt, row["response_a"]), score(prompt, row["response_b"])
        assert row["label"] == ("a" if a > b else "b") and row["p_a"] == float(a > b)
        assert row["score_ab"] == row["score_ba"] == [a, b] and row["margin"] == pytest.approx(a - b)
    assert report.results["consistency"] == 1 and report.results["p_first"] == 0.5
    assert report.results["judged"] == report.results["kept"] == 120 and report.results["cost"] == 0
    manifest = read_manifest(tmp_path / "run" / "pairs")
    assert manifest["counts"]["pairs"] == 120 and len(manifest["shards"]) == 3
    by_turn = next(s for s in report.sections if isinstance(s, Table) and s.title == "The judge")
    assert [row[:3] for row in by_turn.rows] == [("all", 120, 20), ("turn 1", 60, 10), ("turn 2", 60, 10)]
    assert annotate.run(config).results == report.results, "a finished run is not done again"


def test_the_pairs_are_what_a_reward_model_reads(tmp_path: Path) -> None:
    data = write_sets(tmp_path)
    annotate.run(settings(tmp_path / "run", data, pairs_per_prompt=2))
    pairs = load_pairs(DataConfig(path=str(tmp_path / "run"))).items
    assert len(pairs) == 40
    for pair in pairs:
        assert score(pair.prompt, pair.chosen) > score(pair.prompt, pair.rejected)
        assert pair.p == 1 and pair.margin > 0
    again = settings(tmp_path / "again", tmp_path / "run")
    assert annotate.run(again).results["judged"] == 40, "judged pairs can be judged anew"


def test_without_data_the_built_in_task_is_judged(tmp_path: Path) -> None:
    config = replace(settings(tmp_path / "run", tmp_path), data=DataConfig(limit=30))
    results = annotate.run(config).results
    assert results["judged"] == 30 and 15 < int(results["kept"]) <= 30


def test_a_reward_model_annotates_without_a_liking_for_positions(tmp_path: Path) -> None:
    model_config, device = ModelConfig(tiny_width=16, tiny_layers=1), torch.device("cpu")
    job = Job("reward", tmp_path, 3, device, torch.float32, rank=0, world=1, quiet=True)
    save_model(*load_reward_model(model_config, job), tmp_path / "model")
    judged_by = JudgeConfig(kind="reward", reward=str(tmp_path / "model"))
    report = annotate.run(settings(tmp_path / "run", write_sets(tmp_path), judge=judged_by))
    rows = read_store(tmp_path / "run" / "pairs")
    assert report.results["consistency"] == 1 and report.results["p_first"] == pytest.approx(0.5)
    for row in rows:
        assert row["p_a"] == pytest.approx(1 / (1 + math.exp(-row["margin"]))) and row["judge"].startswith("reward:")


def test_asking_twice_cleans_a_noisy_judge(tmp_path: Path) -> None:
    noisy = JudgeConfig(noise=0.2)
    for name in ("drop", "soft"):
        config = settings(tmp_path / name, write_sets(tmp_path, 60), pairing="all", tie=name, judge=noisy)
        report = annotate.run(config)
        # both orders agree when both are right or both wrong: 0.8^2 + 0.2^2
        assert report.results["consistency"] == pytest.approx(0.68, abs=0.06)
    kept, every = (read_store(tmp_path / name / "pairs") for name in ("drop", "soft"))
    dropped = read_store(tmp_path / "drop" / "dropped")
    assert len(kept) + len(dropped) == len(every) == 360
    assert {row["reason"] for row in dropped} == {"orders contradict"}
    wrong = sum(
        (row["p_a"] > 0.5) != (len(row["response_a"].rstrip("x")) > len(row["response_b"].rstrip("x"))) for row in kept
    ) / len(kept)
    # wrong in both orders, given that they agree: 0.04 / 0.68
    assert wrong == pytest.approx(0.059, abs=0.035)


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_sets(tmp_path)
    config = settings(tmp_path / "straight", data, shard=3, judge=JudgeConfig(noise=0.3), pairing="all")
    straight = annotate.run(config)
    calls = 0
    compare = RuleJudge.compare

    def dying(self: RuleJudge, comparisons: Sequence[Comparison]) -> list[Verdict]:
        nonlocal calls
        calls += 1
        if calls in (3, 5):
            raise Killed
        return compare(self, comparisons)

    monkeypatch.setattr(RuleJudge, "compare", dying)
    config = replace(config, runtime=replace(config.runtime, folder=str(tmp_path / "broken")))
    for _ in range(2):
        with pytest.raises(Killed):
            annotate.run(config)
    (tmp_path / "broken" / "pairs" / "part-00001.parquet").unlink()  # killed between the two files of a shard
    report = annotate.run(config)
    assert files(tmp_path / "broken") == files(tmp_path / "straight")
    assert report.results == straight.results
    assert (tmp_path / "broken" / "result.json").read_bytes() == (tmp_path / "straight" / "result.json").read_bytes()


def test_shards_of_other_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path / "run", write_sets(tmp_path), shard=5)
    real = annotate.stop_requested
    answers = iter([False, True])
    monkeypatch.setattr(annotate, "stop_requested", lambda: next(answers))
    with pytest.raises(annotate.Interrupted):
        annotate.run(config)
    monkeypatch.setattr(annotate, "stop_requested", real)
    lines = (tmp_path / "sets.jsonl").read_text().splitlines()
    (tmp_path / "sets.jsonl").write_text("\n".join(lines[::-1]))
    with pytest.raises(ArtefactError, match="overwrite"):
        annotate.run(config)


# ---- runs with an endpoint


def fair(body: Body, number: int) -> Answer:
    """Score by right letters: those before the x."""
    points = [1 + len(answer.rstrip("x")) for answer in answers_in(body)]
    return chat(f"[[{points[0]}, {points[1]}]]")


def test_an_endpoint_annotates_and_its_costs_are_written_down(tmp_path: Path) -> None:
    with FakeServer(fair) as server:
        config = settings(tmp_path / "run", write_sets(tmp_path), shard=6, judge=served(server, tmp_path / "cache"))
        plan = annotate.plan(config)
        assert (plan["comparisons"], plan["requests"], plan["already paid"]) == (40, 40, 0)
        report = annotate.run(config)
        assert len(server.requests) == 40
        again = settings(tmp_path / "two", tmp_path / "sets.jsonl", shard=6, judge=config.judge)
        annotate.run(again)
        assert len(server.requests) == 40, "another run pays for nothing again"
        assert annotate.plan(again)["already paid"] == 40
    rows = read_store(tmp_path / "run" / "pairs")
    assert len(rows) == 20 and files(tmp_path / "two") == files(tmp_path / "run")
    # an order costs 100 tokens at 10^4 and 10 at 10^5 a million: 2; a pair has two
    assert all(row["cost"] == 4 and row["tokens_in"] == 200 and row["latency"] > 0 for row in rows)
    assert report.results["cost"] == 80 and rows[0]["judge"] == "m:scores" and rows[0]["raw_ab"].startswith("[[")
    assert any(section.title == "Requests and costs" for section in report.sections)


def test_a_judge_that_always_names_the_first_is_stopped_early(tmp_path: Path) -> None:
    with FakeServer(lambda body, number: chat("[[9, 2]]")) as server:
        data = write_sets(tmp_path, 100)
        config = settings(tmp_path / "run", data, shard=15, judge=served(server, tmp_path / "cache"))
        for _ in range(2):
            with pytest.raises(GateError, match=r"0% of 15 pairs.*first 100% of the preference.*min_consistency"):
                annotate.run(config)
            assert len(server.requests) == 30, "the next try finds the replies in the cache"


@pytest.mark.parametrize(
    ("text", "words"),
    [("Both are fine.", "unread|can be read.*'Both are fine"), ("[[5, 5]]", "nearly all answers for equal")],
)
def test_other_worthless_judges_are_stopped_too(tmp_path: Path, text: str, words: str) -> None:
    with FakeServer(lambda body, number: chat(text)) as server:
        config = settings(tmp_path / "run", write_sets(tmp_path, 90), judge=served(server, tmp_path / "cache"))
        config = replace(config, shard=80 if "5" in text else 15)
        with pytest.raises(GateError, match=words):
            annotate.run(config)
        assert len(server.requests) == 2 * config.shard


def test_some_nonsense_is_dropped_and_counted(tmp_path: Path) -> None:
    def moody(body: Body, number: int) -> Answer:
        return chat("No idea.") if "rudol" in body["messages"][1]["content"] else fair(body, number)

    with FakeServer(moody) as server:
        config = settings(tmp_path / "run", write_sets(tmp_path, 20), judge=served(server, tmp_path / "cache"))
        report = annotate.run(config)
    assert (report.results["judged"], report.results["kept"]) == (20, 18)
    dropped = read_store(tmp_path / "run" / "dropped")
    assert {(row["reason"], row["raw_ab"]) for row in dropped} == {("unreadable", "No idea.")}
    examples = next(s for s in report.sections if isinstance(s, Table) and s.title == "Examples")
    assert "No idea." in {row[-1] for row in examples.rows}


def test_a_spent_budget_keeps_all_and_a_higher_one_pays_the_rest(tmp_path: Path) -> None:
    with FakeServer(fair) as server:
        data = write_sets(tmp_path)
        # a reply costs 2; the next may cost 400 tokens at 10^5 a million = 40 and its question
        poor = settings(tmp_path / "poor", data, shard=4, judge=served(server, tmp_path / "cache", budget=100.0))
        for _ in range(2):
            with pytest.raises(EndpointError, match="budget of 100 ends here"):
                annotate.run(poor)
        paid = len(server.requests)
        assert 8 < paid < 40 and len(list((tmp_path / "cache").rglob("*.json"))) == paid
        assert list((tmp_path / "poor" / "pairs").glob("*.parquet"))
        rich = settings(tmp_path / "rich", data, shard=4, judge=served(server, tmp_path / "cache", budget=500.0))
        assert annotate.run(rich).results["kept"] == 20 and len(server.requests) == 40


def test_a_server_that_dies_leaves_finished_shards(tmp_path: Path) -> None:
    with FakeServer(lambda body, number: fair(body, number) if number < 20 else Answer(500)) as server:
        config = settings(tmp_path / "run", write_sets(tmp_path), shard=5, judge=served(server, tmp_path / "cache"))
        with pytest.raises(EndpointError, match="500"):
            annotate.run(config)
        assert len(list((tmp_path / "run" / "pairs").glob("*.parquet"))) == 2


def test_the_key_is_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-very-secret-0123"
    monkeypatch.setenv("JUDGE_KEY", key)
    with FakeServer(fair) as server:
        config = settings(
            tmp_path / "run", write_sets(tmp_path), judge=served(server, tmp_path / "cache", key_env="JUDGE_KEY")
        )
        annotate.run(config)
        assert set(server.keys) == {f"Bearer {key}"}
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path


def test_a_liking_for_the_second_place_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = Random(0)

    def leaning(self: RuleJudge, comparisons: Sequence[Comparison]) -> list[Verdict]:
        return [Verdict((0.4, 0.6), 0.4 + 0.05 * rng.random()) for _ in comparisons]

    monkeypatch.setattr(judge.RuleJudge, "compare", leaning)
    report = annotate.run(settings(tmp_path / "run", write_sets(tmp_path), tie="soft", min_consistency=0.0, shard=5))
    notes = {section.title: section for section in report.sections if isinstance(section, Note)}
    assert "second is preferred" in notes["The judge has a liking for a position"].text
    assert notes["The judge contradicts itself"].kind == "warning"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "", "judge": JudgeConfig(kind="endpoint", endpoint=EndpointConfig(model="m"))}, "data.path is empty"),
        ({"shard": 0}, "shard must be at least 1"),
        ({"min_consistency": 1.5}, "min_consistency"),
        ({"judge": JudgeConfig(kind="reward")}, "judge.reward"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        path = changes.pop("path", "x")
        annotate.check(replace(settings(tmp_path, tmp_path), data=DataConfig(path=str(path)), **changes))


def test_the_config_is_read_back_as_written(tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path / "x", judge=JudgeConfig(endpoint=EndpointConfig(model="m", budget=2.5)))
    (tmp_path / "c.toml").write_text(dump_config(config))
    assert load_config(AnnotateConfig, tmp_path / "c.toml") == config
