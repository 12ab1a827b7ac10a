"""Ray: the only file that knows `ray`.

A worker is an actor, for an actor keeps its process, its GPU and so the loaded model from shard to shard. A task does not: Ray ends
the process after each one that has a GPU, and one that is kept may be given another GPU than the one its model is on.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ommatid.config.extract import RayExecutor
from ommatid.errors import ExecutorError
from ommatid.executors.workers import ATTEMPTS, Driver, Waiting, attempt, died, environment, reach, thread_settings

# read at import: nothing is reported to Ray's makers, and no code is uploaded where the driver runs under uv
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise ExecutorError(f"extract.executor: ray is not installed ({error}); pip install 'ommatid[ray]'") from None

_SECONDS_WITHOUT_WORKERS = 300
"""Clusters that grow take minutes to start a node."""
_OBJECT_STORE = 100 * 2**20
"""Bytes; nothing is sent through it."""


def run(params: RayExecutor, job: Callable[[int], None], shards: Sequence[int], on_done: Callable[[int], None]) -> None:
    """Run a job for every shard on a cluster that is there, or on one for the time of the run.

    Raises:
        ExecutorError: no cluster answers, workers run other versions, or those of one shard died again and again.
        OmmatidError: what the job raised three times.
    """
    with _connected(params):
        _Pool(job, shards, on_done).run()


@contextmanager
def _connected(params: RayExecutor) -> Iterator[None]:
    with _quiet_logger():
        if params.address:
            _connect(params.address)
        else:
            _start(params.workers)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _quiet_logger() -> Iterator[None]:
    """Ray's logger says at every start how it authenticates, and where its pages would be."""
    logger = logging.getLogger("ray")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


_QUIET: Mapping[str, Any] = {"configure_logging": False, "log_to_driver": False}


def _start(n_workers: int) -> None:
    """A cluster on this machine without pages. It listens to others, too; by default it asks them for a token."""
    with environment(thread_settings(n_workers)):
        ray.init("local", num_cpus=n_workers, include_dashboard=False, object_store_memory=_OBJECT_STORE, **_QUIET)


def _connect(address: str) -> None:
    try:
        reach(address)
        ray.init(address, **_QUIET)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise ExecutorError(
            f"extract.executor.address: no Ray cluster answers at {address} ({error}); start one, mend the address, or set "
            "RAY_AUTH_MODE=token for one that asks for a token"
        ) from None


class _Worker:
    """What an actor does."""

    def __init__(self, job: Callable[[int], None], driver: Driver) -> None:
        self._job = job
        self._driver = driver

    def start(self) -> None:
        """The first call, answered when the actor has found a place."""

    def make(self, shard: int) -> Exception | None:
        """Returns what the job raised."""
        try:
            with self._driver.hosted(ray.util.get_node_ip_address()):
                return attempt(self._job, shard)
        except ExecutorError as error:
            return error


class _Pool:
    """As many workers as the cluster has GPUs, or cores; one that dies is replaced."""

    def __init__(self, job: Callable[[int], None], shards: Sequence[int], on_done: Callable[[int], None]) -> None:
        self._job = job
        self._waiting = Waiting(shards)
        self._n_left = len(shards)
        self._on_done = on_done
        self._calls: dict[ray.ObjectRef, tuple[Any, int | None]] = {}
        """Worker and the shard that it makes; None: it is starting."""
        self._failed_starts = 0

    def run(self) -> None:
        try:
            while self._n_left:
                self._hire()
                self._finish(self._next_done())
        finally:
            for worker, _ in self._calls.values():
                ray.kill(worker)

    def _hire(self) -> None:
        """Start workers; where the cluster is busy with other work, some may wait for a place for as long as the run."""
        resources = ray.cluster_resources()
        needs = {"num_cpus": "CPU", "num_gpus": "GPU"} if resources.get("GPU") else {"num_cpus": "CPU"}
        places = max(1, min(int(resources.get(name, 0)) for name in needs.values()))
        for _ in range(len(self._calls), min(places, self._n_left)):
            worker = ray.remote(_Worker).options(**dict.fromkeys(needs, 1)).remote(self._job, Driver.here())
            self._calls[worker.start.remote()] = worker, None

    def _next_done(self) -> "ray.ObjectRef":
        while True:
            done, _ = ray.wait(list(self._calls), num_returns=1, timeout=_SECONDS_WITHOUT_WORKERS)
            if done:
                return done[0]
            if all(shard is None for _, shard in self._calls.values()):
                raise ExecutorError(
                    f"the Ray cluster has had no place for a worker for {_SECONDS_WITHOUT_WORKERS} seconds; start nodes or wait until "
                    "others end, then run the stage again: what is finished is kept"
                )

    def _finish(self, call: "ray.ObjectRef") -> None:
        worker, shard = self._calls[call]
        alive, error = _outcome(call, shard)
        if shard is None:
            self._started(error)
        elif error:
            self._waiting.failed(shard, error)
        else:
            self._n_left -= 1
            self._on_done(shard)
        del self._calls[call]
        shard = self._waiting.take() if alive else None
        if shard is not None:
            self._calls[worker.make.remote(shard)] = worker, shard

    def _started(self, error: Exception | None) -> None:
        """Nodes may go while their workers start, but not one after the other."""
        self._failed_starts = self._failed_starts + 1 if error else 0
        if error and self._failed_starts == ATTEMPTS:
            raise error


def _outcome(call: "ray.ObjectRef", shard: int | None) -> tuple[bool, Exception | None]:
    """Whether the worker lives, and what is to be said of the call."""
    try:
        return True, ray.get(call)
    except RayTaskError:
        raise  # not what the job raised: that is returned
    except RayError as error:
        how = str(error).strip().splitlines()[-1].partition(" Some common causes")[0]
        return False, _not_started(how) if shard is None else died(shard, ATTEMPTS, how)


def _not_started(how: str) -> ExecutorError:
    return ExecutorError(f"extract.executor: a worker cannot start ({how}); all nodes need what is installed here")
