"""A trial's process, seen from the one that estimates."""

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

MODULE = "ommatid.estimate.trial"


@dataclass(frozen=True)
class RunCost:
    """What one run of a stage took."""

    seconds: float
    """The first run of a process: from its start on."""
    peak: int
    """Largest resident set of the process so far, in bytes."""
    spans: Mapping[str, float]
    """Seconds from the first to the last event of each kind of work."""


class StageProcess:
    """Runs one stage on samples, one after the other; started with the first, and ended with the block.

    What the stage prints goes to a file. Nothing of it is left after the block, however that ends.
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
                    _there(pipe).close()

    def run(self, params: Mapping[str, Any], data: Path, whole: Mapping[str, int] | None = None) -> RunCost:
        """Run the stage once; see `trial._run`.

        Raises:
            OmmatidError: what the stage raised, or the process died.
        """
        start = time.perf_counter()
        is_first = self._process is None
        answer = self._ask({"stage": self.stage, "params": params, "data": str(data), "whole": whole})
        if "error" in answer:
            self._raise(answer["error"], answer["message"])
        seconds = time.perf_counter() - start if is_first else answer["seconds"]
        return RunCost(seconds, answer["peak"], answer["spans"])

    def end(self) -> float:
        """Let it end by itself; gives the seconds that it took to."""
        process, start = _there(self._process), time.perf_counter()
        _there(process.stdin).close()
        process.wait()
        return time.perf_counter() - start

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process = self._process or self._start()
        try:
            _there(process.stdin).write(json.dumps(request) + "\n")
            _there(process.stdin).flush()
            line = _there(process.stdout).readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
            raise OmmatidError(f"estimate: the trial of stage {self.stage} died ({how}); too little memory is the usual reason {said}")
        return json.loads(line)

    def _start(self) -> "subprocess.Popen[str]":
        with self._log.open("w", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-m", MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**OPENMP_SETTINGS, **os.environ, **self._environment},  # as the command line sets it
                start_new_session=True,  # Ctrl-C comes to us: we end it with all that it started
            )

    def _raise(self, name: str, message: str) -> None:
        error = getattr(errors, name, None) if name else None
        if error is None:
            raise AssertionError(f"the trial of stage {self.stage} failed:\n{message}")
        raise error(message)


def _there(found: "IO[str] | subprocess.Popen[str] | None") -> Any:
    assert found is not None
    return found
