"""Who runs the shards of an extraction: this machine, a Dask cluster or a Ray cluster. None of them knows what a shard is.

A job makes one shard: it leaves its result in storage, returns nothing, and may be done twice. So all that an executor owes is that
every shard is made, whatever happens to the processes that make them. Workers must run the versions that the driver runs, and
reach the same storage under the same names.

An executor is a section of `config/extract.py` and the module here that its `kind` names, with a function `run`.
"""

from collections.abc import Callable, Sequence
from importlib import import_module

from ommatid.config import Executor


def run(params: Executor, job: Callable[[int], None], shards: Sequence[int], on_done: Callable[[int], None]) -> None:
    """Run a job for every shard; returns when all are made.

    Args:
        params: Who runs them.
        job: Small enough to send anywhere; loads what it needs when it is first called in a process.
        shards: Numbers of the shards, each once.
        on_done: Called here, with the number of each shard that is made, in any order.

    Raises:
        ExecutorError: no cluster answers, its workers run other versions, or the workers of one shard died again and again.
        OmmatidError: what the job raised, after it was tried as often as the executor tries.
    """
    if not shards:
        return
    # the library of a cluster is an extra: it is imported when it is asked for
    import_module(f"{__name__}.{params.kind}").run(params, job, shards, on_done)
