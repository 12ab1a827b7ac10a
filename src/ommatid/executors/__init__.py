"""Who runs the shards of an extraction."""

from collections.abc import Callable, Sequence

from ommatid.config import Executor, LocalExecutor


def run(params: Executor, job: Callable[[int], None], shards: Sequence[int], on_done: Callable[[int], None]) -> None:
    """Run a job for every shard; what it makes goes to storage only."""
    assert isinstance(params, LocalExecutor), params
    for shard in shards:
        job(shard)
        on_done(shard)
