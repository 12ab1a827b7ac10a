"""Runs a module as `python -m` does, for as long as the process that started it lives: `python -m flows.ward MODULE ARGUMENT ...`.

Standard input is a pipe from that process, which writes nothing into it. However it ends, also by SIGKILL, the pipe does, too, and the
module ends with all that it started. Imports no Prefect.
"""

import os
import runpy
import sys
import threading
import time
from contextlib import suppress

import psutil

GRACE_SECONDS = 60.0
"""How long the module may take to end by itself."""


def _watch(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    me = psutil.Process()
    family = [*me.children(recursive=True), me]
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.terminate()
    time.sleep(GRACE_SECONDS)
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def main() -> None:
    """Run the module that the arguments name."""
    pipe = os.dup(0)  # the module gets no input
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_watch, args=(pipe,), name="ward", daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
