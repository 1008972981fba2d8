"""Requests, replies and failures as data: limits, pauses, statuses, and whatever bytes a server may send."""

from dataclasses import replace
from datetime import UTC, datetime

from fake_server import chat
from hypothesis import given
from hypothesis import strategies as st

from postgrad.alignment.exchange import TokenBucket, Trouble, classify, parse_reply, retry_after, retry_delay


@given(per_minute=st.floats(0.5, 6000), gaps=st.lists(st.floats(0, 30), max_size=200))
def test_no_minute_holds_more_requests_than_allowed(per_minute: float, gaps: list[float]) -> None:
    bucket, now, sent = TokenBucket(per_minute), 1000.0, []
    for gap in gaps:
        now += gap
        sent.append(now + bucket.wait(now))
    for start in sent:
        in_minute = sum(start <= at < start + 60 - 1e-6 for at in sent)
        assert in_minute <= per_minute + max(1.0, per_minute / 60) + 1


def test_without_a_limit_nothing_waits() -> None:
    assert [TokenBucket(0.0).wait(5.0) for _ in range(3)] == [0.0, 0.0, 0.0]


def test_retry_after_reads_seconds_and_dates() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert retry_after("7", now) == 7.0
    assert retry_after("Thu, 01 Jan 2026 00:00:30 GMT", now) == 30.0
    assert retry_after("Wed, 31 Dec 2025 00:00:00 GMT", now) == 0.0
    assert [retry_after(text, now) for text in ("", "soon", "-3", "nan")] == [0.0] * 4


def test_pauses_grow_are_spread_and_end() -> None:
    trouble = Trouble("status 500", "", retry=True)
    assert [retry_delay(trouble, attempt, 0.5) for attempt in (0, 1, 2, 20)] == [0.5, 1.0, 2.0, 60.0]
    assert retry_delay(trouble, 2, 0.0) == 1.0
    assert retry_delay(replace(trouble, wait_s=20.0), 0, 0.5) == 21.0


def test_every_status_is_understood() -> None:
    retried = {status for status in range(300, 600) if classify(status, {}, "").retry}
    assert retried == {408, 425, 429, *range(500, 600)}


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_a_reply_or_none(content: bytes) -> None:
    assert parse_reply(content, (), 0.1) is None


def test_odd_but_valid_replies_are_read() -> None:
    reply = parse_reply(chat(None).content, (), 0.1)
    assert reply is not None and reply.text == ""
    half = chat("x").content.replace(b'"x"', b'"\\ud83d"')
    reply = parse_reply(half, (), 0.1)
    assert reply is not None and reply.text.encode()
    letters = parse_reply(chat("m", logprobs={"m": -0.1, "M": float("-inf"), "The": 0.5}).content, (), 0.1)
    assert letters is not None and letters.first_token == {"m": -0.1, "The": 0.0}
