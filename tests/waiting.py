"""Waiting in tests. A limit of time is for hangs: a busy machine is ten times slower than a quiet one, and no test may fail for that."""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

import psutil

HANG_SECONDS = 600.0
"""How long a test waits for what takes seconds. Less than pytest's own limit (pyproject.toml), so that this one says what did not come."""

Found = TypeVar("Found")


def wait_for(find: Callable[[], Found | None], what: str) -> Found:
    """Return what `find` finds, as soon as it finds anything.

    Raises:
        AssertionError: nothing came; names `what`.
    """
    until = time.monotonic() + HANG_SECONDS
    while not (found := find()):
        assert time.monotonic() < until, f"waited {HANG_SECONDS:.0f} s for {what}"
        time.sleep(0.05)
    return found


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run. A zombie does not: it has ended, and waits for its parent to ask how."""
    return [process for process in processes if _runs(process)]


def wait_for_end(processes: Iterable[psutil.Process], what: str) -> None:
    """Wait until none of the processes runs."""
    left = list(processes)
    wait_for(lambda: not alive(left), f"the end of {what}")


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
