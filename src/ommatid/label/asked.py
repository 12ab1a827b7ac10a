"""Asks whatever is slow about many latents, some at a time, and keeps answers as they come."""

import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from ommatid.label.labeller import Answer

BLOCK = 16
"""Answers that a power cut may cost, at most: so many are synced at a time."""
TO_ASK_AGAIN = ("failed", "over_budget")
"""Statuses that may be others the next time."""

Subject = TypeVar("Subject")
Said = TypeVar("Said")


def ask_each(ask: Callable[[Subject], Said], subjects: Iterator[tuple[int, Subject]], concurrency: int = 1) -> Iterator[tuple[int, Said]]:
    """Latents and what is said of their subjects, in order; few of them are in memory at a time."""
    waiting: deque[tuple[int, Future[Said]]] = deque()
    with ThreadPoolExecutor(concurrency) as pool:
        for latent, subject in subjects:
            waiting.append((latent, pool.submit(ask, subject)))
            if len(waiting) > concurrency:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)


def _first(waiting: "deque[tuple[int, Future[Said]]]") -> tuple[int, Said]:
    latent, future = waiting.popleft()
    return latent, future.result()


class Kept:
    """Answers of one labeller about one SAE, a line of JSON and its CRC-32 each: a run that was killed goes on without asking again."""

    def __init__(self, path: Path) -> None:
        self.answers: dict[int, Answer] = {}
        """By latent, of runs before; without those that failed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        self._file.truncate(self._load())
        self._n_new = 0

    def add(self, latent: int, answer: Answer) -> None:
        """Keep an answer."""
        text = json.dumps({"latent": latent, **asdict(answer)}).encode()
        self._file.write(text + b"\t%08x\n" % zlib.crc32(text))
        self._file.flush()  # a process that is killed then loses nothing
        self._n_new += 1
        if self._n_new % BLOCK == 0:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync what is left."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _load(self) -> int:
        """Read what is whole, and give its bytes: a process that was killed may have left half a line, and a line may be damaged."""
        self._file.seek(0)
        n_bytes = 0
        for line in self._file:
            text, _, checksum = line.rpartition(b"\t")
            if checksum != b"%08x\n" % zlib.crc32(text):
                break
            values = json.loads(text)
            latent, answer = values.pop("latent"), Answer(**values)
            if answer.status not in TO_ASK_AGAIN:
                self.answers[latent] = answer
            n_bytes += len(line)
        return n_bytes
