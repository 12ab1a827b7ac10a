"""Helpers to wait for processes, to end them, and to find those left behind.

Time limits are for hangs: a busy machine is ten times slower than an idle one, and no test may fail because of that.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil

HANG_SECONDS = 600.0
"""Seconds that a test waits for something that should take seconds; less than pytest's own limit, which does not say what is missing."""

Found = TypeVar("Found")


def wait_for(find: Callable[[], Found | None], what: str, seconds: float = HANG_SECONDS) -> Found:
    """Return what `find` finds, as soon as it finds anything.

    Raises:
        AssertionError: nothing came within `seconds`; names `what`.
    """
    until = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < until, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)
    return found


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that still run; a zombie has ended, and only waits for its parent."""
    return [process for process in processes if _runs(process)]


def wait_for_end(processes: Iterable[psutil.Process], what: str) -> None:
    """Wait until none of the processes runs."""
    left = list(processes)
    wait_for(lambda: not alive(left), f"the end of {what}")


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


TESTS = Path(__file__).parents[1]


def started() -> set[psutil.Process]:
    """Return the running children of this process, except the resource tracker of multiprocessing."""
    return {child for child in psutil.Process().children() if (command := command_of(child)) and "resource_tracker" not in command}


def command_of(process: psutil.Process) -> str:
    """Return the command line of a process; "" if it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


class Driver:
    """A script that runs shards until it is ended; the script and all its children have a mark in their environment."""

    def __init__(self) -> None:
        self._mark = str(uuid.uuid4())
        self._process: subprocess.Popen[str] | None = None

    def start(self, script: str, folder: Path) -> None:
        """Start the script, and return when a shard is done."""
        path = folder / "driver.py"
        path.write_text(script)
        environment = os.environ | {"PYTHONPATH": str(TESTS), "OMMATID_TEST_MARK": self._mark}
        command = [sys.executable, str(path), str(folder)]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self._process.stdout
        assert self._process.stdout.readline().strip().isdigit()
        assert len(self.running()) > 1

    def end(self, number: signal.Signals) -> None:
        """End the script by Ctrl-C, which reaches all processes of a terminal, or by a kill, and wait until no process is left."""
        assert self._process and self._process.stdout
        if number == signal.SIGINT:
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)
        assert self._process.wait(HANG_SECONDS) != 0
        self._process.stdout.close()
        wait_for(lambda: not self.running(), "the processes of a driver that has ended")

    def running(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._mark in _environment(process).get("OMMATID_TEST_MARK", "")]

    def kill(self) -> None:
        """Kill every process that the test left behind."""
        for process in self.running():
            process.kill()


def _environment(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error):
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.environ()
    return {}
