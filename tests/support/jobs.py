"""Jobs for executors: each shard writes one file, and some shards kill their worker or raise. Workers import this module by name."""

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

from ommatid.errors import ArtefactError
from support.processes import wait_for

_busy = threading.Lock()


@dataclass(frozen=True)
class WriteJob:
    """Writes one file per shard, which names the process that made it."""

    folder: str
    seconds: float = 0.0

    def __call__(self, shard: int) -> None:
        assert _busy.acquire(blocking=False), "two shards at once in one process"
        try:
            self.disturb(shard)
            time.sleep(self.seconds)
            self.write(shard)
        finally:
            _busy.release()

    def write(self, shard: int) -> None:
        names = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "CUDA_VISIBLE_DEVICES")
        facts = {"square": shard**2, "pid": os.getpid(), **{name: os.environ.get(name) for name in names}}
        aside = self.path(f"{shard}.{os.getpid()}.tmp")
        aside.write_text(json.dumps(facts))
        aside.rename(self.path(f"{shard}.json"))

    def path(self, name: str) -> Path:
        return Path(self.folder, name)

    def disturb(self, shard: int) -> None:
        """Cause the trouble of this job."""

    def attempt(self, shard: int) -> int:
        """Count the tries of a shard, including this one."""
        self.path(f"{shard}.{os.getpid()}.{time.monotonic_ns()}.attempt").touch()
        return self.attempts(shard)

    def attempts(self, shard: int) -> int:
        return len(list(Path(self.folder).glob(f"{shard}.*.attempt")))


@dataclass(frozen=True)
class KillOnceJob(WriteJob):
    """Kills its process in the middle of shard 3 at the first try."""

    def disturb(self, shard: int) -> None:
        if shard == 3 and self.attempt(shard) == 1:
            _kill_me()


@dataclass(frozen=True)
class KillJob(WriteJob):
    """Kills its process at shard 3 at every try."""

    def disturb(self, shard: int) -> None:
        if shard == 3 and self.attempt(shard):
            _kill_me()


@dataclass(frozen=True)
class RefuseJob(WriteJob):
    """Raises an error for the user at shard 3, a given number of times."""

    times: int = 1000

    def disturb(self, shard: int) -> None:
        if shard == 3 and self.attempt(shard) <= self.times:
            raise ArtefactError("images: image 5 cannot be decoded any more")


@dataclass(frozen=True)
class BreakJob(WriteJob):
    """Raises an internal error at shard 3."""

    def disturb(self, shard: int) -> None:
        if shard == 3:
            raise ZeroDivisionError("planted")


class Stubborn(Exception):
    """An error that cannot be unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


@dataclass(frozen=True)
class StubbornJob(WriteJob):
    """Raises an error at shard 3 that cannot be unpickled."""

    def disturb(self, shard: int) -> None:
        if shard == 3:
            raise Stubborn("planted", "twice")


@dataclass(frozen=True)
class NestedJob(WriteJob):
    """Starts a process in each worker, as decoding does on a GPU machine, and waits for the given number of workers."""

    n_workers: int = 1

    def disturb(self, shard: int) -> None:
        with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
            assert pool.submit(abs, -3).result() == 3
        self.path(f"{os.getpid()}.worker").touch()
        wait_for(lambda: len(list(Path(self.folder).glob("*.worker"))) >= self.n_workers, "the other workers")


@dataclass(frozen=True)
class SlowJob(WriteJob):
    """Takes as many seconds for a shard as its number."""

    def disturb(self, shard: int) -> None:
        time.sleep(shard)


class Counted(Sequence[int]):
    """Shards that count how many are taken but not done, at most."""

    def __init__(self, n: int) -> None:
        self.n, self.done, self.most = n, 0, 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> int:
        if index >= self.n:
            raise IndexError
        self.most = max(self.most, index + 1 - self.done)
        return index

    def finish(self, shard: int) -> None:
        self.done += 1


def made(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the content of each file by shard, and check that each is whole."""
    assert not list(folder.glob("*.tmp"))
    facts = {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert all(fact["square"] == shard**2 for shard, fact in facts.items())
    return facts


def _kill_me() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still here")
