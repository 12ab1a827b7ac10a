"""Answers that were given before, so that nobody asks, waits or pays for them twice.

One SQLite file for all servers, models and runs of a checkout, experiments in their worktrees included. An answer is written when it
comes, whole or not at all: a run that was killed goes on after it. Several processes and threads may use it at a time.
"""

import json
import os
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ommatid.errors import ArtefactError
from ommatid.label.labellers.vlm.messages import Said

ANSWERS = Path("data/.answers/answers.sqlite")
"""Relative to the checkout. DVC does not know it, and `make clean` leaves it: it may have cost money."""
SECONDS = 60.0
"""How long to wait while another process writes."""


def in_checkout() -> "Memory":
    """The memory of the checkout that this run came from."""
    return Memory(Path(os.environ.get("OMMATID_CHECKOUT") or ".") / ANSWERS)


class Memory:
    """Answers by the key of their question."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def recall(self, key: str) -> Said | None:
        """The answer to that question, if it was ever given; one that was damaged since is forgotten, to be asked for again.

        Raises:
            ArtefactError: the file is damaged, or cannot be read.
        """
        with self._open() as connection:
            found = connection.execute("SELECT said FROM answers WHERE key = ?", (key,)).fetchone()
            said = _said_of(key, found[0]) if found else None
            if found and not said:
                connection.execute("DELETE FROM answers WHERE key = ?", (key,))
        return said

    def keep(self, key: str, model: str, said: Said) -> None:
        """Remember an answer; of two to the same question the first stays.

        Raises:
            ArtefactError: the file is damaged, or cannot be written.
        """
        with self._open() as connection:
            connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (key, model, _text_of(key, said)))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # opened for each use: a connection belongs to one thread, and a request takes a thousand times as long
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, timeout=SECONDS)) as connection, connection:
                connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, model TEXT, said TEXT)")
                yield connection
        except (OSError, sqlite3.Error) as error:
            raise ArtefactError(
                f"{self._path}: the answers of servers cannot be remembered here: {error}; mend it, or move the file away: what it held "
                "is then asked for again"
            ) from None


_CHECKSUM = "checksum"
"""Beside the fields of an answer: the CRC-32 of these and the key. Answers of versions before have none."""


def _text_of(key: str, said: Said) -> str:
    return json.dumps({**asdict(said), _CHECKSUM: _sum_of(key, asdict(said))})


def _said_of(key: str, text: str) -> Said | None:
    try:
        values = json.loads(text)
        if _CHECKSUM in values and values.pop(_CHECKSUM) != _sum_of(key, values):
            return None
        return Said(**values)
    except (ValueError, TypeError):
        return None


def _sum_of(key: str, values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps([key, values], sort_keys=True).encode())
