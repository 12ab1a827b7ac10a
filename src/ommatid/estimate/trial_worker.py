"""The process in which trials run: it runs a stage as `ommatid <stage>` does, once for each request, and answers with what it cost.

Requests are lines of JSON on standard input, and answers are lines of JSON on standard output. The process ends when its input ends.
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
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what stages print goes to standard error, apart from the answers
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    is_busy = threading.Event()
    threading.Thread(target=_listen, args=(requests, is_busy), daemon=True).start()
    while line := requests.get():
        is_busy.set()
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()
        is_busy.clear()


def _listen(requests: "queue.SimpleQueue[str]", is_busy: threading.Event) -> None:
    """Queue requests, and an empty one when the input ends. If it ends during a run, the estimating process is dead, so exit at once."""
    for line in sys.stdin:
        requests.put(line)
    if is_busy.is_set():
        os._exit(1)
    requests.put("")


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    from ommatid.errors import OmmatidError

    try:
        return _run(**request)
    except OmmatidError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except Exception:
        return {"error": "", "message": traceback.format_exc()}


def _run(stage: str, params: dict[str, Any], data: str, whole: dict[str, int] | None) -> dict[str, Any]:
    """Run a stage. Failed checks of the gate are only reported, because a sample may fail where the whole does not.

    Args:
        stage: Name of the stage.
        params: All params, nested.
        data: Root of the artefacts.
        whole: For training, `epochs` of the whole run and `n_tokens` of one of its epochs.

    Returns:
        The answer: `seconds`, `peak` and `spans`, as in `RunCost`.
    """
    start = time.perf_counter()
    from ommatid.config import Params
    from ommatid.pipeline.run import run_stage

    checked, spans = Params.model_validate(params), _Spans()
    run_stage(stage, checked, spans, data, must_pass=False, run=_like_the_whole(checked.train, **whole) if whole else None)
    seconds = time.perf_counter() - start
    gc.collect()  # free the networks before the next run loads them again
    return {"seconds": seconds, "peak": _peak(), "spans": spans.seconds}


def _like_the_whole(params: Any, epochs: int, n_tokens: int) -> Callable[..., Any]:
    """Change the `run` of stage `train` so that the steps of a trial cost as much as those of the whole run.

    Args:
        params: Section `train` of the trial.
        epochs: Number of epochs of the whole run.
        n_tokens: Number of training tokens in an epoch of the whole run.

    Returns:
        The changed function.
    """
    from ommatid.sae.schedule import make_plan
    from ommatid.train.stage import run

    return partial(run, whole=make_plan(params.model_copy(update={"epochs": epochs}), n_tokens))


class _Spans:
    """Listener that measures how long each kind of work takes, from its first event to its last."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        """Seconds by kind of work."""

    def __call__(self, event: Any) -> None:
        what, now = getattr(event, "what", None), time.perf_counter()
        if what is not None:
            self.seconds[what] = now - self._first.setdefault(what, now)


def _peak() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # preferred, because ru_maxrss of a new process can be that of its parent
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
