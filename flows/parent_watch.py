"""Runs a module, as `python -m` does, that ends when its parent ends: `python -m flows.parent_watch MODULE ARGUMENT ...`.

Standard input is a pipe from the parent, which never writes to it. In whatever way the parent ends, even by SIGKILL, the pipe closes, and
the module is ended together with all of its descendants. Imports no Prefect.
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
    processes = [*this.children(recursive=True), this]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    time.sleep(GRACE_SECONDS)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


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
