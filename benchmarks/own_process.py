"""Measurements in a separate process: time and peak resident memory."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Call `work` and return the seconds that it took, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def in_a_process(script: str, *arguments: str) -> dict[str, float]:
    """Run a script in a separate process and parse the last line of its output as JSON."""
    done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(Path(script).stem, " ".join(arguments), result, flush=True)
    return result


def peak() -> float:
    """Peak resident memory of this process in MB, from VmHWM, as ru_maxrss may be inherited from the parent."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
