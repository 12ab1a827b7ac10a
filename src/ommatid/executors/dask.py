"""Execution on a Dask cluster. This is the only file that imports `distributed`.

Dask itself reruns the task of a worker that died. A worker makes one shard at a time, however many threads it has: a model uses all cores
or a GPU, and the hooks of two forward passes in one process would interfere. A lock ensures this. Dask's resources would not: they are
assigned only after a worker has joined, and tasks that already wait for a worker do not notice them.
"""

import logging
import multiprocessing
import pickle
import pkgutil
import threading
import uuid
import warnings
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

from ommatid.config.extract import DaskExecutor
from ommatid.errors import ExecutorError
from ommatid.executors.workers import ATTEMPTS, Driver, attempt, check_reachable, environment, thread_settings, worker_died

try:
    import dask.config
    from distributed import Client, Future, KilledWorker, LocalCluster, get_worker, wait
    from distributed.client import ClosedClientError
    from distributed.comm.core import CommClosedError
    from distributed.versions import VersionMismatchWarning
except ImportError as error:
    raise ExecutorError(f"extract.executor: dask is not installed ({error}); pip install 'ommatid[dask]'") from None

_SECONDS_TO_CONNECT = 30
"""Timeout of the handshake with a scheduler that listens: it may take seconds if the scheduler is busy."""
_TRIES = 3
"""Number of clients that are made before a machine counts as too busy to start one."""
_SECONDS_WITHOUT_WORKERS = 300
"""Time after which a cluster without workers is given up. Batch systems take minutes to start a worker."""
_IN_FLIGHT = 2
"""Number of futures per worker: while one runs, the next is already queued."""


def run(params: DaskExecutor, job: Callable[[int], None], shards: Sequence[int], on_done: Callable[[int], None]) -> None:
    """Run a job for every shard on an existing cluster, or on a local one that is started for the run: see `executors.run`.

    Raises:
        ExecutorError: No scheduler or no worker answers, workers run other versions, or the workers of one shard died repeatedly.
        OmmatidError: The job raised it three times.
    """
    with _cluster(params) as address, _connected(address) as client:
        _Run(client, address, job).run(shards, on_done)


@contextmanager
def _cluster(params: DaskExecutor) -> Iterator[str]:
    """Yield the address of a scheduler, which is started if the parameters name none."""
    if params.address:
        yield params.address
        return
    # Dask sets PYTHONHASHSEED by default. It also copies all of these into the environment of this process, which is restored afterwards.
    settings = thread_settings(params.workers) | {"PYTHONHASHSEED": "1"}
    config = {"distributed.nanny.pre-spawn-environ": settings}
    with environment(settings), dask.config.set(config), _start(params.workers) as cluster:
        yield cluster.scheduler_address


def _start(n_workers: int) -> Any:
    """Start a local cluster that no other machine can reach, without a dashboard.

    Memory is not limited, because it is used by models and not by Dask's own data.
    """
    options: dict[str, Any] = {"dashboard_address": None, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    dashboard = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}  # None would open port 8787 to all machines.
    return LocalCluster(n_workers=n_workers, threads_per_worker=1, scheduler_kwargs=dashboard, **options)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    try:
        check_reachable(address)
        with warnings.catch_warnings():
            # The warning concerns Dask's own dependencies. Libraries that affect results are compared by `Driver.enter`.
            warnings.simplefilter("ignore", VersionMismatchWarning)
            client = _make_client(address)
    except (OSError, ValueError) as error:
        raise ExecutorError(
            f"extract.executor.address: no Dask scheduler answers at {address} ({error}); start one, or correct the address"
        ) from None
    with client, client.as_current():
        _check_installed(client, address)
        yield client


