"""Git, DVC and other commands as child processes: their environment, their output, and why they failed."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Container, Mapping
from pathlib import Path

from ommatid.errors import RunError

DVC = [sys.executable, "-m", "dvc"]
"""The DVC of this Python environment."""
_GIT_HOOKS = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"}
"""Variables that git sets for its hooks, and that would redirect our own git commands."""


def environment(root: Path, checkout: Path, experiment: str | None = None, run: str | None = None) -> dict[str, str]:
    """Make the environment of a command.

    Args:
        root: Folder that the command works in, and whose code it imports.
        checkout: Checkout that the run was started in.
        experiment: Name of the DVC experiment; None: the run works in the checkout.
        run: Id of the Prefect flow run, if there is one.

    Returns:
        This process's environment, with our own variables.
    """
    ours = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root / "src"), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",  # or all progress lines arrive at the end
        "OMMATID_CHECKOUT": str(checkout),
        "OMMATID_EXPERIMENT": experiment or "",
        "OMMATID_FLOW_RUN": run or "",
    }
    return {**{key: value for key, value in os.environ.items() if key not in _GIT_HOOKS}, **{k: v for k, v in ours.items() if v}}


def git(
    root: Path, *arguments: str, variables: Mapping[str, str] | None = None, ok: Container[int] = (0,), seconds: float | None = None
) -> str:
    """Run a git command in `root` and return its output.

    Args:
        root: Folder that the command works in.
        arguments: Arguments of git.
        variables: Environment variables on top of ours.
        ok: Exit statuses that are no failure.
        seconds: Time after which the command is ended with all that it started; None for no limit.

    Raises:
        RunError: The command failed, or took too long.
    """
    identity = _identity(root) if arguments[0] == "commit-tree" else {}
    return _output_of(["git", *arguments], root, {**environment(root, root), **identity, **(variables or {})}, ok, seconds).strip()


def dvc(root: Path, env: Mapping[str, str], *arguments: str, seconds: float | None = None) -> str:
    """Run a DVC command in `root` and return its output.

    Args:
        root: Folder that the command works in.
        env: Environment of the command.
        arguments: Arguments of DVC.
        seconds: As of `git`.

    Raises:
        RunError: The command failed, or took too long.
    """
    return _output_of([*DVC, "--wait-for-lock", *arguments], root, {**env, **_identity(root)}, seconds=seconds)


def _identity(root: Path) -> dict[str, str]:
    """Environment variables that name an author if git has none, as in a fresh container, where it would refuse to commit."""
    try:
        email = _output_of(["git", "config", "user.email"], root, environment(root, root))
    except RunError:
        email = ""
    identity = {"NAME": "ommatid", "EMAIL": "ommatid@localhost"}
    return {} if email else {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in identity.items()}


def _output_of(command: list[str], root: Path, env: Mapping[str, str], ok: Container[int] = (0,), seconds: float | None = None) -> str:
    what = " ".join(command).replace(" ".join([*DVC, "--wait-for-lock"]), "dvc")
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    try:
        process = subprocess.Popen(command, cwd=root, env=env, start_new_session=seconds is not None, **pipes)
    except OSError as error:
        raise RunError(
            f"{command[0]} cannot be started in {root} ({error.strerror}); is it installed, and does the folder exist?"
        ) from None
    with process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException as error:
            if seconds is None:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)  # with what it started, such as ssh, which would hold the pipes open
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise RunError(f"{what}: took longer than {seconds:,.0f} seconds and was ended") from None
    if process.returncode not in ok:
        raise RunError(f"{what}: {find_error(errors.splitlines(), process.returncode)}")
    return output


def find_error(lines: list[str], code: int) -> str:
    """Find out why a command failed.

    Args:
        lines: Output of the command.
        code: Its exit status.

    Returns:
        The first of these that exists: the stage's own error, the signal that killed it, the error of DVC or git, the last line.
    """
    if error := _last_line(lines, "error: "):
        return error
    if signal_ := _explain_signal(lines, code):
        return signal_
    if error := _last_line(lines, "ERROR: ") or _last_line(lines, "fatal: "):
        return error
    return next((line for line in reversed(lines) if line.strip()), f"ended with status {code} and no message")


def _last_line(lines: list[str], prefix: str) -> str | None:
    return next((line.removeprefix(prefix) for line in reversed(lines) if line.startswith(prefix)), None)


_SIGNALS = {
    signal.SIGKILL: "almost always by the system, because memory ran out (`dmesg` says so): use less of it, or a machine with more",
    signal.SIGABRT: "a library gave up, most often because memory ran out: use less of it, or a machine with more",
    signal.SIGSEGV: "a library crashed: run the stage again, and report it if it happens twice",
    signal.SIGBUS: "a file was truncated while it was being read, or the disk failed: check the disk's health (`dmesg`)",
    signal.SIGILL: "a library was built for another kind of processor: install the one for this machine",
    signal.SIGXCPU: "its limit of processor time was reached (`ulimit -t`)",
}
"""What it means when a stage is killed by a signal, and what to do."""
_EXIT_STATUS = re.compile(r"exited with (-?\d+)")
"""DVC's words for the exit status of a stage's command."""


def _explain_signal(lines: list[str], code: int) -> str | None:
    """Explain the signal that ended a stage without a message of its own; None if there was no signal or it is not known."""
    reported = [int(found[1]) for line in lines if (found := _EXIT_STATUS.search(line))]
    status = reported[-1] if reported else code
    number = -status if status < 0 else status - 128  # a shell reports signal N as 128 + N
    meaning = next((meaning for known, meaning in _SIGNALS.items() if known == number), None)
    return f"killed by {signal.Signals(number).name}: {meaning}; what is finished is kept" if meaning else None
