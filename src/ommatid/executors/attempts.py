"""Shards on their way to workers, and how often each may fail."""

from collections import Counter, deque
from collections.abc import Iterable

from ommatid.errors import ExecutorError

ATTEMPTS = 3


class Waiting:
    """Shards that wait for a worker. One that failed waits again, until it has failed `ATTEMPTS` times."""

    def __init__(self, shards: Iterable[int]) -> None:
        self._fresh = iter(shards)
        self._again: deque[int] = deque()
        self._failures: Counter[int] = Counter()

    def take(self) -> int | None:
        """The next one; None: all have been taken."""
        return self._again.popleft() if self._again else next(self._fresh, None)

    def failed(self, shard: int, error: Exception) -> None:
        """Put it back.

        Raises:
            Exception: `error`, where it was the last attempt.
        """
        self._failures[shard] += 1
        if self._failures[shard] == ATTEMPTS:
            raise error
        self._again.append(shard)


def died(shard: int, attempts: int, how: str) -> ExecutorError:
    """What is said of a shard whose last worker died."""
    return ExecutorError(
        f"shard {shard}: failed {attempts} times, the last time because its worker died ({how}). Too little memory is the usual "
        "reason: lower extract.batch_size or the number of workers, then run the stage again: what is finished is kept"
    )
