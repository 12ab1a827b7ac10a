"""Starts a deployment once the images have changed: `python -m flows.watch`, one of the services of `make up`.

The files that params.yaml names as images are listed again and again, as the stage `images` lists them, so linked folders, network file
systems, Parquet files, shards and object stores are watched alike. Once a listing has been the same for `quiet_seconds`, the content
is compared with that of the last run that was started for a change, and if it differs, one run is started. .prefect/watch.json
remembers it, so that changes made while nothing watched start one run, and no content starts two, unless it was away while a run failed.

With OMMATID_WEBHOOK_TOKEN set, http://127.0.0.1:8322 (OMMATID_WEBHOOK_HOST, OMMATID_WEBHOOK_PORT) takes notifications: on a POST without a
body, or with an event of S3 or MinIO, the files are listed at once. Imports no Prefect.
"""

import hmac
import json
import os
import re
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

from flows.prefect_api import BEGUN, RESTARTED, Api
from flows.project import Watch, read_project
from ommatid.cli.error_boundary import at_edge
from ommatid.config import Params, load_params
from ommatid.errors import ConfigError, OmmatidError, RunError, SourceError
from ommatid.sources.stage import PLACE, fingerprint, key_of_input, list_input, place_of_input
from ommatid.store.filesystem import replace_text
from ommatid.store.filesystem.listing import Listing

MEMORY = Path(".prefect/watch.json")
"""File that remembers for which content the last run was started."""
NOTICE = "notice: "
"""Beginning of lines that `make up` repeats on its terminal."""
WEBHOOK_HOST = "OMMATID_WEBHOOK_HOST"
"""Environment variable that names the interface on which notifications are taken."""
LOCALHOST = "127.0.0.1"
LOOK_SECONDS = 2.0
"""Seconds between two looks at files on this machine."""
REMOTE_SECONDS = 60.0
"""Seconds between two looks at an object store, where each listing costs money."""
LISTING_SHARE = 0.05
"""Largest share of the time that is spent on listing files."""
MOST_BYTES = 1 << 20
"""Largest body of a notification."""
REQUEST_SECONDS = 10.0
"""Seconds that a client may take to send its request."""
MOST_CLIENTS = 128
"""Largest number of clients at once; others are turned away."""


