"""This machine: in this process, or with several GPUs in a process for each."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait

import psutil

from ommatid.config.extract import LocalExecutor
from ommatid.executors.workers import ATTEMPTS, Waiting, attempt, died, environment, thread_settings

_SECONDS_TO_END = 60
"""A worker that has nothing to do any more, or has closed its pipe, gets so long to end by itself."""


def run(
    params: LocalExecutor,
    job: Callable[[int], None],
    shards: Sequence[int],
    on_done: Callable[[int], None],
    devices: Sequence[str] | None = None,
) -> None:
    """Run a job for every shard.

    Args:
        params: Says nothing more.
        job: See `executors.run`.
        shards: See `executors.run`.
        on_done: See `executors.run`.
        devices: What CUDA_VISIBLE_DEVICES says to each process; None: one for each GPU there is.

    Raises:
        ExecutorError: the processes of one shard died again and again.
        OmmatidError: what the job raised.
    """
    devices = _gpus() if devices is None else devices
    if len(devices) > 1:
        _Pool(job, devices, shards, on_done).run()
        return
    for shard in shards:
        job(shard)
        on_done(shard)


def _gpus() -> list[str]:
    """What CUDA calls the GPUs that this process may use."""
    import torch

    n, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:n] if visible else [str(i) for i in range(n)]


class _Pool:
    """One worker process a device; one that dies is replaced."""

    def __init__(self, job: Callable[[int], None], devices: Sequence[str], shards: Sequence[int], on_done: Callable[[int], None]) -> None:
        self._job = job
        self._settings = thread_settings(len(devices))
        self._devices = devices[: len(shards)]
        self._waiting = Waiting(shards)
        self._on_done = on_done
        self._busy: dict[Connection, tuple[_Worker, int]] = {}
        self._idle: list[_Worker] = []

    def run(self) -> None:
        """Returns, or raises, without a process left."""
        try:
            for device in self._devices:
                self._give(self._start(device))
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

    def _give(self, worker: "_Worker") -> None:
        shard = self._waiting.take()
        if shard is None:
            self._idle.append(worker)
            return
        self._busy[worker.connection] = worker, shard
        with suppress(OSError):  # a worker that is dead already: the answer will be its end
            worker.connection.send(shard)

    def _finish(self, connection: Connection) -> None:
        worker, shard = self._busy[connection]
        try:
            error = connection.recv()
        except (EOFError, OSError):
            error = died(shard, ATTEMPTS, worker.cause_of_death())
        if error is None:
            self._on_done(shard)
        else:
            self._waiting.failed(shard, error)
        del self._busy[connection]
        self._give(worker if worker.is_alive() else self._start(worker.device))


class _Worker:
    """A process that makes one shard after the other."""

    def __init__(self, job: Callable[[int], None], device: str, settings: dict[str, str]) -> None:
        context = get_context("spawn")  # a fork of a process that has used CUDA cannot
        self.device = device
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(job, theirs))
        with environment(settings | {"CUDA_VISIBLE_DEVICES": device}), theirs:
            self._process.start()

    def is_alive(self) -> bool:
        """Whether it can take another shard."""
        return self._process.is_alive()

    def end(self) -> None:
        """Let it end by itself, so that it puts away what it holds."""
        self.connection.close()
        self._process.join(_SECONDS_TO_END)

    def cause_of_death(self) -> str:
        """Of a process whose pipe is closed."""
        self._process.join(_SECONDS_TO_END)
        self.kill()
        code = self._process.exitcode
        assert code is not None, self._process
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """End it and what it has started."""
        self.connection.close()
        if self._process.exitcode is None:
            with suppress(psutil.NoSuchProcess):
                _kill_children(psutil.Process(self._process.pid))
            self._process.kill()
            self._process.join()


def _serve(job: Callable[[int], None], connection: Connection) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver gets it, too, and ends us
    threading.Thread(target=_end_with_driver, daemon=True).start()
    with suppress(EOFError, OSError):  # the driver needs us no more
        while True:
            shard = connection.recv()
            connection.send(attempt(job, shard))


def _end_with_driver() -> None:
    """No worker, and nothing it started, goes on where nobody waits for it."""
    driver = parent_process()
    assert driver is not None
    driver.join()
    _kill_children(psutil.Process())
    os._exit(1)


def _kill_children(process: psutil.Process) -> None:
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
