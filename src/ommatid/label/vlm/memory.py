"""Answers that were given before, so that nobody asks, waits or pays for them twice.

One SQLite file for all servers, models and runs of a checkout, experiments in their worktrees included. An answer is written when it
comes, whole or not at all: a run that was killed goes on after it. Several processes and threads may use it at a time.
"""

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from ommatid.errors import ArtefactError
from ommatid.label.vlm.question import Said

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
        """The answer to that question, if it was ever given.

        Raises:
            ArtefactError: the file is damaged, or cannot be read.
        """
        with self._open() as connection:
            found = connection.execute("SELECT said FROM answers WHERE key = ?", (key,)).fetchone()
        return Said(**json.loads(found[0])) if found else None

    def keep(self, key: str, model: str, said: Said) -> None:
        """Remember an answer; of two to the same question the first stays.

        Raises:
            ArtefactError: the file is damaged, or cannot be written.
        """
        with self._open() as connection:
            connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (key, model, json.dumps(asdict(said))))

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