class Watcher:
    """What is known of the watched files between two looks."""

    def __init__(self, checkout: Path, api: Api, watch: Watch):
        self._checkout = checkout
        self._api = api
        self._watch = watch
        self._seen = ""
        self._since = 0.0
        self._compared = ""
        self._was_away = False
        self._said: set[str] = set()
        self.wait = LOOK_SECONDS
        """Seconds until the next look."""
        self.rest = LOOK_SECONDS
        """Seconds until the next look if a notification comes, as each of thousands of new objects may send one."""

    def look(self, now: float) -> list[str]:
        """List the files, and start a run if they have changed and stayed as they are for long enough.

        Args:
            now: Time on a clock that never goes back, in seconds.

        Returns:
            Lines to print.
        """
        took, is_remote = 0.0, False
        try:
            params = load_params(self._checkout / "params.yaml")
            is_remote = "://" in place_of_input(params)
            began = time.monotonic()
            try:
                listing = list_input(params)
            except SourceError:
                self._remember(params, seen="")  # so that the first files of an empty folder start a run
                self._was_away, self._compared = True, ""
                raise
            took = time.monotonic() - began  # what follows may wait for the Prefect server, or read files once
            said = self._follow(now, params, listing)
            if self._said and self._seen == self._compared:
                if not any(line.startswith(NOTICE) for line in said):
                    said.append(f"{NOTICE}changes of the images start runs again")
                self._said.clear()
        except OmmatidError as error:
            said = [] if str(error) in self._said else [f"{NOTICE}changes of the images start nothing: {error}"]
            self._said = {str(error)}
            self._seen = ""
        may_wait = self._watch.quiet_seconds / 3 if self._seen != self._compared else REMOTE_SECONDS
        usual = max(may_wait, LOOK_SECONDS) if is_remote else LOOK_SECONDS
        self.rest = max(LOOK_SECONDS, took)
        self.wait = max(usual, took / LISTING_SHARE)
        return said

    def covers(self, urls: list[str]) -> str | None:
        """Return None if any of these objects is watched, else a sentence that says what is watched."""
        place = place_of_input(load_params(self._checkout / "params.yaml"))
        start = place.replace("s3a://", "s3://").rstrip("/") + "/"
        return None if any(f"{url}/".startswith(start) for url in urls) else f"only {place} is watched"

    def _follow(self, now: float, params: Params, listing: Listing) -> list[str]:
        seen = f"{listing.place} {listing.fingerprint}"
        if seen != self._seen:
            self._seen, self._since = seen, now
        memory = self._remember(params, seen)
        if seen == self._compared or now - self._since < self._watch.quiet_seconds:
            return []
        content = memory["content"]
        if seen != memory["seen"]:
            content = fingerprint(listing)["sha256"]
            if list_input(params).fingerprint != listing.fingerprint:
                return []  # it has changed while it was read
        said, known = [], memory | {"seen": seen}
        if known != memory and content == memory["content"]:
            _write(self._checkout / MEMORY, known)
        last = self._last_run() if self._was_away and content == memory["content"] else ""
        if last in ("Pending", "Running"):
            return []  # it may fail for lack of what was away
        if content != memory["content"] or last == "Failed":
            what = f"{listing.place} {'is back, and the last run failed' if last else 'has changed'} ({len(listing.files):,} files)"
            said = self._start(known | {"content": content, "n": memory["n"] + 1}, what, listing.place)
        self._was_away, self._compared = False, seen
        return said

    def _remember(self, params: Params, seen: str) -> dict[str, Any]:
        """Return what is remembered of the files; of others than those of before, their present state, for which no run is started."""
        memory, place, key = _read(self._checkout / MEMORY), place_of_input(params), key_of_input(params)
        if memory.get("place") != place:
            # a run that was made before anything watched has read the content of then
            recorded = _read(self._checkout / PLACE / f"{key.partition('.')[0]}.json").get(key, {}).get("sha256")
            known = recorded if not memory else None
            memory = {"place": place, "seen": "" if known else seen, "content": known, "n": memory.get("n", 0)}
            _write(self._checkout / MEMORY, memory)
        return memory

    def _start(self, memory: dict[str, Any], what: str, place: str) -> list[str]:
        """Start a run, unless one waits, which will read the files when it starts."""
        deployment = self._deployment()
        if self._waits(deployment):
            said = [f"{what}; a run of {self._watch.deployment} is waiting to start anyway"]
        else:
            request = {
                "state": {"type": "SCHEDULED", "message": what},
                "tags": ["images changed"],
                # after a kill between the request and the note of it, the same request is made again and starts nothing
                "idempotency_key": f"{place} {memory['n']} {memory['content']}",
            }
            run = self._api.post(f"/deployments/{deployment}/create_flow_run", request)
            said = [f"{NOTICE}{what}: started {self._watch.deployment} as {run['name']}"]
        _write(self._checkout / MEMORY, memory)
        return said

    def _deployment(self) -> str:
        """Return the id of the deployment."""
        name = self._watch.deployment
        (deployment,) = self._api.deployments(name) or [None]
        if deployment is None:
            raise RunError(f"the Prefect server has no deployment {name}")
        return deployment["id"]

    def _last_run(self) -> str:
        """Return the state of the last run that has begun, or is about to; "" if there is none."""
        of = {"deployment_id": {"any_": [self._deployment()]}, "state": {"type": {"any_": ["PENDING", *BEGUN]}}}
        last = self._api.post("/flow_runs/filter", {"flow_runs": of, "sort": "EXPECTED_START_TIME_DESC", "limit": 1})
        return last[0]["state_name"] if last else ""

    def _waits(self, deployment: str) -> bool:
        due = {"before_": datetime.now(UTC).isoformat()}
        waiting = self._api.runs(deployment_id={"any_": [deployment]}, state={"type": {"any_": ["SCHEDULED"]}}, expected_start_time=due)
        return any(run["run_count"] == 0 or run["state_name"] == RESTARTED for run in waiting)


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _write(path: Path, values: dict[str, Any]) -> None:
    replace_text(path, json.dumps(values, indent=1) + "\n")


class RefusedError(Exception):
    """A request that cannot be followed; its arguments are the HTTP status and a sentence."""


def read_notification(body: bytes) -> list[str] | None:
    """Return the URLs of the objects that an S3 event names; None if the body names none, so that anything may have changed.

    Raises:
        RefusedError: The body is neither empty nor such an event.
    """
    if not body.strip():
        return None
    wanted = "send no body, or an event of S3, MinIO or EventBridge, which names the bucket and the key of each object"
    try:
        event = json.loads(body)
        if event == {} or event.get("Event") == "s3:TestEvent":
            return None
        if "detail" in event:  # EventBridge, where keys are not quoted
            return [f"s3://{event['detail']['bucket']['name']}/{event['detail']['object']['key']}"]
        records = [record["s3"] for record in event["Records"]]
        return [f"s3://{s3['bucket']['name']}/{unquote_plus(s3['object']['key'])}" for s3 in records]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise RefusedError(400, f"not a notification: {wanted}") from None


