"""Functions that the worker processes of all executors share."""

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
"""Number of times that a shard is tried."""


class ShardQueue:
    """Shards that wait for a worker. A shard that failed is queued again, until it has failed `ATTEMPTS` times."""

    def __init__(self, shards: Iterable[int]) -> None:
        self._untried = iter(shards)
        self._failed: deque[int] = deque()
        self._failures: Counter[int] = Counter()

    def take(self) -> int | None:
        """Return the next shard, or None if no shard is waiting."""
        return self._failed.popleft() if self._failed else next(self._untried, None)

    def put_back(self, shard: int, error: Exception) -> None:
        """Queue a failed shard again.

        Raises:
            Exception: `error` itself, if this was the last attempt.
        """
        self._failures[shard] += 1
        if self._failures[shard] == ATTEMPTS:
            raise error
        self._failed.append(shard)


def worker_died(shard: int, attempts: int, how: str) -> ExecutorError:
    """Make the error for a shard whose last worker died."""
    return ExecutorError(
        f"shard {shard}: failed {attempts} times, the last time because its worker died ({how}). Too little memory is the usual "
        "reason: lower the number of workers, or extract.batch_size, then run the stage again; finished shards are kept"
    )


OPENMP_SETTINGS = {"GOMP_SPINCOUNT": "1000"}
"""Number of times that a waiting thread polls before it sleeps. OpenMP reads it when torch is loaded.

A training step on 2 cores takes 67 ms by default on an idle machine, but 405 ms beside another busy process. If threads sleep at once
(OMP_WAIT_POLICY=PASSIVE), it takes 81 and 122 ms; with this setting, 70 and 138 ms.
"""

_SECONDS_TO_CONNECT = 30
"""Timeout of a TCP connection, which a busy machine accepts as quickly as an idle one."""


def thread_settings(n_workers: int) -> dict[str, str]:
    """Return environment variables that divide the cores of this machine among its worker processes, as threads.

    OpenMP reads them when torch is loaded, so they must be set before a process starts.
    """
    share = max(1, (os.cpu_count() or 1) // n_workers)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    n = str(min(share, int(limit)) if limit.isdigit() else share)
    return {"OMP_NUM_THREADS": n, "MKL_NUM_THREADS": n, "OPENBLAS_NUM_THREADS": n, **OPENMP_SETTINGS}


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the block, for processes started there to inherit, and restore them afterwards."""
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
    """What workers need to know about the driver, the process that they work for."""

    versions: Mapping[str, str]
    """Versions of the libraries that affect results, by name."""
    folder: str
    """Current directory, to which the paths of models in the parameters are relative."""

    @classmethod
    def here(cls) -> "Driver":
        """Describe this process."""
        return cls(_versions(), os.getcwd())

    @contextmanager
    def enter(self, where: str) -> Iterator[None]:
        """Check versions in a worker, and run the block in the driver's current directory if the worker's machine has it.

        Args:
            where: Address of the worker, for messages.

        Raises:
            ExecutorError: The worker has other versions of libraries, which could give different results.
        """
        ours = _versions()
        different = [f"{name} {ours[name]} instead of {version}" for name, version in self.versions.items() if ours[name] != version]
        if different:
            raise ExecutorError(
                f"worker {where}: has {', '.join(different)}; install the same versions on all workers as here, and restart them"
            )
        with chdir(self.folder) if os.path.isdir(self.folder) else nullcontext():
            yield


@cache
def _versions() -> dict[str, str]:
    """Return versions without their local part, so that the builds of torch for CPUs and GPUs count as the same version."""
    libraries = ("ommatid", "torch", "transformers", "numpy", "pyarrow", "pillow")
    return {name: metadata.version(name).partition("+")[0] for name in libraries}


def check_reachable(address: str) -> None:
    """Fail at once if nothing listens at the address of a cluster, because the clusters' own clients keep trying for minutes.

    Raises:
        OSError: Nothing listens there.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_CONNECT).close()


def attempt(job: Callable[[int], None], shard: int) -> Exception | None:
    """Make a shard in a worker, and return the error that it raised, if any, in a form that can be sent to the driver."""
    try:
        job(shard)
    except OmmatidError as error:
        return error
    except Exception as error:  # A bug in our code: the note lets the driver show where it happened.
        error.add_note(f"In a worker process, at shard {shard}:\n{traceback.format_exc()}")
        try:
            return pickle.loads(pickle.dumps(error))
        except Exception:
            return RuntimeError(*error.__notes__)
    return None
