"""Commands as child processes whose lines are passed on as they arrive, and which end with this process. Imports no Prefect."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from flows.parent_watch import end_all

Say = Callable[[str], None]
"""Called with each line of a run's log."""

_HINTS = ("To track the changes with git", "git add dvc.lock", "To enable auto staging", "dvc config core.autostage", "Use `dvc push`")
"""Advice of DVC that does not belong in a run's log."""


def take_no_arguments(module: str, description: str | None) -> None:
    """Refuse arguments of a main program that has none, and print its description on `--help`; both end the process."""
    argparse.ArgumentParser(prog=f"python -m {module}", description=description, allow_abbrev=False).parse_args()


def stream(module: Sequence[str], root: Path, env: Mapping[str, str], say: Say, held: Sequence[int] = ()) -> tuple[int, list[str]]:
    """Run a Python module and pass on its lines as they arrive.

    It does not outlive this process for long: any exception here ends it, a Prefect worker that cancels a run kills the whole process
    group, and if this process is killed, it ends after its own children (flows/parent_watch.py).

    Args:
        module: Name of the module, and its arguments.
        root: Folder that it works in.
        env: Its environment.
        say: Called with each line.
        held: File descriptors that it keeps open until it ends, such as that of a lock.

    Returns:
        The exit status, and all lines.
    """
    lines: list[str] = []
    command = [sys.executable, "-P", str(Path(__file__).with_name("parent_watch.py")), *module]
    with subprocess.Popen(
        command, cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", pass_fds=held,
    ) as child:  # fmt: skip
        assert child.stdout
        try:
            for line in map(str.rstrip, child.stdout):
                if line and not any(hint in line for hint in _HINTS):
                    lines.append(line)
                    say(line)
            return child.wait(), lines
        except BaseException:
            end(child)
            raise


def end(child: "subprocess.Popen[Any]", seconds: float = 60) -> None:
    """End a child process and all of its descendants, killing those still running after `seconds`."""
    try:
        process = psutil.Process(child.pid)
        tree = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    end_all(tree, seconds)
    child.wait()