class Webhook(ThreadingHTTPServer):
    """Server that takes notifications."""

    daemon_threads = True
    request_queue_size = MOST_CLIENTS

    def __init__(self, address: tuple[str, int], token: str, watcher: Watcher):
        self.began: dict[Any, float] = {}
        """When each connection that is open began."""
        self.token = token
        self.watcher = watcher
        self.called = threading.Event()
        """Set when the files are to be listed at once."""
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a request in a thread of its own."""
        if len(self.began) >= MOST_CLIENTS:
            self.shutdown_request(request)
            return
        self.began[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End the connection of a request."""
        self.began.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Read no more from clients that are too slow; called twice a second."""
        now = time.monotonic()
        for request, began in list(self.began.items()):
            if now - began > REQUEST_SECONDS:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RD)


class _Handler(BaseHTTPRequestHandler):
    server_version = "ommatid"
    sys_version = ""
    server: Webhook

    def do_POST(self) -> None:
        self.close_connection = True
        try:
            self._check()
            urls = read_notification(self._body())
            if urls is not None and (reason := self.server.watcher.covers(urls)):
                self._answer(200, f"nothing to do: {reason}")
                return
        except RefusedError as refused:
            self._answer(*refused.args)
        except OmmatidError as error:
            self._answer(503, str(error))
        else:
            self.server.called.set()
            self._answer(202, "the images are listed now; a run starts once they have stopped changing, if they differ from the last run's")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # any other method
            return lambda: self._answer(405, "send a POST")
        raise AttributeError(name)

    def _check(self) -> None:
        if self.path.partition("?")[0] != "/":
            raise RefusedError(404, "send the POST to /")
        given = re.sub("^bearer +", "", self.headers.get("Authorization", ""), flags=re.IGNORECASE).strip()
        if not hmac.compare_digest(given.encode("latin-1"), self.server.token.encode()):
            raise RefusedError(401, "send the header Authorization: Bearer TOKEN with the value of OMMATID_WEBHOOK_TOKEN")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "" if "Transfer-Encoding" in self.headers else "0")
        if not length.isdecimal():
            raise RefusedError(411, "send a Content-Length")
        if int(length) > MOST_BYTES:
            raise RefusedError(413, f"the body is larger than {MOST_BYTES:,} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise RefusedError(408, f"the body is shorter than its Content-Length, or did not come within {REQUEST_SECONDS:.0f} s")
        return body

    def _answer(self, status: int, sentence: str) -> None:
        body = json.dumps({"message": sentence}).encode() + b"\n"
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status == 405:
                self.send_header("Allow", "POST")
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        print(f"{self.address_string()} {format % args}", flush=True)


def main() -> None:
    """Watch the images until a signal comes."""
    with at_edge():
        checkout = Path.cwd()
        watch = read_project(checkout).watch
        if watch is None:
            raise RunError("infra/prefect.yaml has no `watch`, so there is nothing to start")
        if not (url := os.environ.get("PREFECT_API_URL")):
            raise RunError("PREFECT_API_URL is not set; `make up` starts this command with the address of its server")
        watcher = Watcher(checkout, Api(url), watch)
        called = threading.Event()
        if token := os.environ.get("OMMATID_WEBHOOK_TOKEN"):
            host, port = os.environ.get(WEBHOOK_HOST) or LOCALHOST, int(os.environ.get("OMMATID_WEBHOOK_PORT", "8322"))
            try:
                webhook = Webhook((host, port), token, watcher)
            except OSError as error:
                wanted = f"set {WEBHOOK_HOST} to an address of this machine, and OMMATID_WEBHOOK_PORT to a port that is free there"
                raise ConfigError(f"the webhook cannot listen at {host}:{port} ({error.strerror}); {wanted}") from None
            called = webhook.called
            threading.Thread(target=webhook.serve_forever, name="webhook", daemon=True).start()
        while True:
            called.clear()
            for line in watcher.look(time.monotonic()):
                print(line, flush=True)
            time.sleep(watcher.rest)
            called.wait(watcher.wait - watcher.rest)


if __name__ == "__main__":
    main()
