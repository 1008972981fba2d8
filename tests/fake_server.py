"""A chat server on 127.0.0.1 that behaves as well or as badly as a test wants."""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

Body = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What the server sends back, after `wait_s` seconds."""

    status: int = 200
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0.0


def chat(text: str | None, *, logprobs: dict[str, float] | None = None, usage: bool = True) -> Answer:
    """Build a proper chat completion: 100 tokens in and 10 out."""
    choice: Body = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if logprobs is not None:
        top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    data: Body = {"object": "chat.completion", "choices": [choice]}
    if usage:
        data["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
    return Answer(content=json.dumps(data).encode())


def answers_in(body: Body) -> list[str]:
    """Find the answers under judgement in a judge's request, in the order shown."""
    return re.findall(r"=== answer ?\w* \w+ ===\n(.*?)\n=== end", body["messages"][-1]["content"], re.DOTALL)


class FakeServer:
    """Serve `behave(body, number of earlier requests)` until the block ends.

    requests: the bodies received.   keys: their Authorization headers.   most: most requests at one time.
    """

    def __init__(self, behave: Callable[[Body, int], Answer]) -> None:
        self.requests: list[Body] = []
        self.keys: list[str] = []
        self.most = 0
        self.closing = threading.Event()
        self._now = 0
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    number = len(fake.requests)
                    fake.requests.append(body)
                    fake.keys.append(self.headers.get("Authorization", ""))
                    fake._now += 1
                    fake.most = max(fake.most, fake._now)
                answer = behave(body, number)
                fake.closing.wait(answer.wait_s)
                with fake._lock:
                    fake._now -= 1
                try:
                    self.send_response(answer.status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(answer.content)))
                    self.end_headers()
                    self.wfile.write(answer.content)
                except OSError:  # the client went away
                    pass

            def log_message(self, format: str, *args: object) -> None:
                """Print nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
