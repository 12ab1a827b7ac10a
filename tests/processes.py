"""Processes of tests: drivers to be ended, and what they leave."""

import os
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import psutil
from waiting import HANG_SECONDS, wait_for

TESTS = Path(__file__).parent


def started() -> set[psutil.Process]:
    """Processes that this one has started itself and that still run, but the one that multiprocessing keeps."""
    return {child for child in psutil.Process().children() if (command := command_of(child)) and "resource_tracker" not in command}


def command_of(process: psutil.Process) -> str:
    """Its command line; "" of one that has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


class Driver:
    """A script that runs shards until it is ended; it and all it starts carry a mark."""

    def __init__(self) -> None:
        self._mark = str(uuid.uuid4())
        self._process: subprocess.Popen[str] | None = None

    def start(self, script: str, folder: Path) -> None:
        """Returns when it has said that a shard is done."""
        path = folder / "driver.py"
        path.write_text(script)
        environment = os.environ | {"PYTHONPATH": str(TESTS), "OMMATID_TEST_MARK": self._mark}
        command = [sys.executable, str(path), str(folder)]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self._process.stdout
        assert self._process.stdout.readline().strip().isdigit()
        assert len(self.running()) > 1

    def end(self, number: signal.Signals) -> None:
        """Ctrl-C reaches all processes of a terminal, a kill only one; then none is left."""
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
        """Whatever the test left."""
        for process in self.running():
            process.kill()


def _environment(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error):
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.environ()
    return {}
