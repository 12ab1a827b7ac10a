"""Execution on this machine: in this process, or in one process per GPU if there are several."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait

import psutil

from ommatid.config.extract import LocalExecutor
from ommatid.executors.workers import ATTEMPTS, ShardQueue, attempt, environment, thread_settings, worker_died

_SECONDS_TO_END = 60
"""Time allowed for a worker to exit once there is no more work for it or it has closed its pipe."""


def run(
    params: LocalExecutor,
    job: Callable[[int], None],
    shards: Sequence[int],
    on_done: Callable[[int], None],
    devices: Sequence[str] | None = None,
) -> None:
    """Run a job for every shard.

    Args:
        params: Parameters of the executor, which has no options.
        job: See `executors.run`.
        shards: See `executors.run`.
        on_done: See `executors.run`.
        devices: Value of CUDA_VISIBLE_DEVICES for each process. None means one process per available GPU.

    Raises:
        ExecutorError: The processes of one shard died repeatedly.
        OmmatidError: The job raised it.
    """
    devices = _gpus() if devices is None else devices
    if len(devices) > 1:
        _Pool(job, devices, shards, on_done).run()
        return
    for shard in shards:
        job(shard)
        on_done(shard)


def _gpus() -> list[str]:
    """Return CUDA's names of the GPUs that this process may use."""
    import torch

    n, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:n] if visible else [str(i) for i in range(n)]


class _Pool:
    """One worker process per device. A worker that dies is replaced."""

    def __init__(self, job: Callable[[int], None], devices: Sequence[str], shards: Sequence[int], on_done: Callable[[int], None]) -> None:
        self._job = job
        self._settings = thread_settings(len(devices))
        self._devices = devices[: len(shards)]
        self._queue = ShardQueue(shards)
        self._on_done = on_done
        self._busy: dict[Connection, tuple[_Worker, int]] = {}
        self._idle: list[_Worker] = []

    def run(self) -> None:
        """Make all shards. No process is left when this returns or raises."""
        try:
            for device in self._devices:
                self._assign(self._start(device))
            while self._busy:
                for connection in wait(list(self._busy)):
                    assert isinstance(connection, Connection), connection
                    self._finish(connection)
            for worker in self._idle:
                worker.end()
        finally:
            for worker in (*self._idle, *(worker for worker, _ in self._busy.values())):
                worker.kill()

    def _start(self, device: str) -> "_Worker":
        return _Worker(self._job, device, self._settings)

    def _assign(self, worker: "_Worker") -> None:
        shard = self._queue.take()
        if shard is None:
            self._idle.append(worker)
            return
        self._busy[worker.connection] = worker, shard
        with suppress(OSError):  # If the worker has died, waiting for its answer will show it.
            worker.connection.send(shard)

    def _finish(self, connection: Connection) -> None:
        worker, shard = self._busy[connection]
        try:
            error = connection.recv()
        except (EOFError, OSError):
            error = worker_died(shard, ATTEMPTS, worker.cause_of_death())
        if error is None:
            self._on_done(shard)
        else:
            self._queue.put_back(shard, error)
        del self._busy[connection]
        self._assign(worker if worker.is_alive() else self._start(worker.device))


class _Worker:
    """A process that makes one shard after another."""

    def __init__(self, job: Callable[[int], None], device: str, settings: dict[str, str]) -> None:
        context = get_context("spawn")  # CUDA does not work in a fork of a process that has used it.
        self.device = device
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(job, theirs))
        with environment(settings | {"CUDA_VISIBLE_DEVICES": device}), theirs:
            self._process.start()

    def is_alive(self) -> bool:
        """Return whether the process can take another shard."""
        return self._process.is_alive()

    def end(self) -> None:
        """Wait for the process to exit, so that it can clean up."""
        self.connection.close()
        self._process.join(_SECONDS_TO_END)

    def cause_of_death(self) -> str:
        """Return why the process, whose pipe is closed, has ended: the name of a signal, or its exit code."""
        self._process.join(_SECONDS_TO_END)
        self.kill()
        code = self._process.exitcode
        assert code is not None, self._process
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """Kill the process and its children."""
        self.connection.close()
        if self._process.exitcode is None:
            with suppress(psutil.NoSuchProcess):
                _kill_children(psutil.Process(self._process.pid))
            self._process.kill()
            self._process.join()


def _serve(job: Callable[[int], None], connection: Connection) -> None:
    """Run a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The driver receives the signal too, and ends this process.
    threading.Thread(target=_end_with_driver, daemon=True).start()
    with suppress(EOFError, OSError):  # Raised when the driver closes the pipe.
        while True:
            shard = connection.recv()
            connection.send(attempt(job, shard))


def _end_with_driver() -> None:
    """Wait for the driver to end, then end this worker and its children."""
    driver = parent_process()
    assert driver is not None
    driver.join()
    _kill_children(psutil.Process())
    os._exit(1)


def _kill_children(process: psutil.Process) -> None:
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
