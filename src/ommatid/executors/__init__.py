"""Executors, which run the shards of an extraction on this machine, a Dask cluster or a Ray cluster, without knowing what a shard is.

A job makes one shard: it leaves its result in storage, returns nothing, and may be repeated. An executor only has to ensure that every
shard is made, whatever happens to the processes that make them. Workers must run the same versions of libraries as the driver, and reach
the same storage under the same names.

An executor consists of a section in `config/extract.py` and a module here that is named after its `kind` and has a function `run`.
"""

from collections.abc import Callable, Sequence
from importlib import import_module

from ommatid.config import Executor


def run(params: Executor, job: Callable[[int], None], shards: Sequence[int], on_done: Callable[[int], None]) -> None:
    """Run a job for every shard, and return when all are made.

    Args:
        params: Parameters of the executor.
        job: Function that makes a shard. It must be small when pickled, and load what it needs on its first call in a process.
        shards: Numbers of the shards, without repetitions.
        on_done: Called in this process with the number of each finished shard, in any order.

    Raises:
        ExecutorError: No cluster answers, its workers run other versions, or the workers of one shard died repeatedly.
        OmmatidError: The job raised it in every attempt.
    """
    if not shards:
        return
    # Imported here because the library of a cluster is an optional dependency.
    import_module(f"{__name__}.{params.kind}").run(params, job, shards, on_done)
