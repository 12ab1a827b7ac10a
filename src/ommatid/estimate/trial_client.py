"""The process in which trials of a stage run, as the estimating process sees it; `trial_worker` is the other side."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ommatid import errors
from ommatid.errors import OmmatidError
from ommatid.executors.workers import OPENMP_SETTINGS

MODULE = "ommatid.estimate.trial_worker"


@dataclass(frozen=True)
class RunCost:
    """Cost of one run of a stage."""

    seconds: float
    """Seconds of the run; for the first run of a process, seconds since the process was started."""
    peak: int
    """Largest resident set of the process so far, in bytes."""
    spans: Mapping[str, float]
    """Seconds between the first and the last progress event of each kind of work."""


class StageProcess:
    """A process that runs one stage on samples, one after another.

    It starts with the first run. As a context manager it is killed when the block ends, with all that it started. What the stage prints
    goes to a file.
    """

    def __init__(self, stage: str, environment: Mapping[str, str], log: Path) -> None:
        self.stage = stage
        self._environment = environment
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "StageProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    _not_none(pipe).close()

    def run(self, params: Mapping[str, Any], data: Path, whole: Mapping[str, int] | None = None) -> RunCost:
        """Run the stage once.

        Args:
            params: All params, nested.
            data: Root of the artefacts.
            whole: For training, `epochs` of the whole run and `n_tokens` of one of its epochs; see `trial_worker`.

        Returns:
            The cost of the run.

        Raises:
            OmmatidError: The stage failed (the error is its own), or the process died.
        """
        start = time.perf_counter()
        is_first = self._process is None
        answer = self._ask({"stage": self.stage, "params": params, "data": str(data), "whole": whole})
        if "error" in answer:
            self._raise(answer["error"], answer["message"])
        seconds = time.perf_counter() - start if is_first else answer["seconds"]
        return RunCost(seconds, answer["peak"], answer["spans"])

    def end(self) -> float:
        """Wait until the process has ended by itself, and return the seconds that this took."""
        process, start = _not_none(self._process), time.perf_counter()
        _not_none(process.stdin).close()
        process.wait()
        return time.perf_counter() - start

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process = self._process or self._start()
        try:
            _not_none(process.stdin).write(json.dumps(request) + "\n")
            _not_none(process.stdin).flush()
            line = _not_none(process.stdout).readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            tail = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
            raise OmmatidError(
                f"estimate: the trial of stage {self.stage} died ({how}), usually for lack of memory; its last lines were {tail}"
            )
        return json.loads(line)

    def _start(self) -> "subprocess.Popen[str]":
        with self._log.open("w", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-m", MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**OPENMP_SETTINGS, **os.environ, **self._environment},  # as the command line does
                start_new_session=True,  # Ctrl-C interrupts this process only, which then kills the whole session
            )

    def _raise(self, name: str, message: str) -> None:
        error = getattr(errors, name, None) if name else None
        if error is None:
            raise AssertionError(f"the trial of stage {self.stage} failed:\n{message}")
        raise error(message)


def _not_none(value: "IO[str] | subprocess.Popen[str] | None") -> Any:
    assert value is not None
    return value
