"""Runs a module, as `python -m` does, that ends when its parent ends: `python -m flows.parent_watch MODULE ARGUMENT ...`.

Standard input is a pipe from the parent, which never writes to it. In whatever way the parent ends, even by SIGKILL, the pipe closes, and
the module is ended after all of its descendants. Imports no Prefect, and nothing of Ommatid: it is also started by its path.
"""

import os
import runpy
import sys
import threading
import time
from contextlib import suppress

import psutil

GRACE_SECONDS = 60.0
"""Seconds between SIGTERM and SIGKILL."""


def _watch(pipe: int, is_ending: threading.Event, has_ended: threading.Event) -> None:
    while os.read(pipe, 1):
        pass
    is_ending.set()
    this = psutil.Process()
    children = this.children(recursive=True)
    _end(children)
    until = time.monotonic() + GRACE_SECONDS
    while any(map(_runs, children)) and time.monotonic() < until:  # a stage saves its work
        time.sleep(0.05)
    for process in children:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    has_ended.set()
    _end([this])
    time.sleep(GRACE_SECONDS)
    this.kill()


def _runs(process: psutil.Process) -> bool:
    """Return whether a process runs, without taking its exit status from whoever waits for it."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()


def main() -> None:
    """Run the module named by the arguments."""
    pipe = os.dup(0)
    devnull = os.open(os.devnull, os.O_RDONLY)  # standard input of the module
    os.dup2(devnull, 0)
    os.close(devnull)
    is_ending, has_ended = threading.Event(), threading.Event()
    threading.Thread(target=_watch, args=(pipe, is_ending, has_ended), name="parent watch", daemon=True).start()
    del sys.argv[0]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:  # whoever waits for this process, or for a lock that it holds, waits for its descendants too
        if is_ending.is_set():
            has_ended.wait()


if __name__ == "__main__":
    main()
