"""Sampling a set: its stores, its seeds, what is dropped, and a run that is stopped."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_stages import MODEL, contents, runtime, write_prompts, write_reward_model

from postgrad.alignment.endpoint import EndpointConfig
from postgrad.alignment.responses import read_answers, read_counts
from postgrad.alignment.sample import SampleConfig, cache_gib, check, effective_n, histogram, plan, run
from postgrad.core.data import load_prompts, load_sets
from postgrad.core.runtime import progress
from postgrad.core.store import read_store
from postgrad.errors import ArtefactError, ConfigError


@pytest.fixture
def config(tmp_path: Path) -> SampleConfig:
    data = write_prompts(tmp_path / "prompts.jsonl", 7)
    return SampleConfig(n=3, max_new_tokens=6, chunk=2, model=MODEL, data=data, runtime=runtime(tmp_path / "run"))


def texts(folder: Path) -> dict[str, tuple[str, ...]]:
    return {each.id: each.texts for each in read_answers(folder / "responses")}


def test_every_prompt_gets_n_responses(config, tmp_path):
    report = run(config)
    prompts = {prompt.id: prompt.messages for prompt in load_prompts(config.data).items}
    answers = read_answers(tmp_path / "run" / "responses")
    assert {each.id: each.messages for each in answers} == prompts
    for each in answers:
        assert [row["k"] for row in each.rows] == [0, 1, 2]
        assert len({row["seed"] for row in each.rows}) == 3
        for row in each.rows:
            assert row["n_tokens"] == len(row["token_ids"]) <= 6 and row["logprob_sum"] < 0
            assert row["finish_reason"] in ("stop", "length")
    assert report.results["responses"] == 21 and report.results["prompts"] == 7
    assert len({row["policy_hash"] for each in answers for row in each.rows}) == 1


def test_a_response_does_not_depend_on_chunk_order_or_number(config, tmp_path):
    run(config)
    run(replace(config, chunk=7, runtime=runtime(tmp_path / "one")))
    assert texts(tmp_path / "one") == texts(tmp_path / "run")
    run(replace(config, n=2, data=replace(config.data, limit=4), runtime=runtime(tmp_path / "few")))
    few, all_of_them = texts(tmp_path / "few"), texts(tmp_path / "run")
    assert len(few) == 4 and all(all_of_them[name][:2] == own for name, own in few.items())
    run(replace(config, runtime=runtime(tmp_path / "other", seed=1)))
    assert texts(tmp_path / "other") != texts(tmp_path / "run")


def test_scores_are_written_beside_and_load_sets_joins_them(config, tmp_path):
    config = replace(config, reward=write_reward_model(tmp_path / "rm"))
    report = run(config)
    sets = load_sets(replace(config.data, path=str(tmp_path / "run"))).items
    assert [len(item.scores) for item in sets] == [3] * 7
    assert report.results["mean_best_score"] == pytest.approx(sum(max(item.scores) for item in sets) / 7)
    assert {section.title for section in report.sections} >= {"Scores", "Length", "Responses", "Speed"}


def test_an_earlier_run_is_scored_again_without_drawing(config, tmp_path):
    run(replace(config, reward=write_reward_model(tmp_path / "rm")))
    again = replace(
        config, responses=str(tmp_path / "run"), reward=write_reward_model(tmp_path / "rm2", seed=1),
        runtime=runtime(tmp_path / "again"),
    )  # fmt: skip
    run(again)
    assert texts(tmp_path / "again") == texts(tmp_path / "run")
    old, new = (read_store(tmp_path / name / "scores") for name in ("run", "again"))
    assert [row["k"] for row in old] == [row["k"] for row in new]
    assert {row["rm_hash"] for row in old} != {row["rm_hash"] for row in new}


def test_a_run_killed_after_any_chunk_ends_in_the_same_bytes(config, tmp_path, monkeypatch):
    config = replace(config, reward=write_reward_model(tmp_path / "rm"))
    run(config)
    stopped = replace(config, runtime=runtime(tmp_path / "stopped"))
    advance = progress.advance

    def die(self: progress, n: int = 1, note: str = "") -> None:
        advance(self, n, note)
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(progress, "advance", die)
            run(stopped)
    run(stopped)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "run")


def test_a_policy_that_changed_meanwhile_is_noticed(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(progress, "advance", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(config)
    monkeypatch.setattr("postgrad.alignment.responses.model_hash", lambda model: "another")
    with pytest.raises(ArtefactError, match="begun with another policy"):
        run(config)


def test_prompts_without_room_are_dropped_and_counted(config, tmp_path):
    short = replace(config, data=replace(config.data, max_length=25))  # prompts have 12 to 30 tokens
    run(short)
    counts = read_counts(tmp_path / "run" / "responses")
    assert counts == {"prompts": 4, "responses": 12, "dropped: no room for a response": 3}
    with pytest.raises(ConfigError, match=r"do not fit in 16.*Set max_new_tokens to 4 or less"):
        run(replace(config, data=replace(config.data, max_length=16), runtime=runtime(tmp_path / "none")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "at least 1 response"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"top_p": 0.0}, "top_p above 0"),
        ({"temperature": 0.0}, "all 3 responses to a prompt are equal"),
        ({"chunk": 0}, "chunk"),
        ({"responses": "nowhere"}, "reward names no reward model"),
        ({"responses": "nowhere", "reward": "x"}, "no sealed store"),
        ({"backend": "endpoint"}, "endpoint.model is empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        check(replace(config, **changes))


def test_plan_counts_without_drawing(config, tmp_path):
    found = plan(config)
    assert found["responses"] == 21 and found["tokens drawn, at most"] == 126
    assert not (tmp_path / "run").exists()
    # 2 (keys, values) * 1 layer * width 32 * 4 bytes * 2 prompts * 3 responses * 160 tokens
    assert cache_gib(config) * 2**30 == 2 * 32 * 4 * 2 * 3 * 160


def test_effective_n_and_histogram():
    assert effective_n(["a", "b", "a"]) == 2
    whole = histogram("x", [1, 1, 2, 4])
    assert whole.x == (1.0, 2.0, 3.0, 4.0) and whole.y == (0.5, 0.25, 0.0, 0.25)
    fine = histogram("x", [0.0, 0.5, 1.0], num_bins=2)
    assert fine.x == pytest.approx((0.25, 0.75)) and sum(fine.y) == 1
    assert histogram("x", [0.5]).y[0] == 1.0


class Parrot(BaseHTTPRequestHandler):
    """Answers with the seed it was sent; refuses to repeat."""

    asked: list[dict[str, object]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        refused = "times" in body["messages"][-1]["content"]
        choice = {"message": {"content": f"said {body['seed']}"}, "finish_reason": "length"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        text = json.dumps({"error": "too long"} if refused else {"choices": [choice], "usage": usage}).encode()
        self.send_response(400 if refused else 200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served() -> Iterator[str]:
    Parrot.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Parrot)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_answers_every_number_under_its_own_seed(config, tmp_path):
    with served() as url:
        server = EndpointConfig(base_url=url, model="parrot", cache=str(tmp_path / "cache"))
        report = run(replace(config, backend="endpoint", endpoint=server, top_p=0.9))
    answers = read_answers(tmp_path / "run" / "responses")
    assert report.results["effective_n"] == 3 and report.results["cut_at_max_new_tokens"] == 1
    for each in answers:
        assert "times" not in each.messages[-1]["content"]
        assert [row["response"] for row in each.rows] == [f"said {row['seed'] % 2**31}" for row in each.rows]
    counts = read_counts(tmp_path / "run" / "responses")
    assert counts == {"prompts": 5, "responses": 15, "dropped: refused by the server": 2}
    assert {(body["top_p"], body["temperature"], body["max_tokens"]) for body in Parrot.asked} == {(0.9, 1.0, 6)}
