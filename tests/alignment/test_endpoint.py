"""The client against servers that are well, busy, broken, silent, senseless or absent."""

import asyncio
import json
import logging
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_server import Answer, Body, FakeServer, chat

from postgrad.alignment import endpoint as module
from postgrad.alignment.endpoint import Endpoint, EndpointConfig, cache_folder, check_endpoint
from postgrad.alignment.exchange import (
    Chat,
    retry_delay,
)
from postgrad.core.runtime import stop_on_signals, stop_requested
from postgrad.errors import ConfigError, EndpointError, Interrupted

KEY = "sk-test-0123456789abcdef"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry at once; the pauses have tests of their own."""
    monkeypatch.setattr(module, "retry_delay", lambda trouble, attempt, jitter: 0.0)


def settings(server: FakeServer, cache: Path, **changes: object) -> EndpointConfig:
    return replace(
        EndpointConfig(base_url=server.url, model="judge-1", cache=str(cache), max_retries=2, timeout_s=5.0),
        **changes,
    )


def question(text: str = "hello") -> Chat:
    return Chat(({"role": "user", "content": text},), max_tokens=50)


def echo(body: Body, number: int) -> Answer:
    return chat(body["messages"][0]["content"].upper())


def test_replies_come_in_order_and_equal_requests_are_sent_once(tmp_path: Path) -> None:
    with FakeServer(echo) as server:
        client = Endpoint(settings(server, tmp_path, concurrency=3))
        texts = [f"q{i % 7}" for i in range(20)]
        assert [reply.text for reply in client.ask([question(t) for t in texts])] == [t.upper() for t in texts]
        assert len(server.requests) == 7 and client.ledger.requests == 7
        assert server.requests[0]["model"] == "judge-1" and server.requests[0]["max_tokens"] == 50
        assert server.keys[0] == ""


def test_at_most_so_many_requests_at_a_time(tmp_path: Path) -> None:
    with FakeServer(lambda body, number: replace(echo(body, number), wait_s=0.05)) as server:
        Endpoint(settings(server, tmp_path, concurrency=4)).ask([question(f"{i}") for i in range(16)])
        assert server.most == 4


def test_what_was_paid_is_not_paid_again(tmp_path: Path) -> None:
    with FakeServer(echo) as server:
        config = settings(server, tmp_path, price_in=1000.0, price_out=10000.0)
        first = Endpoint(config)
        replies = first.ask([question("a"), question("b")])
        # two replies of 100 tokens in at 1000 a million and 10 out at 10000 a million: 2 * (0.1 + 0.1)
        assert first.ledger.cost == pytest.approx(0.4) and first.ledger.paid_now == pytest.approx(0.4)
        again = Endpoint(config)
        assert again.ask([question("b"), question("a")]) == replies[::-1]
        assert len(server.requests) == 2
        assert again.ledger.cost == pytest.approx(0.4) and again.ledger.paid_now == 0
        other = Endpoint(replace(config, model="judge-2"))
        other.ask([question("a")])
        assert len(server.requests) == 3, "another model is another question"


def test_a_damaged_cache_file_is_asked_for_again(tmp_path: Path) -> None:
    with FakeServer(echo) as server:
        Endpoint(settings(server, tmp_path)).ask([question()])
        (file,) = tmp_path.rglob("*.json")
        file.write_text(file.read_text()[:20])
        client = Endpoint(settings(server, tmp_path))
        assert client.ask([question()])[0].text == "HELLO"
        assert client.ledger.damaged == 1 and json.loads(file.read_text())["text"] == "HELLO"


@pytest.mark.parametrize("bad", [Answer(429), Answer(503), Answer(500), Answer(408)])
def test_a_busy_server_is_asked_again(tmp_path: Path, bad: Answer) -> None:
    with FakeServer(lambda body, number: bad if number < 2 else echo(body, number)) as server:
        client = Endpoint(settings(server, tmp_path))
        assert client.ask([question()])[0].text == "HELLO"
        assert client.ledger.retries == 2


def test_retry_after_is_honoured_by_all_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "retry_delay", retry_delay)
    times: list[float] = []

    def busy_once(body: Body, number: int) -> Answer:
        times.append(time.monotonic())
        return Answer(429, headers={"Retry-After": "0.6"}) if number == 0 else echo(body, number)

    with FakeServer(busy_once) as server:
        Endpoint(settings(server, tmp_path, concurrency=1)).ask([question("a"), question("b")])
    assert times[1] - times[0] >= 0.6


def test_a_server_broken_for_ever_is_named_with_what_to_do(tmp_path: Path) -> None:
    with FakeServer(lambda body, number: Answer(500, b"out of memory")) as server:
        with pytest.raises(EndpointError, match=r"/v1/chat/completions.*judge-1.*500 after 3 attempts.*out of m"):
            Endpoint(settings(server, tmp_path)).ask([question()])
        assert len(server.requests) == 3


def test_what_was_paid_before_the_failure_is_kept(tmp_path: Path) -> None:
    def fail_late(body: Body, number: int) -> Answer:
        return Answer(500) if body["messages"][0]["content"] == "q5" else echo(body, number)

    with FakeServer(fail_late) as server:
        config = settings(server, tmp_path, concurrency=1)
        with pytest.raises(EndpointError):
            Endpoint(config).ask([question(f"q{i}") for i in range(9)])
        assert len(list(tmp_path.rglob("*.json"))) == 5
        client = Endpoint(config)
        client.ask([question(f"q{i}") for i in range(5)])
        assert client.ledger.requests == 0 and client.ledger.cached == 5


def test_a_server_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    with FakeServer(lambda body, number: Answer(wait_s=30)) as server:
        began = time.monotonic()
        with pytest.raises(EndpointError, match=r"no reply after 2 attempts.*0\.2 s"):
            Endpoint(settings(server, tmp_path, timeout_s=0.2, max_retries=1)).ask([question()])
        assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "content",
    [b"<html>busy</html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}', b"[1]", b""],
)
def test_replies_that_are_no_completion_are_counted_and_reported(tmp_path: Path, content: bytes) -> None:
    with FakeServer(lambda body, number: Answer(content=content)) as server:
        client = Endpoint(settings(server, tmp_path))
        with pytest.raises(EndpointError, match="no chat completion after 3 attempts"):
            client.ask([question()])
        assert client.ledger.nonsense == 3
    assert not list(tmp_path.rglob("*.json"))


def test_an_absent_server_is_reported_within_seconds(tmp_path: Path) -> None:
    with FakeServer(echo) as server:
        config = settings(server, tmp_path, max_retries=50)
    with pytest.raises(EndpointError, match="no connection after 2 attempts"):
        Endpoint(config).ask([question(f"{i}") for i in range(20)])


def test_a_refused_request_is_a_hole_and_many_are_an_error(tmp_path: Path) -> None:
    def strict(body: Body, number: int) -> Answer:
        text = body["messages"][0]["content"]
        return Answer(400, b"context is 4096 tokens") if text.startswith("long") else echo(body, number)

    with FakeServer(strict) as server:
        client = Endpoint(settings(server, tmp_path, concurrency=1))
        replies = client.ask([question("a"), question("long"), question("b")])
        assert [reply.problem[:10] for reply in replies] == ["", "status 400", ""]
        assert client.ledger.refused == 1 and client.ledger.requests == 2
        with pytest.raises(EndpointError, match="context is 4096 tokens"):
            Endpoint(settings(server, tmp_path)).ask([question(f"long{i}") for i in range(5)])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(401, b"bad key sk-te**cdef"), "environment variable JUDGE_KEY"),
        (Answer(404, b"no such model"), "server has this model"),
        (Answer(402), "top up"),
        (Answer(429, b'{"error": {"code": "insufficient_quota"}}'), "top up"),
        (Answer(429, headers={"Retry-After": "86400"}), "86400 s of quiet"),
        (Answer(302, headers={"Location": "http://elsewhere/"}), "serves chat completions"),
    ],
)
def test_what_cannot_mend_itself_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer, words: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with FakeServer(lambda body, number: answer) as server:
        with pytest.raises(EndpointError, match=words) as caught:
            Endpoint(settings(server, tmp_path, key_env="JUDGE_KEY")).ask([question()])
        assert len(server.requests) == 1
        assert "cdef" not in str(caught.value)


def test_the_key_goes_into_the_header_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
    caplog.set_level(logging.DEBUG)

    def gossip(body: Body, number: int) -> Answer:
        return Answer(500, f"Authorization: Bearer {KEY}".encode()) if number < 4 else echo(body, number)

    with FakeServer(gossip) as server:
        client = Endpoint(settings(server, tmp_path, key_env="JUDGE_KEY"))
        with pytest.raises(EndpointError, match=r"\[key\]") as caught:
            client.ask([question()])
        client = Endpoint(settings(server, tmp_path, key_env="JUDGE_KEY"))
        client.ask([question()])
        assert set(server.keys) == {f"Bearer {KEY}"}
    written = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    for text in (str(caught.value), caplog.text, written, repr(client.config), repr(vars(client.ledger))):
        assert KEY not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key_env": KEY}, "NAME of an environment variable"),
        ({"key_env": "NOT_SET_ANYWHERE"}, "not set"),
        ({"base_url": f"https://user:{KEY}@host/v1"}, "environment variable"),
        ({"base_url": f"https://host/v1?key={KEY}"}, "environment variable"),
        ({"base_url": "host/v1"}, "expected http"),
        ({"base_url": "http://[::1/v1"}, "expected http"),
        ({"model": ""}, "model is empty"),
        ({"concurrency": 0}, "at least 1"),
        ({"timeout_s": 0.0}, "more than 0"),
        ({"budget": 5.0}, "price_in"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check_endpoint(replace(EndpointConfig(model="m"), **changes))
    assert KEY not in str(caught.value)


def test_the_budget_is_a_ceiling_and_all_that_is_paid_is_kept(tmp_path: Path) -> None:
    with FakeServer(echo) as server:
        # a reply costs 0.1 + 0.1; the next may cost up to (1 // 3 + 32) * 0.001 + 50 * 0.01 = 0.532
        config = settings(server, tmp_path, price_in=1000.0, price_out=10000.0, budget=1.5, concurrency=4)
        client = Endpoint(config)
        with pytest.raises(EndpointError, match=r"budget of 1\.5 ends here: 1 is spent.*0\.532"):
            client.ask([question(f"{i}") for i in range(30)])
        assert client.ledger.cost <= 1.5 and len(server.requests) == 5
        assert len(list(tmp_path.rglob("*.json"))) == 5
        with pytest.raises(EndpointError, match="budget"):
            Endpoint(config).ask([question(f"{i}") for i in range(30)])
        assert len(server.requests) == 5, "the same budget buys nothing more"
        Endpoint(replace(config, budget=10.0)).ask([question(f"{i}") for i in range(30)])
        assert len(server.requests) == 30


def test_an_estimate_asks_nothing_and_knows_what_is_paid(tmp_path: Path) -> None:
    with FakeServer(echo) as server:
        client = Endpoint(settings(server, tmp_path, price_in=1.0, price_out=2.0))
        client.ask([question("a" * 400)])
        estimate = client.estimate([question("a" * 400), question("b" * 400), question("b" * 400)])
        assert len(server.requests) == 1
    assert (estimate["requests"], estimate["already paid"]) == (2, 1)
    assert estimate["tokens in (estimate)"] == 104 and estimate["tokens out (at most)"] == 50
    assert estimate["cost (at most)"] == pytest.approx((104 * 1 + 50 * 2) / 1e6)


def test_replies_without_token_counts_are_estimated_and_counted(tmp_path: Path) -> None:
    with FakeServer(lambda body, number: chat("x" * 40, usage=False)) as server:
        client = Endpoint(settings(server, tmp_path))
        reply = client.ask([question("a" * 400)])[0]
    assert (reply.tokens_in, reply.tokens_out, client.ledger.estimated) == (104, 11, 1)


def test_a_stop_signal_keeps_what_is_in_flight(tmp_path: Path) -> None:
    def slow(body: Body, number: int) -> Answer:
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return replace(echo(body, number), wait_s=0.05)

    with FakeServer(slow) as server:
        config = settings(server, tmp_path, concurrency=2)
        with pytest.raises(Interrupted, match="Replies paid for"), stop_on_signals():
            Endpoint(config, stop_requested).ask([question(f"{i}") for i in range(50)])
        num_asked = len(server.requests)
        assert num_asked <= 6 and len(list(tmp_path.rglob("*.json"))) == num_asked
        Endpoint(config).ask([question(f"{i}") for i in range(50)])
        assert len(server.requests) == 50


def test_asking_works_within_a_running_loop(tmp_path: Path) -> None:
    async def notebook(client: Endpoint) -> str:
        return client.ask([question()])[0].text

    with FakeServer(echo) as server:
        assert asyncio.run(notebook(Endpoint(settings(server, tmp_path)))) == "HELLO"


def test_two_processes_may_share_a_cache(tmp_path: Path) -> None:
    with FakeServer(echo) as server:
        clients = [Endpoint(settings(server, tmp_path)) for _ in range(4)]
        chats = [question(f"{i}") for i in range(10)]
        threads = [threading.Thread(target=client.ask, args=(chats,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {json.loads(file.read_text())["text"] for file in tmp_path.rglob("*.json")} == {str(i) for i in range(10)}


def test_the_cache_lies_outside_run_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(EndpointConfig()) == Path("/somewhere/postgrad/replies")
    assert cache_folder(EndpointConfig(cache="here")) == Path("here")


def test_settings_some_models_refuse_can_be_left_out(tmp_path: Path) -> None:
    with FakeServer(echo) as server:
        config = settings(server, tmp_path, max_tokens_key="max_completion_tokens")
        Endpoint(config).ask([Chat(({"role": "user", "content": "x"},), max_tokens=9, temperature=-1.0)])
    assert server.requests[0]["max_completion_tokens"] == 9
    assert not {"temperature", "max_tokens", "logprobs"} & set(server.requests[0])