def _make_client(address: str) -> Any:
    """Connect to a scheduler, again if the thread of the client's event loop did not start in time.

    Distributed asserts that the thread starts within ten seconds, which it may not on a busy machine.
    """
    for _ in range(_TRIES):
        with suppress(AssertionError):
            return Client(address, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
    raise ExecutorError(
        f"{address}: Dask's client did not start in {_TRIES} tries, each of 10 seconds, as this machine is too busy; run the stage again"
    )


def _check_installed(client: Any, address: str) -> None:
    """Check that scheduler and workers can import Ommatid before anything is sent: a worker that cannot unpickle a task dies."""
    for who, call in (("the scheduler", client.run_on_scheduler), ("a worker", client.run)):
        try:
            call(pkgutil.resolve_name, f"{__name__}:_make")
        except (ImportError, AttributeError) as error:
            raise ExecutorError(
                f"{address}: {who} of the Dask cluster cannot import Ommatid ({error}); install the same versions on all its machines "
                "as here, and restart it"
            ) from None


_lock = threading.Lock()


def _make(job: bytes, shard: int, driver: Driver) -> None:
    """Make a shard in a worker, whose other threads wait meanwhile."""
    # Dask's workers are daemons, which may not start processes, but with a GPU, images are decoded by other processes.
    with _lock, driver.enter(get_worker().address):
        multiprocessing.current_process().daemon = False
        if error := attempt(pickle.loads(job), shard):
            raise error


class _Run:
    """The shards of one run on a cluster."""

    def __init__(self, client: Any, address: str, job: Callable[[int], None]) -> None:
        self._client = client
        self._address = address
        self._job = pickle.dumps(job)
        """The job, pickled because the scheduler unpickles whatever is submitted but cannot import what only workers need."""
        self._driver = Driver.here()
        self._name = f"ommatid-{uuid.uuid4()}"
        self._shards: dict[Future, int] = {}
        """Shards in flight, by future."""

    def run(self, shards: Sequence[int], on_done: Callable[[int], None]) -> None:
        unsubmitted = iter(shards)
        try:
            while done := self._advance(unsubmitted):
                for future in done:
                    shard = self._shards.pop(future)
                    self._check(future, shard)
                    on_done(shard)
        except (CancelledError, CommClosedError, ClosedClientError):
            raise self._scheduler_lost() from None
        finally:
            with suppress(OSError, ClosedClientError):  # The client closes itself if it cannot reconnect to the scheduler.
                self._client.cancel(list(self._shards))

    def _advance(self, unsubmitted: Iterator[int]) -> set[Future]:
        """Keep the workers busy, wait until some shards are done, and return their futures, or none if all shards are done."""
        try:
            return self._next_done() if self._fill(unsubmitted) else set()
        except OSError:  # Raised by Dask if it cannot reconnect. Errors of shards are raised by `_check`.
            raise self._scheduler_lost() from None

    def _scheduler_lost(self) -> ExecutorError:
        return ExecutorError(
            f"{self._address}: the Dask scheduler has gone; start it again, then run the stage again; finished shards are kept"
        )

    def _fill(self, unsubmitted: Iterator[int]) -> bool:
        """Submit as many shards as the workers take, and return whether any are in flight."""
        n_free = _IN_FLIGHT * max(1, len(self._client.nthreads())) - len(self._shards)
        for shard in islice(unsubmitted, max(0, n_free)):
            self._shards[self._submit(shard)] = shard
        return bool(self._shards)

    def _submit(self, shard: int) -> Future:
        key = f"{self._name}-{shard}"
        return self._client.submit(_make, self._job, shard, self._driver, key=key, pure=False, retries=ATTEMPTS - 1)

    def _next_done(self) -> set[Future]:
        while True:
            try:
                answer: Any = wait(list(self._shards), timeout=_SECONDS_WITHOUT_WORKERS, return_when="FIRST_COMPLETED")
                return answer.done
            except TimeoutError:
                if not self._client.nthreads():
                    raise ExecutorError(
                        f"{self._address}: the Dask scheduler has had no worker for {_SECONDS_WITHOUT_WORKERS} seconds; start some, "
                        "then run the stage again; finished shards are kept"
                    ) from None

    def _check(self, future: Future, shard: int) -> None:
        if future.status == "finished":
            return  # The result is None, and must not be fetched from a worker that may have died since.
        try:
            future.result()
        except KilledWorker as error:
            raise worker_died(shard, error.allowed_failures + 1, f"{error.last_worker}") from None
