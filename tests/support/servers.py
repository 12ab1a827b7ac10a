"""Real servers on loopback: object stores, chat models that follow a script, and clusters of workers."""

import base64
import io
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from ommatid.config.extract import RayExecutor
from support.processes import HANG_SECONDS, TESTS, wait_for, wait_for_end


@dataclass(frozen=True)
class S3Server:
    """A running server."""

    endpoint: str
    """http://127.0.0.1:<port>"""
    key: str
    secret: str
    root: Path
    """Folder of the server; the folders in it are buckets."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a client of this server, without any setting that leads elsewhere."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            # rclone sends the checksum of the whole object with every range of it
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_CONFIG_FILE": str(self.root / "no-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.root / "no-credentials"),
        }


@contextmanager
def serving(root: Path) -> Iterator[S3Server]:
    """Run a server of the folder `root` until the block ends."""
    (root / "bucket").mkdir(parents=True)
    server = S3Server(f"http://127.0.0.1:{free_port()}", secrets.token_hex(10), secrets.token_hex(20), root)
    command = [str(Path(sys.executable).with_name("rclone")), "serve", "s3", str(root), "--addr", server.endpoint.removeprefix("http://")]
    # without config it reads no file of the user's
    settings = ["--auth-key", f"{server.key},{server.secret}", "--config", "/dev/null", "--vfs-cache-mode", "off"]
    with (root.parent / "rclone.log").open("wb") as log, subprocess.Popen([*command, *settings], stdout=log, stderr=log) as process:
        try:
            _wait_for_store(server.endpoint, process)
            yield server
        finally:
            process.terminate()


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait_for_store(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    def answers() -> bool:
        try:
            urllib.request.urlopen(endpoint, timeout=HANG_SECONDS).close()
        except urllib.error.HTTPError as error:
            error.close()  # it answers: without a signature nobody is let in
        except OSError:
            assert process.poll() is None, f"the server ended with {process.returncode}"
            return False
        return True

    wait_for(answers, "the S3 server to answer")


@dataclass(frozen=True)
class Reply:
    """What the server replies to one request."""

    status: int = 200
    body: Any = None
    """Body of the response: an object to encode as JSON, or bytes."""
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """Seconds before the reply is sent."""
    hangs_up: bool = False
    """Whether to close the connection without a reply."""


@dataclass(frozen=True)
class Asked:
    """One request that the server received."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    when: float

    @property
    def text(self) -> str:
        return "\n".join(part["text"] for part in self._parts() if part["type"] == "text")

    @property
    def images(self) -> list[Image.Image]:
        """Images of the message, decoded as a server would; invalid images raise."""
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
"""Returns the reply to a request, given the number of earlier requests."""


def says(text: str | None, finish: str = "stop", refusal: str | None = None, n_tokens: int | None = 100) -> Reply:
    """Return a reply with a message."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    body: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}
    if n_tokens is not None:
        body["usage"] = {"prompt_tokens": n_tokens - 10, "completion_tokens": 10, "total_tokens": n_tokens}
    return Reply(body=body)


def names(label: str) -> Reply:
    """Return a reply with a label."""
    return says(json.dumps({"seen": f"all show {label}", "label": label}))


def refuses(status: int, message: str, **more: str) -> Reply:
    """Return an error in the format of OpenAI's servers."""
    return Reply(status, {"error": {"message": message, "type": "invalid_request_error", **more}})


class ChatServer:
    """A running server."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[Asked] = []
        """Chat requests in order of arrival."""
        self.models = ["tiny"]
        self.n_at_once = 0
        """Largest number of concurrent requests."""
        self._n_inside = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Stop the server; from then on connections are refused."""
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
    """Run a chat server that follows a script until the block ends; the last reply of a sequence is repeated."""
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


@contextmanager
def dask_scheduler(path: str = "") -> Iterator[str]:
    """Run a scheduler in a separate process."""
    address = f"tcp://127.0.0.1:{free_port()}"
    with _process("dask_scheduler", "--host", address, "--no-dashboard", path=path):
        _wait_for_scheduler(address)
        yield address


def _wait_for_scheduler(address: str) -> None:
    host, port = address.removeprefix("tcp://").split(":")

    def answers() -> bool:
        with suppress(OSError):
            socket.create_connection((host, int(port))).close()
            return True
        return False

    wait_for(answers, "the scheduler to listen")


@contextmanager
def dask_workers(address: str, folder: Path, path: str = str(TESTS)) -> Iterator[None]:
    """Run two worker processes with two threads each, which restart when they die and run in another folder."""
    names = ("--nworkers", "2", "--nthreads", "2", "--memory-limit", "0", "--no-dashboard", "--local-directory", str(folder))
    with _process("dask_worker", address, "--host", "127.0.0.1", *names, path=path, folder=folder):
        yield


@contextmanager
def _process(module: str, *arguments: str, path: str = "", folder: Path | None = None) -> Iterator[None]:
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-m", f"distributed.cli.{module}", *arguments]
    with subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


@contextmanager
def ray_cluster(log: Path, n_places: int = 2, path: str = str(TESTS)) -> Iterator[RayExecutor]:
    """Run a cluster that the driver did not start."""
    address = f"127.0.0.1:{free_port()}"
    options = {"num-cpus": n_places, "node-ip-address": "127.0.0.1", "port": address.partition(":")[2], "include-dashboard": "false"}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {"PYTHONPATH": path}
    with log.open("w") as file, subprocess.Popen(command, env=environment, cwd=log.parent, stdout=file, stderr=file) as process:
        try:

            def started() -> bool:
                assert process.poll() is None, log.read_text()
                return "Ray runtime started" in log.read_text()

            wait_for(started, "Ray to start")
            yield RayExecutor(kind="ray", address=address, workers=1)
        finally:
            tree = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            wait_for_end(tree, "Ray's processes")


EXPLORER = """
import json, pathlib, sys
from ommatid.explorer.app import serve
from ommatid.explorer.web import Settings
settings = json.loads(sys.argv[1])
serve(Settings(**settings | {"catalog": pathlib.Path(settings["catalog"])}))
"""
"""Program that serves the explorer with the settings it is given as JSON, and prints a line with its address."""


@dataclass(frozen=True)
class ExplorerServer:
    """A running server of the explorer."""

    url: str
    """Address of the start page, without a slash at its end."""
    process: psutil.Process
    log: Path
    """File of what the server says."""


@contextmanager
def serving_explorer(catalog: Path, log: Path, program: str = EXPLORER, **settings: Any) -> Iterator[ExplorerServer]:
    """Serve a catalogue in a separate process until the block ends. That the server raised an error nobody expected fails the block."""
    given = json.dumps({"catalog": str(catalog), "port": 0, **settings})
    command = [sys.executable, "-c", program, given]
    with log.open("wb") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        try:

            def address() -> str | None:
                assert process.poll() is None, f"the explorer ended with {process.returncode}:\n{log.read_text()}"
                found = re.search(r"http://\S+", log.read_text())
                return found and found[0].rstrip("/")

            yield ExplorerServer(wait_for(address, "the explorer to listen"), psutil.Process(process.pid), log)
        finally:
            process.terminate()
            try:
                process.wait(HANG_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    assert "Traceback" not in log.read_text(), f"the explorer raised an error:\n{log.read_text()}"
