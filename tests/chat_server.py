"""A real HTTP server that speaks OpenAI's chat protocol on loopback, answers by a script, and counts what it is asked."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Reply:
    """What the server does with one request."""

    status: int = 200
    body: Any = None
    """JSON, or bytes as they are."""
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """It takes so long."""
    hangs_up: bool = False
    """Closes the connection without a word."""


@dataclass(frozen=True)
class Asked:
    """One request, as it came."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    when: float

    @property
    def text(self) -> str:
        return "\n".join(part["text"] for part in self._parts() if part["type"] == "text")

    @property
    def images(self) -> list[Image.Image]:
        """Decoded as a server would; raises where a server would."""
        urls = [part["image_url"]["url"] for part in self._parts() if part["type"] == "image_url"]
        assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
        return [_decoded(base64.b64decode(url.partition(",")[2], validate=True)) for url in urls]

    def _parts(self) -> list[dict[str, Any]]:
        return self.body["messages"][0]["content"]


def _decoded(encoded: bytes) -> Image.Image:
    with Image.open(io.BytesIO(encoded), formats=["JPEG"]) as image:
        image.load()
        return image


Script = Callable[[Asked, int], Reply]
"""From a request and how many came before it."""


def says(text: str | None, finish: str = "stop", refusal: str | None = None, n_tokens: int | None = 100) -> Reply:
    """An answer by the protocol."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    body: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}
    if n_tokens is not None:
        body["usage"] = {"prompt_tokens": n_tokens - 10, "completion_tokens": 10, "total_tokens": n_tokens}
    return Reply(body=body)


def names(label: str) -> Reply:
    """The answer with this name."""
    return says(json.dumps({"seen": f"all show {label}", "label": label}))


def refuses(status: int, message: str, **more: str) -> Reply:
    """An error as OpenAI's servers word it."""
    return Reply(status, {"error": {"message": message, "type": "invalid_request_error", **more}})


class ChatServer:
    """A server that runs."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[Asked] = []
        """Chat requests in the order they came."""
        self.models = ["tiny"]
        self.n_at_once = 0
        """Most requests that were under way at a time."""
        self._n_inside = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Ends it; from then on connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def reply_to(self, asked: Asked) -> Reply:
        with self._lock:
            self._n_inside += 1
            self.n_at_once = max(self.n_at_once, self._n_inside)
            self.asked.append(asked)
            n_before = len(self.asked) - 1
        try:
            reply = self.script(asked, n_before)
            time.sleep(reply.seconds)
            return reply
        finally:
            with self._lock:
                self._n_inside -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                assert self.path == "/v1/models", self.path
                self._send(Reply(body={"object": "list", "data": [{"id": name, "object": "model"} for name in chat.models]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                assert self.path == "/v1/chat/completions", self.path
                self._send(chat.reply_to(Asked(self.path, dict(self.headers), body, time.monotonic())))

            def _send(self, reply: Reply) -> None:
                self.close_connection = reply.hangs_up
                if reply.hangs_up:
                    return
                raw = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                try:
                    self.send_response(reply.status)
                    for name, value in {"content-type": "application/json", "content-length": str(len(raw)), **reply.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(raw)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # it did not wait

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


@contextmanager
def chatting(script: Script | Sequence[Reply] | Reply) -> Iterator[ChatServer]:
    """A server until the block ends, that does what the script says; of a sequence each reply once, the last one ever after."""
    server = ChatServer(_script(script))
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _script(script: Script | Sequence[Reply] | Reply) -> Script:
    if isinstance(script, Reply):
        return lambda asked, n: script
    if isinstance(script, Sequence):
        return lambda asked, n: script[min(n, len(script) - 1)]
    return script
