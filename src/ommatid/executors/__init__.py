"""Who runs the shards of an extraction: this machine, a Dask cluster or a Ray cluster. None of them knows what a shard is.

A job makes one shard: it leaves its result in storage, returns nothing, and may be done twice. So all that an executor owes is that
every shard is made, whatever happens to the processes that make them. Workers must run the versions that the driver runs, and
reach the same storage under the same names.
"""

from collections.abc import Callable, Sequence

from ommatid.config import DaskExecutor, Executor, LocalExecutor, RayExecutor


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
    # each library is imported when it is asked for: they are extras
    match params:
        case LocalExecutor():
            from ommatid.executors import local

            local.run(job, shards, on_done)
        case DaskExecutor():
            from ommatid.executors import dask

            dask.run(params, job, shards, on_done)
        case RayExecutor():
            from ommatid.executors import ray

            ray.run(params, job, shards, on_done)
