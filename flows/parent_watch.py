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


def _watch(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    this = psutil.Process()
    children = this.children(recursive=True)
    _end(children)
    psutil.wait_procs(children, GRACE_SECONDS)  # a stage saves its work; whoever waits for this process waits for that, too
    for process in children:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _end([this])
    time.sleep(GRACE_SECONDS)
    this.kill()


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
    threading.Thread(target=_watch, args=(pipe,), name="parent watch", daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
