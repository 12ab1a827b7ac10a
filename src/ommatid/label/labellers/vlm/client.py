"""Client of a server: it asks within the budget and the allowed rate, tries again after failures, and gives up at some point.

No question is asked twice. Answers are remembered in one SQLite file for all servers, models and runs of a checkout, including
experiments in their worktrees. An answer is written as soon as it arrives, whole or not at all, so a run that was killed continues after
it. Several processes and threads may use the file at a time.
"""

import json
import os
import random
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ommatid.errors import ArtefactError
from ommatid.label.labellers.vlm.messages import Outcome, Question, Said, Silence

if TYPE_CHECKING:
    from ommatid.config.label import VlmLabeller
    from ommatid.label.labellers.vlm.server import Hiccup, Server


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


@dataclass(frozen=True)
class Clock:
    """Time and chance; tests bring their own."""

    now: Callable[[], float] = time.monotonic
    """Seconds."""
    sleep: Callable[[float], None] = time.sleep
    chance: Callable[[], float] = random.random
    """Uniform in [0, 1)."""


class Pace:
    """Lets requests through one by one, evenly spaced, and none during a pause; may be shared by threads."""

    def __init__(self, per_minute: float | None, clock: Clock) -> None:
        self._spacing = 60 / per_minute if per_minute else 0.0
        self._clock = clock
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Returns when a request may be sent."""
        while True:
            with self._lock:
                now = self._clock.now()
                if now >= self._next:
                    self._next = now + self._spacing
                    return
                seconds = self._next - now
            self._clock.sleep(seconds)  # and look again: a pause may have come, or another thread have been faster

    def pause(self, seconds: float) -> None:
        """Nobody sends anything for so long."""
        with self._lock:
            self._next = max(self._next, self._clock.now() + seconds)


class Budget:
    """Requests and tokens that may still be spent by this process; may be shared by threads."""

    def __init__(self, max_requests: int | None, max_tokens: int | None) -> None:
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._n_requests = self._n_tokens = 0
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take one request out of it; False: there is none left, or all tokens are spent."""
        with self._lock:
            if self.spent():
                return False
            self._n_requests += 1
            return True

    def spend(self, n_tokens: int) -> None:
        """Note the tokens of a request that was answered: known only then, so that the last answers may exceed the budget."""
        with self._lock:
            self._n_tokens += n_tokens

    def spent(self) -> str | None:
        """What is used up, in the words of params.yaml; None: nothing."""
        if self._max_requests is not None and self._n_requests >= self._max_requests:
            return f"max_requests: {self._max_requests}"
        if self._max_tokens is not None and self._n_tokens >= self._max_tokens:
            return f"max_tokens: {self._max_tokens}, {self._n_tokens} spent"
        return None


TRIES = 5
"""Of one question, where the server fails it."""
FIRST_WAIT = 1.0
"""Seconds before the second try; doubled before each further one, less up to half of it by chance."""
LONGEST_WAIT = 600.0
"""A server that wants to be left alone for longer, until its quota comes back tomorrow, is given up."""
FAILURES = 3
"""Questions in a row that failed with all their tries, or were rejected, before the server is given up."""

Say = Callable[[str], None]


class Asker:
    """The way to one server, for one run; may be shared by threads."""

    def __init__(self, params: "VlmLabeller", key: str, memory: Memory, say: Say, clock: Clock | None = None) -> None:
        self._params = params
        self._key = key
        self._memory = memory
        self._say = say
        self._clock = clock or Clock()
        self._pace = Pace(params.requests_per_minute, self._clock)
        self._budget = Budget(params.max_requests, params.max_tokens)
        self._opened: Server | None = None
        self._lock = threading.Lock()
        self._was_heard = False
        """Whether the server ever sent anything."""
        self._in_a_row = 0
        self._gone: str | None = None
        """Why the server was given up."""

    def ask(self, question: Question) -> Outcome:
        """The answer, remembered or new, or why there is none."""
        if said := self._memory.recall(question.key):
            return Outcome(said, 0, 0)
        turn = _Turn()
        reply = self._gone_silence() or self._converse(question, turn)
        if isinstance(reply, Said):
            self._memory.keep(question.key, self._params.model, reply)
            self._in_a_row = 0
        return Outcome(reply, turn.n_requests, reply.n_tokens if isinstance(reply, Said) else 0)

    def _converse(self, question: Question, turn: "_Turn") -> Said | Silence:
        from ommatid.label.labellers.vlm.server import Changed, Hiccup, Rejected, Unusable

        parts: Sequence[str | bytes] = ()
        while True:
            if not self._budget.take():
                return self._over_budget(turn)
            self._pace.wait()
            if gone := self._gone_silence():  # by another thread, while this one waited
                return gone
            parts = parts or question.parts()
            turn.n_requests += 1
            try:
                said = self._server().send(parts, question.schema, turn.with_schema)
            except Changed as changed:
                turn.with_schema = changed.with_schema
            except Hiccup as hiccup:
                if silence := self._after(hiccup, turn):
                    return silence
            except Rejected as error:
                self._was_heard = True
                return self._failed(str(error))
            except Unusable as error:
                return self._give_up(str(error))
            else:
                self._was_heard = True
                self._budget.spend(said.n_tokens)
                return said

    def _after(self, hiccup: "Hiccup", turn: "_Turn") -> Silence | None:
        """Wait for the next try; or say why there is none."""
        self._was_heard |= hiccup.was_heard
        turn.failures.append(str(hiccup))
        if hiccup.wait is not None and hiccup.wait > LONGEST_WAIT:
            return self._give_up(f"{hiccup}: it wants to be left alone for {hiccup.wait:.0f} s")
        if len(turn.failures) == TRIES:
            return self._failed(f"{TRIES} tries, at last {hiccup}")
        seconds = hiccup.wait if hiccup.wait is not None else FIRST_WAIT * 2 ** (len(turn.failures) - 1) * (1 - self._clock.chance() / 2)
        if hiccup.is_busy:
            self._pace.pause(seconds)
        else:
            self._clock.sleep(seconds)
        return None

    def _failed(self, detail: str) -> Silence:
        with self._lock:
            self._in_a_row += 1
            is_end = self._in_a_row == FAILURES or not self._was_heard
        return self._give_up(detail) if is_end else Silence("failed", detail)

    def _give_up(self, why: str) -> Silence:
        with self._lock:
            is_news = self._gone is None
            self._gone = self._gone or why
        if is_news:
            self._say(
                f"{self._key}: gave up on {self._params.model} at {self._params.url}: {why}. Start the server or correct url, model or "
                "OPENAI_API_KEY, and run the stage again: what was answered is remembered; or take this labeller out of label.labellers. "
                "Latents that it did not name have the status failed; names by other labellers stay"
            )
        return Silence("failed", why)

    def _gone_silence(self) -> Silence | None:
        return Silence("failed", f"not asked, the server was given up: {self._gone}") if self._gone else None

    def _over_budget(self, turn: "_Turn") -> Silence:
        failed = f"; before that, {turn.failures[-1]}" if turn.failures else ""
        return Silence("over_budget", f"{self._budget.spent()}{failed}")

    def _server(self) -> "Server":
        from ommatid.label.labellers.vlm.server import Server  # `openai` takes seconds to import: not where all is remembered

        with self._lock:
            self._opened = self._opened or Server(self._params.url, self._params.model, self._params.timeout)
            return self._opened


class _Turn:
    """What happened to one question so far."""

    def __init__(self) -> None:
        self.n_requests = 0
        self.failures: list[str] = []
        self.with_schema = True
