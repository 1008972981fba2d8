"""Ask any server that speaks the OpenAI chat protocol, and pay for every answer once.

Replies are kept on disk under the hash of their request, so a run that is stopped, killed or out of budget
continues without asking again. The API key is read from the environment variable that the config names; it
goes into the request's header and nowhere else.
"""

import asyncio
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import httpx

from postgrad.alignment.exchange import (
    Chat,
    Ledger,
    Reply,
    TokenBucket,
    Trouble,
    classify,
    parse_reply,
    retry_delay,
)
from postgrad.core.files import write_json
from postgrad.errors import ConfigError, EndpointError, Interrupted

Body = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A server with an OpenAI-compatible interface, its limits and its prices."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """Address up to and with the version, without /chat/completions."""
    model: str = ""
    """Name of the model on that server."""
    key_env: str = ""
    """Name of the environment variable that holds the API key; "" = the server needs none."""
    concurrency: int = 8
    """Requests in flight at a time."""
    requests_per_minute: float = 0.0
    """Highest rate of requests; 0 = no limit of ours."""
    timeout_s: float = 120.0
    """Longest wait for one reply, in seconds."""
    max_retries: int = 6
    """Further attempts after a timeout, a 429 or a 5xx, with growing pauses."""
    budget: float = 0.0
    """Most that all replies of this run may cost, in the currency of the prices; 0 = no ceiling."""
    price_in: float = 0.0
    """Price of a million tokens of the request."""
    price_out: float = 0.0
    """Price of a million tokens of the reply."""
    max_tokens_key: str = "max_tokens"
    """What the server calls the limit on the reply; newer OpenAI models say max_completion_tokens."""
    cache: str = ""
    """Folder of replies already paid for, shared by all runs; "" = postgrad/replies in the user's cache."""


LOWEST = {
    "concurrency": 1,
    "max_retries": 0,
    "requests_per_minute": 0,
    "budget": 0,
    "price_in": 0,
    "price_out": 0,
}


def check_endpoint(config: EndpointConfig, key: str = "endpoint") -> None:
    """Refuse settings that cannot work, or that would put a secret into a file.

    Raises:  ConfigError; it never repeats a value that may be a key.
    """
    try:
        url = urlsplit(config.base_url)
        secret, host = bool(url.username or url.password or url.query), url.hostname
    except ValueError as error:
        raise ConfigError(f"{key}.base_url: expected http(s)://host/v1; {error}.") from error
    if secret:
        raise ConfigError(
            f"{key}.base_url holds a user name, a password or a query. A key belongs into an environment "
            f"variable; name the variable in {key}.key_env."
        )
    if url.scheme not in ("http", "https") or not host:
        raise ConfigError(f"{key}.base_url: expected http(s)://host/v1, found {config.base_url!r}.")
    if not config.model:
        raise ConfigError(f"{key}.model is empty; name the model to ask at {config.base_url}.")
    if config.key_env and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", config.key_env):
        raise ConfigError(
            f"{key}.key_env: expected the NAME of an environment variable in capitals, such as "
            "OPENAI_API_KEY; found something else (not shown, it may be the key itself)."
        )
    secret_text = os.environ.get(config.key_env, "").strip() if config.key_env else "none needed"
    if not secret_text:
        raise ConfigError(f"{key}.key_env names {config.key_env}, which is not set; export it and run again.")
    if not (secret_text.isascii() and secret_text.isprintable()):
        raise ConfigError(f"{config.key_env} holds characters that no key has; export it anew.")
    for name, low in LOWEST.items():
        if vars(config)[name] < low:
            raise ConfigError(f"{key}.{name}: expected at least {low}, found {vars(config)[name]}.")
    if config.timeout_s <= 0:
        raise ConfigError(f"{key}.timeout_s: expected more than 0 seconds, found {config.timeout_s}.")
    if config.budget and not config.price_in + config.price_out:
        raise ConfigError(
            f"{key}.budget is {config.budget} but {key}.price_in and {key}.price_out are 0: nothing counts "
            "against it. Give the prices of a million tokens."
        )


