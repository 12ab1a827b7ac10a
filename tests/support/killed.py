"""Kills a process at each of its writes in turn, and looks at what it leaves behind, and at what the next run makes of that.

Writes are what Python's audit events tell: files opened for writing, renamed, truncated or removed, and folders made or removed. The
process is forked for each kill, and ends as by SIGKILL: nothing is flushed or cleaned up.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
KILLED = 9
Look = Callable[[], Any]


@dataclass(frozen=True)
class Kill:
    """A kill, and what was seen after it."""

    event: str
    """The write that did not happen."""
    between: Any
    """What was seen after the kill."""
    end: Any
    """What was seen after the next run."""


def kill_at_each_write(folder: Path, act: Callable[[], None], look: Look) -> list[Kill]:
    """Run `act` in copies of a folder, as often as it writes there, each time killing it before another write.

    Args:
        folder: The folder, which stays as it is.
        act: What is run; and run again after it was killed.
        look: Returns what is to be seen in the copy, which is then the current folder; called in a process of its own.
    """
    kills = []
    while True:
        copy = folder.with_name(f"{folder.name}-{len(kills)}")
        shutil.copytree(folder, copy)
        os.chdir(copy)
        log = copy.with_suffix(".event")
        status = _fork(lambda log=log: _run(act, len(kills), log))
        if status == 0:
            assert kills, "nothing was written"
            return kills
        assert status == KILLED, f"it failed by itself at the write {len(kills)}, with status {status}"
        between = _see(look, log.with_suffix(".seen"))
        assert _fork(act) == 0, f"the run after a kill at {log.read_text()} failed"
        kills.append(Kill(log.read_text(), between, _see(look, log.with_suffix(".seen"))))
        os.chdir(folder)
        shutil.rmtree(copy)


def _see(look: Look, file: Path) -> Any:
    """Return what `look` sees in a fork, so that this process starts no threads, which a fork would not survive."""

    def write() -> None:
        file.write_text(json.dumps(look()))

    assert _fork(write) == 0
    return json.loads(file.read_text())


def _run(act: Callable[[], None], number: int, log: Path) -> None:
    seen = 0
    here = f"{Path.cwd()}/"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, mode, flags = arguments
            writes = bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        elif event in CHANGES:
            path, writes = arguments[0], True
        else:
            return
        if (
            not writes
            or not isinstance(path, str | os.PathLike)
            or not os.path.abspath(path).startswith(here)
            or f"{path}".endswith(".lock")
        ):
            return
        if seen == number:
            log.write_text(f"{event} {path}")  # outside of the folder, so that it is no write by itself
            os._exit(KILLED)
        seen += 1

    sys.addaudithook(hook)
    act()


def _fork(act: Callable[[], None]) -> int:
    """Run a function in a fork of this process; return its exit status."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
