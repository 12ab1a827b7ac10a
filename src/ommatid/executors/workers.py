"""What worker processes have in common, wherever they run."""

import os
import pickle
import socket
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from ommatid.errors import ExecutorError, OmmatidError

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


WAITING = {"GOMP_SPINCOUNT": "1000"}
"""Threads that wait for others look so often before they sleep; read by OpenMP when torch is loaded.

Measured on a training step, 2 cores: sleeping at once (OMP_WAIT_POLICY=PASSIVE) takes 81 ms in place of 67 on a quiet machine, looking as
long as by default 405 ms in place of 122 beside another busy process; looking so often 70 and 138 ms.
"""

_SECONDS_TO_CONNECT = 30
"""Of one TCP connection, which a busy machine takes as fast as a quiet one."""


def thread_settings(n_workers: int) -> dict[str, str]:
    """Environment of worker processes that share this machine: together they run as many threads as it has cores.

    OpenMP reads it when torch is loaded, so it must be there when the process starts.
    """
    share = max(1, (os.cpu_count() or 1) // n_workers)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    n = str(min(share, int(asked)) if asked.isdigit() else share)
    return {"OMP_NUM_THREADS": n, "MKL_NUM_THREADS": n, "OPENBLAS_NUM_THREADS": n, **WAITING}


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started in this block inherit these variables; afterwards they are as they were."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class Driver:
    """What workers must know of the process that they work for."""

    versions: Mapping[str, str]
    """Of what makes the numbers."""
    folder: str
    """Its current directory: params name models relative to it."""

    @classmethod
    def here(cls) -> "Driver":
        """This process."""
        return cls(_versions(), os.getcwd())

    @contextmanager
    def hosted(self, where: str) -> Iterator[None]:
        """Called in the worker, `where`: in this block paths mean what they mean to the driver, if the machine sees its folder.

        Raises:
            ExecutorError: libraries differ, which would make other bytes; names the worker.
        """
        ours = _versions()
        different = [f"{name} {ours[name]} instead of {version}" for name, version in self.versions.items() if ours[name] != version]
        if different:
            raise ExecutorError(
                f"worker {where}: has {', '.join(different)}; install on all workers what is installed here, and start them again"
            )
        with chdir(self.folder) if os.path.isdir(self.folder) else nullcontext():
            yield


@cache
def _versions() -> dict[str, str]:
    """Without the local part: torch for CPUs and for GPUs are one version."""
    libraries = ("ommatid", "torch", "transformers", "numpy", "pyarrow", "pillow")
    return {name: metadata.version(name).partition("+")[0] for name in libraries}


def reach(address: str) -> None:
    """Refuse the address of a cluster at once where nobody listens: clients of clusters themselves try for up to minutes.

    Raises:
        OSError: nobody listens there.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_CONNECT).close()


def attempt(job: Callable[[int], None], shard: int) -> Exception | None:
    """Make a shard in a worker; returns what it raised, as an error that can be sent to the driver."""
    try:
        job(shard)
    except OmmatidError as error:
        return error
    except Exception as error:  # ours to mend: the driver shows where it happened
        error.add_note(f"In a worker process, at shard {shard}:\n{traceback.format_exc()}")
        try:
            return pickle.loads(pickle.dumps(error))
        except Exception:
            return RuntimeError(*error.__notes__)
    return None