def cache_folder(config: EndpointConfig) -> Path:
    """Return where replies are kept: outside every run folder, so that emptying one loses no money."""
    if config.cache:
        return Path(config.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "postgrad" / "replies"


class Endpoint:
    """A client of one model on one server, with a cache and a ledger.

    Args:    stop: asked between requests; when it says True nothing new is sent, what is in flight is kept,
             and `ask` raises Interrupted.
    """

    def __init__(self, config: EndpointConfig, stop: Callable[[], bool] = lambda: False) -> None:
        check_endpoint(config)
        self.config, self.ledger = config, Ledger()
        self.url = f"{config.base_url.rstrip('/')}/chat/completions"
        self.cache = cache_folder(config)
        self._key = os.environ[config.key_env].strip() if config.key_env else ""
        self._stop, self._jitter = stop, Random()
        self._bucket = TokenBucket(config.requests_per_minute)
        self._booked: set[str] = set()
        self._failure: EndpointError | None = None
        self._resume_at = 0.0  # the server asked for quiet until then

    def ask(self, chats: Sequence[Chat]) -> list[Reply]:
        """Return one reply a request, in order; equal requests are sent once.

        Raises:  EndpointError: the server failed for good or the budget is spent.   Interrupted: stopped by a
                 signal. Either way every reply that was paid for is in the cache.
        """
        bodies = {self._hash(chat): self._body(chat) for chat in chats}
        replies: dict[str, Reply] = {}
        for name in bodies:
            known = self._load(name)
            if known:
                replies[name] = known
                self.ledger.cached += name not in self._booked
                self._book(name, known)
        missing = {name: body for name, body in bodies.items() if name not in replies}
        if missing:
            self._failure = None
            _run(self._ask_all(missing, replies))
        return [replies[self._hash(chat)] for chat in chats]

    def estimate(self, chats: Sequence[Chat]) -> dict[str, str | int | float]:
        """Say what asking would take, without asking: four characters a token, replies at their limit."""
        unique = {self._hash(chat): chat for chat in chats}
        unpaid = [chat for name, chat in unique.items() if not self._path(name).exists()]
        tokens_in, tokens_out = sum(c.tokens_in for c in unpaid), sum(c.max_tokens for c in unpaid)
        return {
            "requests": len(unique),
            "already paid": len(unique) - len(unpaid),
            "tokens in (estimate)": tokens_in,
            "tokens out (at most)": tokens_out,
            "cost (at most)": self.cost(tokens_in, tokens_out),
            "budget": self.config.budget or "no ceiling",
        }

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Price so many tokens."""
        return (tokens_in * self.config.price_in + tokens_out * self.config.price_out) / 1e6

    def _body(self, chat: Chat) -> Body:
        body: Body = {"model": self.config.model, "messages": list(chat.messages)}
        body[self.config.max_tokens_key] = chat.max_tokens
        if chat.temperature >= 0:
            body["temperature"] = chat.temperature
        if chat.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": chat.top_logprobs}
        if chat.top_p < 1:
            body["top_p"] = chat.top_p
        if chat.seed >= 0:
            body["seed"] = chat.seed
        return body

    def _hash(self, chat: Chat) -> str:
        text = json.dumps([self.url, self._body(chat)], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _path(self, name: str) -> Path:
        return self.cache / name[:2] / f"{name}.json"

    def _load(self, name: str) -> Reply | None:
        try:
            return Reply(**json.loads(self._path(name).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            self.ledger.damaged += 1
            return None

    def _book(self, name: str, reply: Reply) -> None:
        """Count a reply, however often it is asked for again."""
        if name in self._booked:
            return
        self._booked.add(name)
        self.ledger.tokens_in += reply.tokens_in
        self.ledger.tokens_out += reply.tokens_out
        self.ledger.cost += self.cost(reply.tokens_in, reply.tokens_out)

    async def _ask_all(self, missing: dict[str, Body], replies: dict[str, Reply]) -> None:
        desk = _Desk(asyncio.Condition())
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        limits = httpx.Timeout(self.config.timeout_s, connect=min(10.0, self.config.timeout_s))
        async with httpx.AsyncClient(headers=headers, timeout=limits, trust_env=not local) as client:
            queue = iter(missing.items())
            count = min(self.config.concurrency, len(missing))
            await asyncio.gather(*(self._worker(client, queue, replies, desk) for _ in range(count)))
        if self._failure:
            raise self._failure
        if any(name not in replies for name in missing):
            raise Interrupted(f"Replies paid for are in {self.cache}.")

    async def _worker(
        self,
        client: httpx.AsyncClient,
        queue: Iterator[tuple[str, Body]],
        replies: dict[str, Reply],
        desk: "_Desk",
    ) -> None:
        for name, body in queue:
            reserve = self._reserve(body)
            if not await self._afford(reserve, desk):
                return
            try:
                reply = await self._exchange(client, body)
            except EndpointError as error:
                self._failure, reply = self._failure or error, None
            finally:
                await desk.release(reserve)
            if reply is None:
                return
            replies[name] = reply
            if reply.problem:
                continue
            self._book(name, reply)
            self.ledger.requests += 1
            self.ledger.paid_now += self.cost(reply.tokens_in, reply.tokens_out)
            write_json(self._path(name), asdict(reply))

    def _reserve(self, body: Body) -> float:
        characters = sum(len(message["content"]) for message in body["messages"])
        return self.cost(characters // 3 + 32, body[self.config.max_tokens_key])

    async def _afford(self, reserve: float, desk: "_Desk") -> bool:
        """Wait until the budget surely holds one more request; say no when it never will."""

        def fits() -> bool:
            budget = self.config.budget
            return not budget or self.ledger.cost + desk.reserved + reserve <= budget

        async with desk.changed:
            await desk.changed.wait_for(lambda: fits() or desk.in_flight == 0 or self._halted())
            if self._halted():
                return False
            if not fits():
                self._failure = EndpointError(
                    f"{self.url}: the budget of {self.config.budget:g} ends here: {self.ledger.cost:.6g} is "
                    f"spent and the next request may cost {reserve:.6g}. All replies paid for are in {self.cache}: "
                    "a run with a higher endpoint.budget and another runtime.folder pays none again."
                )
                return False
            desk.in_flight += 1
            desk.reserved += reserve
            return True

    async def _exchange(self, client: httpx.AsyncClient, body: Body) -> Reply | None:
        """Ask until there is a reply; None when the run was stopped meanwhile."""
        for attempt in range(self.config.max_retries + 1):
            now = time.monotonic()
            await self._pause(max(self._bucket.wait(now), self._resume_at - now))
            if self._halted():
                return None
            outcome = await self._once(client, body)
            if isinstance(outcome, Reply):
                return outcome
            last = attempt == self.config.max_retries or (outcome.unreachable and attempt and self._new())
            if last or not outcome.retry:
                raise EndpointError(self._explain(outcome, attempt + 1))
            self.ledger.retries += 1
            delay = retry_delay(outcome, attempt, self._jitter.random())
            if outcome.wait_s:
                self._resume_at = max(self._resume_at, time.monotonic() + delay)
            await self._pause(delay)
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, client: httpx.AsyncClient, body: Body) -> Reply | Trouble:
        start = time.monotonic()
        try:
            async with asyncio.timeout(self.config.timeout_s):
                answer = await client.post(self.url, json=body)
        except TimeoutError:
            return Trouble("no reply", f"within {self.config.timeout_s:g} s", retry=True)
        except httpx.TimeoutException as error:
            return Trouble("no reply", f"{type(error).__name__} at {self.config.timeout_s:g} s", retry=True)
        except httpx.RequestError as error:
            unreachable = isinstance(error, httpx.ConnectError)
            return Trouble("no connection", self._redact(str(error)), retry=True, unreachable=unreachable)
        if answer.status_code in (400, 413, 422):
            return self._refusal(answer)
        if answer.status_code != 200:
            return classify(answer.status_code, answer.headers, self._redact(answer.text))
        reply = parse_reply(answer.content, body["messages"], time.monotonic() - start)
        if reply is None:
            self.ledger.nonsense += 1
            return Trouble("a reply that is no chat completion", self._redact(answer.text)[:200], retry=True)
        self.ledger.estimated += reply.estimated
        return reply

    def _refusal(self, answer: httpx.Response) -> Reply | Trouble:
        """One request refused is a hole in the data; most of them refused is a wrong setting."""
        self.ledger.refused += 1
        detail = self._redact(answer.text)[:300]
        if self.ledger.refused >= 3 and self.ledger.refused > self.ledger.requests:
            return Trouble(f"status {answer.status_code}", detail, retry=False)
        return Reply("", {}, "refused", 0, 0, 0.0, problem=f"status {answer.status_code}: {detail}")

    def _explain(self, trouble: Trouble, attempts: int) -> str:
        tries = "" if attempts == 1 else f" after {attempts} attempts"
        todo = trouble.todo or "see that the server runs there and is well, then run the same command again"
        todo = todo.format(key_env=self.config.key_env or "(none: set endpoint.key_env)")
        model = self.config.model
        return (
            f"{self.url} (model {model!r}): expected a chat completion, found {trouble.what}{tries}: "
            f"{trouble.detail or 'no further word'}. What to do: {todo}. What is paid for is in {self.cache}."
        )

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def _new(self) -> bool:
        """Has this server never answered? Then waiting minutes for it helps nobody."""
        return self.ledger.requests + self.ledger.refused + self.ledger.nonsense == 0

    def _halted(self) -> bool:
        return self._failure is not None or self._stop()

    async def _pause(self, seconds: float) -> None:
        """Sleep, but wake within a fifth of a second when the run is stopped."""
        until = time.monotonic() + seconds
        while not self._halted() and (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.2))


@dataclass
class _Desk:
    """What the workers of one `ask` share: money set aside for requests in flight."""

    changed: asyncio.Condition
    in_flight: int = 0
    reserved: float = 0.0

    async def release(self, reserve: float) -> None:
        async with self.changed:
            self.in_flight -= 1
            self.reserved = self.reserved - reserve if self.in_flight else 0.0
            self.changed.notify_all()


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end, also where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()
