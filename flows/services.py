"""Services: servers and workers in processes of their own, their output in log files. Imports no Prefect."""

import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from flows.checkout import end, end_all
from ommatid.errors import RunError

START_SECONDS = 600
"""How long a server may take to answer: the first start makes its database, and the machine may be busy."""

MARK = "OMMATID_SERVICES"
"""Environment variable by which what services started is known as theirs."""


class Services:
    """Processes that run until they are all ended, or this process is gone, however it ended: see ward.py."""

    def __init__(self, env: Mapping[str, str], logs: Path):
        self._mark = secrets.token_hex(8)
        self._env = {**env, MARK: self._mark}
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, *command: str) -> None:
        """Start a process; its output goes to `<name>.log`."""
        with self._log(name).open("w") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", "flows.ward", *command],
                env=self._env, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait_for(self, name: str, url: str) -> None:
        """Wait until a server answers.

        Raises:
            RunError: it ended, or did not answer in time.
        """
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url):
            self.check()
            if time.monotonic() > deadline:
                raise RunError(f"{name} did not answer at {url} in {START_SECONDS} s; its output is in {self._log(name)}")
            time.sleep(0.3)

    def finish(self, *names: str) -> None:
        """Wait until these processes have done their work.

        Raises:
            RunError: one failed.
        """
        for name in names:
            with self._running.pop(name) as process:
                code = process.wait()
            if code:
                raise RunError(f"{name} ended with status {code}: {self._last_lines(name)}")

    def check(self) -> None:
        """Whether all still run.

        Raises:
            RunError: one ended.
        """
        for name, process in self._running.items():
            if process.poll() is not None:
                raise RunError(f"{name} ended with status {process.returncode}: {self._last_lines(name)}")

    def end(self) -> None:
        """End all, the newest first: the worker ends its runs while the server still listens."""
        while self._running:
            with self._running.popitem()[1] as process:
                end(process)
        end_all(self._orphans())

    def _orphans(self) -> list[psutil.Process]:
        """What is left of those that were killed, such as the run of a worker: it inherited the mark."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # of another user, or ended meanwhile
                if process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _last_lines(self, name: str) -> str:
        return " / ".join(self._log(name).read_text(errors="replace").splitlines()[-5:]) + f" (all of it: {self._log(name)})"


def free_port(first: int, taken: int | None = None) -> int:
    """`first`, or the next port that nobody listens on."""
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port != taken:
            return port
    raise RunError(f"no free port from {first} to {first + 99}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False
