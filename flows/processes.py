"""Servers and workers as background processes that write their output to log files. Imports no Prefect."""

import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from flows.commands import end
from flows.parent_watch import end_all
from ommatid.errors import RunError

START_SECONDS = 600
"""Seconds that a server may take to answer; generous, as its first start creates its database and the machine may be busy."""

LAST_PORT = 65_535
"""Largest port that there is."""

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""Content-Security-Policy with which browsers ask no host but the page's own, for pages of others."""

MARK = "OMMATID_SERVICES"
"""Environment variable, inherited by all descendants of a service, that identifies the `Services` object they belong to."""


class Services:
    """Processes that run until `end` is called or this process ends, even if it is killed (see flows/parent_watch.py)."""

    def __init__(self, env: Mapping[str, str], logs: Path, mark: str | None = None):
        """Prepare to start processes.

        Args:
            env: Their environment.
            logs: Folder of their logs.
            mark: Name by which they are known among all processes of the machine; None: a random one.
        """
        self._mark = mark or secrets.token_hex(8)
        self._env = {**env, MARK: self._mark}
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, *command: str) -> None:
        """Start a process that writes its output to `<name>.log`, and keep the log of the process before as `<name>.log.1`.

        Args:
            name: Name of the process.
            command: Python module to run, and its arguments.
        """
        with suppress(FileNotFoundError):
            self._log(name).replace(self._logs / f"{name}.log.1")
        with self._log(name).open("w") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", "flows.parent_watch", *command],
                env=self._env, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait_for(self, name: str, url: str) -> None:
        """Wait until the server `name` answers at `url`.

        That of another checkout, which was started at the same time and got the port first, is not taken for it.

        Raises:
            RunError: The server or another process ended, or it did not answer in time.
        """
        deadline = time.monotonic() + START_SECONDS
        while not (_answers(url) and _listens(self._running[name].pid, urlsplit(url).port)):
            self.check()
            if time.monotonic() > deadline:
                raise RunError(f"{name} did not answer at {url} within {START_SECONDS} s; its output is in {self._log(name)}")
            time.sleep(0.3)

    def finish(self, *names: str) -> None:
        """Wait until processes have ended by themselves.

        Raises:
            RunError: One of them failed.
        """
        for name in names:
            with self._running.pop(name) as process:
                code = process.wait()
            if code:
                raise RunError(f"{name} {_describe_end(code)}: {self._last_lines(name)}")

    def check(self) -> None:
        """Check that all processes are still running.

        Raises:
            RunError: One has ended.
        """
        for name, process in self._running.items():
            if process.poll() is not None:
                raise RunError(f"{name} {_describe_end(process.returncode)}: {self._last_lines(name)}")

    def any_left(self) -> bool:
        """Return whether there are processes with this mark, which at first are those of another such object that was killed."""
        return bool(self._all())

    def end(self) -> None:
        """End all processes with this mark, newest first.

        Workers and their runs are killed, so that the runs still report Running: the next start knows by that that they were cut short.
        A run that is asked to end would report that it had crashed. Its stage is asked, and saves its work.
        """
        for words in (("prefect", "worker"), ("prefect.engine",)):
            for process in self._all(words):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        while self._running:
            with self._running.popitem()[1] as process:
                end(process)
        end_all(self._all())

    def _all(self, words: Sequence[str] = ()) -> list[psutil.Process]:
        """All processes with this mark, also descendants that outlived their parent, whose command has these words."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # another user's process, or one that has just ended
                if process.environ().get(MARK) == self._mark and not set(words) - set(process.cmdline()):
                    found.append(process)
        return found

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _last_lines(self, name: str) -> str:
        return " / ".join(self._log(name).read_text(errors="replace").splitlines()[-5:]) + f" (all of it: {self._log(name)})"


def _describe_end(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


class Tail:
    """Reader of what is appended to a log file, in whole lines."""

    def __init__(self, path: Path):
        self.path = path
        self._at = 0

    def read(self) -> str:
        """Return the lines written since the last call; "" if there are none."""
        with suppress(OSError), self.path.open("rb") as log:
            log.seek(self._at)
            whole, end, _ = log.read().rpartition(b"\n")
            self._at += len(whole + end)
            return whole.decode(errors="replace")
        return ""


def free_port(first: int, taken: Container[int] = ()) -> int:
    """Find a port that nobody listens on.

    Args:
        first: Port to try first; the 99 ports after it follow.
        taken: Ports to leave out.

    Returns:
        The port.

    Raises:
        RunError: None of the ports is free.
    """
    last = min(first + 99, LAST_PORT)
    for port in range(first, last + 1):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in taken:
            return port
    raise RunError(f"no free port from {first} to {last}")


def hold_port(first: int) -> tuple[int, socket.socket]:
    """Find a port that nobody listens on, and keep it for a server that will be started later.

    Args:
        first: Port to try first; the 99 ports after it follow.

    Returns:
        The port, and what keeps it: until that is closed or this process ends, nobody else who calls this function gets the port. It is a
        socket of UDP, which is not in the way of a server's own.

    Raises:
        RunError: None of the ports is free.
    """
    taken: list[int] = []
    while True:
        port, holder = free_port(first, taken), socket.socket(type=socket.SOCK_DGRAM)
        try:
            holder.bind(("127.0.0.1", port))
        except OSError:
            holder.close()
            taken.append(port)
        else:
            return port, holder


def _listens(pid: int, port: int | None) -> bool:
    """Return whether a process or one of its descendants listens on a port."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        sockets = [found for each in (process, *process.children(recursive=True)) for found in each.net_connections("tcp")]
        return any(found.status == psutil.CONN_LISTEN and found.laddr.port == port for found in sockets)
    return False


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False
