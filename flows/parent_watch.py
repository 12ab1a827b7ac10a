"""Runs a module, as `python -m` does, that ends when its parent ends: `python -m flows.parent_watch MODULE ARGUMENT ...`.

Standard input is a pipe from the parent, which never writes to it. In whatever way the parent ends, even by SIGKILL, the pipe closes, and
the module is ended after all of its descendants. Imports no Prefect, and nothing of Ommatid: it is also started by its path.
"""

import os
import runpy
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

GRACE_SECONDS = 60.0
"""Seconds between SIGTERM and SIGKILL."""


def _watch(pipe: int, ending: threading.Lock) -> None:
    while os.read(pipe, 1):
        pass
    this = psutil.Process()
    with ending:
        end_all(this.children(recursive=True))  # a stage saves its work
    end_all([this])


def end_all(processes: Sequence[psutil.Process], seconds: float = GRACE_SECONDS) -> None:
    """End processes, killing those still running after `seconds`. Whoever waits for one of them gets its exit status."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    until = time.monotonic() + seconds
    while any(map(_is_running, processes)) and time.monotonic() < until:
        time.sleep(0.05)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _is_running(process: psutil.Process) -> bool:
    """Return whether a process is running; a zombie is not, and its parent, often a container's init, may never reap it."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def main() -> None:
    """Run the module named by the arguments."""
    pipe = os.dup(0)
    devnull = os.open(os.devnull, os.O_RDONLY)  # standard input of the module
    os.dup2(devnull, 0)
    os.close(devnull)
    ending = threading.Lock()  # held while descendants are ended
    threading.Thread(target=_watch, args=(pipe, ending), name="parent watch", daemon=True).start()
    del sys.argv[0]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        with ending:  # whoever waits for this process, or for a lock of files that it holds, waits for its descendants too
            pass


if __name__ == "__main__":
    main()
