"""Execution on a Ray cluster. This is the only file that imports `ray`.

A worker is an actor, because an actor keeps its process, its GPU and thus the loaded model from shard to shard. A task would not: Ray ends
the process after each task that uses a GPU, and if it keeps a process, the next task may get a GPU that does not hold the model.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ommatid.config.extract import RayExecutor
from ommatid.errors import ExecutorError
from ommatid.executors.workers import ATTEMPTS, Driver, ShardQueue, attempt, check_reachable, environment, thread_settings, worker_died

# Ray reads these when it is imported. They disable usage reports, and the upload of code if the driver runs under uv.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise ExecutorError(f"extract.executor: ray is not installed ({error}); pip install 'ommatid[ray]'") from None

_SECONDS_WITHOUT_WORKERS = 300
"""Time after which a cluster without room for a worker is given up. Autoscaling clusters take minutes to start a node."""
_OBJECT_STORE = 100 * 2**20
"""Size of the object store in bytes. It is small, because nothing is sent through it."""


def run(params: RayExecutor, job: Callable[[int], None], shards: Sequence[int], on_done: Callable[[int], None]) -> None:
    """Run a job for every shard on an existing cluster, or on a local one that is started for the run: see `executors.run`.

    Raises:
        ExecutorError: No cluster answers, workers run other versions, or the workers of one shard died repeatedly.
        OmmatidError: The job raised it three times.
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
    """Silence Ray's logger, which reports at every start how it authenticates and where its dashboard would be."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


_QUIET: Mapping[str, Any] = {"configure_logging": False, "log_to_driver": False}


def _start(n_workers: int) -> None:
    """Start a local cluster without a dashboard. Other machines can reach it, but by default it asks them for a token."""
    with environment(thread_settings(n_workers)):
        ray.init("local", num_cpus=n_workers, include_dashboard=False, object_store_memory=_OBJECT_STORE, **_QUIET)


def _connect(address: str) -> None:
    try:
        check_reachable(address)
        ray.init(address, **_QUIET)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise ExecutorError(
            f"extract.executor.address: no Ray cluster answers at {address} ({error}); start one, correct the address, or set "
            "RAY_AUTH_MODE=token for a cluster that asks for a token"
        ) from None


class _Worker:
    """The actor that makes shards."""

    def __init__(self, job: Callable[[int], None], driver: Driver) -> None:
        self._job = job
        self._driver = driver

    def start(self) -> None:
        """Do nothing. This is the first call, which returns once the actor has been placed."""

    def make(self, shard: int) -> Exception | None:
        """Make a shard, and return the error that the job raised, if any."""
        try:
            with self._driver.enter(ray.util.get_node_ip_address()):
                return attempt(self._job, shard)
        except ExecutorError as error:
            return error


class _Pool:
    """One worker per GPU of the cluster, or per core if it has no GPUs. A worker that dies is replaced."""

    def __init__(self, job: Callable[[int], None], shards: Sequence[int], on_done: Callable[[int], None]) -> None:
        self._job = job
        self._queue = ShardQueue(shards)
        self._n_left = len(shards)
        self._on_done = on_done
        self._calls: dict[ray.ObjectRef, tuple[Any, int | None]] = {}
        """Worker and shard of each pending call; the shard is None while the worker starts."""
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
        """Start workers. If the cluster is busy with other work, some may wait for a place throughout the run."""
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
                    f"the Ray cluster has had no room for a worker for {_SECONDS_WITHOUT_WORKERS} seconds; start nodes, or wait until "
                    "other work ends, then run the stage again; finished shards are kept"
                )

    def _finish(self, call: "ray.ObjectRef") -> None:
        worker, shard = self._calls[call]
        alive, error = _outcome(call, shard)
        if shard is None:
            self._count_failed_starts(error)
        elif error:
            self._queue.put_back(shard, error)
        else:
            self._n_left -= 1
            self._on_done(shard)
        del self._calls[call]
        shard = self._queue.take() if alive else None
        if shard is not None:
            self._calls[worker.make.remote(shard)] = worker, shard

    def _count_failed_starts(self, error: Exception | None) -> None:
        """Raise the error after `ATTEMPTS` failed starts in a row. A few may fail because their nodes have gone."""
        self._failed_starts = self._failed_starts + 1 if error else 0
        if error and self._failed_starts == ATTEMPTS:
            raise error


def _outcome(call: "ray.ObjectRef", shard: int | None) -> tuple[bool, Exception | None]:
    """Return whether the worker is alive, and the error of a call, if any."""
    try:
        return True, ray.get(call)
    except RayTaskError:
        raise  # A bug in our code: errors of the job are returned, not raised.
    except RayError as error:
        how = str(error).strip().splitlines()[-1].partition(" Some common causes")[0]
        return False, _not_started(how) if shard is None else worker_died(shard, ATTEMPTS, how)


def _not_started(how: str) -> ExecutorError:
    return ExecutorError(f"extract.executor: a worker cannot start ({how}); install the same versions on all nodes as here")
