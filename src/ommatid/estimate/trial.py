"""The process of a trial: runs one stage again and again, as `ommatid <stage>` runs it, and says how long each run took.

Requests come as lines of JSON on the standard input, answers go as lines of JSON to the standard output; the end of the input ends it.
"""

import gc
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what stages print is no answer
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    is_busy = threading.Event()
    threading.Thread(target=_listen, args=(asked, is_busy), daemon=True).start()
    while line := asked.get():
        is_busy.set()
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()
        is_busy.clear()


def _listen(asked: "queue.SimpleQueue[str]", is_busy: threading.Event) -> None:
    """Pass requests on, then an empty one; where the input ends before the answer is there, whoever asked is dead."""
    for line in sys.stdin:
        asked.put(line)
    if is_busy.is_set():
        os._exit(1)
    asked.put("")


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    from ommatid.errors import OmmatidError

    try:
        return _run(**request)
    except OmmatidError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except Exception:
        return {"error": "", "message": traceback.format_exc()}


def _run(stage: str, params: dict[str, Any], data: str, whole: dict[str, int] | None) -> dict[str, Any]:
    """Run a stage with the gate as a witness only: a sample may fail where the whole does not.

    Args:
        stage: Which.
        params: All params, nested.
        data: Root of the artefacts.
        whole: For training, what the whole run has: `epochs` and `n_tokens` of an epoch.
    """
    start = time.perf_counter()
    from ommatid.config import Params
    from ommatid.pipeline.run import run_stage

    checked, spans = Params.model_validate(params), _Spans()
    run_stage(stage, checked, spans, data, must_pass=False, run=_like_the_whole(checked.train, **whole) if whole else None)
    seconds = time.perf_counter() - start
    gc.collect()  # networks first: the next run loads them again
    return {"seconds": seconds, "peak": _peak(), "spans": spans.seconds}


def _like_the_whole(params: Any, epochs: int, n_tokens: int) -> Callable[..., Any]:
    """Return a training whose steps cost as much as those of the whole run.

    Args:
        params: Section `train` of the trial.
        epochs: Epochs of the whole run.
        n_tokens: Training tokens of an epoch of the whole run.
    """
    from ommatid.sae.schedule import make_plan
    from ommatid.train.stage import run

    return partial(run, whole=make_plan(params.model_copy(update={"epochs": epochs}), n_tokens))


class _Spans:
    """How long each kind of work took, from its first event to its last."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def __call__(self, event: Any) -> None:
        what, now = getattr(event, "what", None), time.perf_counter()
        if what is not None:
            self.seconds[what] = now - self._first.setdefault(what, now)


def _peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a new process can be that of the one that started it
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
