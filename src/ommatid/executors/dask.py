"""Dask: the only file that knows `distributed`.

Dask reruns by itself what a dead worker was at. A worker makes one shard at a time, however many threads it has: a model takes all
cores or a GPU, and hooks of two forward passes in one process would mix. (A lock does it. Dask's resources, of which a worker could
have one place, would be given to workers after they have joined, and tasks that wait for a worker never hear of it.)
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
from ommatid.executors.workers import ATTEMPTS, Driver, attempt, died, environment, reach, thread_settings

try:
    import dask.config
    from distributed import Client, Future, KilledWorker, LocalCluster, get_worker, wait
    from distributed.client import ClosedClientError
    from distributed.comm.core import CommClosedError
    from distributed.versions import VersionMismatchWarning
except ImportError as error:
    raise ExecutorError(f"extract.executor: dask is not installed ({error}); pip install 'ommatid[dask]'") from None

_SECONDS_TO_CONNECT = 30
"""For the greetings of a scheduler that listens: those of a busy one take seconds."""
_SECONDS_WITHOUT_WORKERS = 300
"""Batch systems take minutes to start a worker."""
_IN_FLIGHT = 2
"""Futures a worker: one is made, and one waits so that no worker does."""


def run(params: DaskExecutor, job: Callable[[int], None], shards: Sequence[int], on_done: Callable[[int], None]) -> None:
    """Run a job for every shard on a cluster that is there, or on one for the time of the run.

    Raises:
        ExecutorError: no scheduler or no worker answers, workers run other versions, or those of one shard died again and again.
        OmmatidError: what the job raised three times.
    """
    with _cluster(params) as address, _connected(address) as client:
        _Run(client, address, job).run(shards, on_done)


@contextmanager
def _cluster(params: DaskExecutor) -> Iterator[str]:
    """The address of a scheduler."""
    if params.address:
        yield params.address
        return
    # PYTHONHASHSEED: Dask sets one; all of these it puts into this process's environment, too
    settings = thread_settings(params.workers) | {"PYTHONHASHSEED": "1"}
    config = {"distributed.nanny.pre-spawn-environ": settings}
    with environment(settings), dask.config.set(config), _start(params.workers) as cluster:
        yield cluster.scheduler_address


def _start(n_workers: int) -> Any:
    """A cluster on this machine that no other can reach, without pages; memory is not watched, for it holds models and not Dask's data."""
    options: dict[str, Any] = {"dashboard_address": None, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    pages = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}  # None would be port 8787 for all the world
    return LocalCluster(n_workers=n_workers, threads_per_worker=1, scheduler_kwargs=pages, **options)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    try:
        reach(address)
        with warnings.catch_warnings():
            # of Dask's own dependencies; what changes results we compare ourselves
            warnings.simplefilter("ignore", VersionMismatchWarning)
            client = Client(address, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ExecutorError(
            f"extract.executor.address: no Dask scheduler answers at {address} ({error}); start one, or mend the address"
        ) from None
    with client, client.as_current():
        _check_installed(client, address)
        yield client


def _check_installed(client: Any, address: str) -> None:
    """Before anything is sent: a worker that cannot read what is sent to it ends."""
    for who, call in (("the scheduler", client.run_on_scheduler), ("a worker", client.run)):
        try:
            call(pkgutil.resolve_name, f"{__name__}:_make")
        except (ImportError, AttributeError) as error:
            raise ExecutorError(
                f"{address}: {who} of the Dask cluster cannot import Ommatid ({error}); install on all its machines what is "
                "installed here, and start it again"
            ) from None


_one = threading.Lock()


def _make(job: bytes, shard: int, driver: Driver) -> None:
    """What a worker does; its other threads wait meanwhile."""
    # Dask's processes are daemons, which may not start others; where there is a GPU, images are decoded by some
    with _one, driver.hosted(get_worker().address):
        multiprocessing.current_process().daemon = False
        if error := attempt(pickle.loads(job), shard):
            raise error


class _Run:
    """The shards of one run on a cluster."""

    def __init__(self, client: Any, address: str, job: Callable[[int], None]) -> None:
        self._client = client
        self._address = address
        self._job = pickle.dumps(job)
        """The scheduler unpickles what is submitted: it need not import what only workers need."""
        self._driver = Driver.here()
        self._name = f"ommatid-{uuid.uuid4()}"
        self._shards: dict[Future, int] = {}
        """In flight."""

    def run(self, shards: Sequence[int], on_done: Callable[[int], None]) -> None:
        waiting = iter(shards)
        try:
            while done := self._go_on(waiting):
                for future in done:
                    shard = self._shards.pop(future)
                    self._check(future, shard)
                    on_done(shard)
        except (CancelledError, CommClosedError, ClosedClientError):
            raise self._gone() from None
        finally:
            with suppress(OSError, ClosedClientError):  # the client closes itself when it has not found the scheduler again
                self._client.cancel(list(self._shards))

    def _go_on(self, waiting: Iterator[int]) -> set[Future]:
        """Keep the workers busy, and wait for the next shards that are done; none when all are."""
        try:
            return self._next_done() if self._fill(waiting) else set()
        except OSError:  # what Dask raises when it cannot connect again; errors of a shard are raised by `_check`
            raise self._gone() from None

    def _gone(self) -> ExecutorError:
        return ExecutorError(
            f"{self._address}: the Dask scheduler has gone; start it again, then run the stage again: what is finished is kept"
        )

    def _fill(self, waiting: Iterator[int]) -> bool:
        """Submit as many as the workers take; false: all are done."""
        room = _IN_FLIGHT * max(1, len(self._client.nthreads())) - len(self._shards)
        for shard in islice(waiting, max(0, room)):
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
                        "then run the stage again: what is finished is kept"
                    ) from None

    def _check(self, future: Future, shard: int) -> None:
        if future.status == "finished":
            return  # the result, None, need not be fetched from a worker that may have died since
        try:
            future.result()
        except KilledWorker as error:
            raise died(shard, error.allowed_failures + 1, f"{error.last_worker}") from None
