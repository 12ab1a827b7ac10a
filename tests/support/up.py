"""A running `make up` in a process of its own, and a receiver of its messages."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from flows.prefect_api import Api
from support.processes import HANG_SECONDS, wait_for, wait_for_end
from support.servers import free_port

ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass
class Up:
    """A running `make up`."""

    checkout: Path
    prefect: str
    mlflow: str
    explorer: str
    webhook: str
    process: "subprocess.Popen[str]"
    receiver: "Receiver"
    said: list[str] = field(default_factory=list)
    """Lines on its terminal so far."""

    @property
    def api(self) -> Api:
        return Api(f"{self.prefect}/api", HANG_SECONDS)

    def deployment(self, name: str) -> dict[str, Any]:
        (found,) = self.api.deployments(name)
        return found

    def pretend(self, kind: str, name: str, message: str, deployment_name: str = "retrain") -> str:
        """Let the server believe that a run is in some state."""
        deployment = self.deployment(deployment_name)
        body = {"flow_id": deployment["flow_id"], "deployment_id": deployment["id"], "name": f"run-{name}", "state": {"type": "PENDING"}}
        made = self.api.post("/flow_runs/", body)["id"]
        self.api.post(f"/flow_runs/{made}/set_state", {"state": {"type": kind, "name": name, "message": message}, "force": True})
        return made

    def declare_messages(self, receiver: str = "") -> "subprocess.CompletedProcess[str]":
        """Declare the automations as `make up` does, with some receiver."""
        env = environment(self.checkout.parent) | {"PREFECT_API_URL": self.api.url, "OMMATID_MESSAGES": receiver}
        command = [sys.executable, "-m", "flows.messages"]
        return subprocess.run(command, cwd=self.checkout, env=env, capture_output=True, text=True)

    def automations(self) -> dict[str, dict[str, Any]]:
        return {found["name"]: found for found in self.api.post("/automations/filter", {})}

    def pause(self, name: str) -> None:
        """End the schedules of a deployment, and wait for what they have started."""
        self.api.post(f"/deployments/{self.deployment(name)['id']}/pause_deployment", {})
        wait_for(lambda: not self.runs(name, "SCHEDULED", "PENDING", "RUNNING"), "the end of runs that had begun")

    def start(self, name: str, parameters: dict[str, Any] | None = None) -> str:
        """Start a run; without parameters, the request is the one of Quick run."""
        body = {} if parameters is None else {"parameters": parameters}
        return self.api.post(f"/deployments/{self.deployment(name)['id']}/create_flow_run", body)["id"]

    def ended(self, flow_run: str) -> dict[str, Any]:
        """Wait for the end of a run."""

        def ended() -> dict[str, Any] | None:
            found = self.api.get(f"/flow_runs/{flow_run}")
            return found if found["state_type"] in ENDED else None

        return wait_for(ended, "the end of the run")

    def runs(self, name: str, *states: str) -> list[dict[str, Any]]:
        return self.api.runs(deployment_id={"any_": [self.deployment(name)["id"]]}, state={"type": {"any_": states}})

    def heard(self, pattern: str) -> str:
        """Wait for a line on the terminal."""
        return wait_for(lambda: next((line for line in self.said if re.search(pattern, line)), None), f"a line with {pattern!r}")


class Receiver(ThreadingHTTPServer):
    """A server that gets messages."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.status: int | None = 200
        """Status of its answers; None: it does not answer."""
        self.is_over = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def subjects(self) -> list[str]:
        return [body["subject"] for body in self.bodies]


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.server.status is None:
            self.server.is_over.wait(HANG_SECONDS)
            return
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Run a server that gets messages until the block ends."""
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.is_over.set()
            server.shutdown()
            thread.join(HANG_SECONDS)


@contextmanager
def making_up(checkout: Path, env: Mapping[str, str], receiver: Receiver) -> Iterator[Up]:
    """Run `make up` in a checkout until the block ends, which ends it by Ctrl-C, or until it ends by itself.

    Args:
        checkout: The checkout.
        env: Environment of the process, with those ports that are not to be drawn.
        receiver: Server that gets its messages.
    """
    names = ("PREFECT_SERVER_API_PORT", "MLFLOW_PORT", "OMMATID_PORT", "OMMATID_WEBHOOK_PORT")
    variables = {**{name: str(free_port()) for name in names}, **env, "OMMATID_MESSAGES": receiver.url}
    prefect, mlflow, explorer, webhook = (f"http://127.0.0.1:{variables[name]}" for name in names)
    command = [sys.executable, "-m", "flows.serve"]
    with subprocess.Popen(command, cwd=checkout, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        running = Up(checkout, prefect, mlflow, explorer, webhook, process, receiver)
        reader = threading.Thread(target=lambda: running.said.extend(process.stdout or ()))
        reader.start()
        family: list[psutil.Process] = []
        try:
            running.heard("Ctrl-C ends all of them")
            yield running
        finally:
            if process.poll() is None:
                family = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGINT)
            process.wait(HANG_SECONDS)
            reader.join(HANG_SECONDS)
    wait_for_end(family, "servers and worker")


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a fresh machine, on which git has no name and email address, and Prefect has no settings."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "GIT_", "OMMATID_", "MLFLOW_"))}
    return mine | {"HOME": str(home), "OMMATID_CACHE": str(home / "cache")}
