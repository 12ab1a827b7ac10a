"""Client of a server: keeps to a budget and a rate limit, retries failed requests, caches answers, and gives up on a dead server.

No question is asked twice. Answers are cached in one SQLite file for all servers, models and runs of a checkout, including experiments in
their worktrees. Each answer is written as soon as it arrives, in one transaction, so a run that was killed continues after its last answer.
Several processes and threads may use the file at the same time.
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
from ommatid.label.labellers.vlm.messages import Completion, NoAnswer, Outcome, Question

if TYPE_CHECKING:
    from ommatid.config.label import VlmLabeller
    from ommatid.label.labellers.vlm.server import Server, TransientFailure


ANSWERS = Path("data/.answers/answers.sqlite")
"""File of the cached answers, relative to the checkout. DVC does not track it and `make clean` keeps it: answers may have cost money."""
SECONDS = 60.0
"""Seconds to wait while another process writes to the file."""


def open_checkout_cache() -> "AnswerCache":
    """Return the cache of the checkout that this run belongs to, which an experiment shares with the checkout it was started from."""
    return AnswerCache(Path(os.environ.get("OMMATID_CHECKOUT") or ".") / ANSWERS)


class AnswerCache:
    """Answers by the key of their question, in an SQLite file that is created on first use."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, key: str) -> Completion | None:
        """Return the answer to a question, or None. A damaged answer is deleted, so that the question is asked again.

        Raises:
            ArtefactError: The file is damaged or cannot be read.
        """
        with self._open() as connection:
            found = connection.execute("SELECT said FROM answers WHERE key = ?", (key,)).fetchone()
            completion = _parse(key, found[0]) if found else None
            if found and not completion:
                connection.execute("DELETE FROM answers WHERE key = ?", (key,))
        return completion

    def add(self, key: str, model: str, completion: Completion) -> None:
        """Add the answer to a question; an answer that is already there stays.

        Raises:
            ArtefactError: The file is damaged or cannot be written.
        """
        with self._open() as connection:
            connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (key, model, _dump(key, completion)))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # Opened for each use: a connection belongs to one thread, and a request takes a thousand times as long as opening it.
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, timeout=SECONDS)) as connection, connection:
                connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, model TEXT, said TEXT)")
                yield connection
        except (OSError, sqlite3.Error) as error:
            raise ArtefactError(
                f"{self._path}: the answers of servers cannot be cached here: {error}; repair it, or move the file away; the answers in it "
                "are then asked for again"
            ) from None


_CHECKSUM = "checksum"
"""Key of the CRC-32 of an answer and its key, beside the answer's fields. Earlier versions stored none."""


def _dump(key: str, completion: Completion) -> str:
    return json.dumps({**asdict(completion), _CHECKSUM: _checksum(key, asdict(completion))})


def _parse(key: str, text: str) -> Completion | None:
    """Return a cached answer; None if it is damaged."""
    try:
        values = json.loads(text)
        if _CHECKSUM in values and values.pop(_CHECKSUM) != _checksum(key, values):
            return None
        return Completion(**values)
    except (ValueError, TypeError):
        return None


def _checksum(key: str, values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps([key, values], sort_keys=True).encode())


@dataclass(frozen=True)
class Clock:
    """Source of time and randomness, which tests replace."""

    now: Callable[[], float] = time.monotonic
    """Returns the time in seconds."""
    sleep: Callable[[float], None] = time.sleep
    """Sleeps for a number of seconds."""
    chance: Callable[[], float] = random.random
    """Returns a random number, uniform in [0, 1)."""


class RateLimiter:
    """Spaces requests evenly, and holds them back during a pause. Threads may share it.

    Args:
        per_minute: Largest number of requests per minute; None for no limit.
        clock: Source of time.
    """

    def __init__(self, per_minute: float | None, clock: Clock) -> None:
        self._spacing = 60 / per_minute if per_minute else 0.0
        self._clock = clock
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Wait until a request may be sent."""
        while True:
            with self._lock:
                now = self._clock.now()
                if now >= self._next:
                    self._next = now + self._spacing
                    return
                seconds = self._next - now
            self._clock.sleep(seconds)  # Then checks again: a pause may have begun, or another thread may have come first.

    def pause(self, seconds: float) -> None:
        """Hold back all requests for a number of seconds."""
        with self._lock:
            self._next = max(self._next, self._clock.now() + seconds)


class Budget:
    """Requests and tokens that this process may still spend. Threads may share it.

    Args:
        max_requests: Largest number of requests; None for no limit.
        max_tokens: Number of tokens after which no further request is sent; None for no limit.
    """

    def __init__(self, max_requests: int | None, max_tokens: int | None) -> None:
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._n_requests = self._n_tokens = 0
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take one request from the budget; return False if the requests or the tokens are spent."""
        with self._lock:
            if self.spent():
                return False
            self._n_requests += 1
            return True

    def spend(self, n_tokens: int) -> None:
        """Count the tokens of an answered request. They are only known afterwards, so the last answers may exceed the budget."""
        with self._lock:
            self._n_tokens += n_tokens

    def spent(self) -> str | None:
        """Return which limit is reached, by its key in params.yaml; None if there is none."""
        if self._max_requests is not None and self._n_requests >= self._max_requests:
            return f"max_requests: {self._max_requests}"
        if self._max_tokens is not None and self._n_tokens >= self._max_tokens:
            return f"max_tokens: {self._max_tokens}, {self._n_tokens} spent"
        return None


TRIES = 5
"""Largest number of requests for one question if they fail for reasons that may pass."""
FIRST_WAIT = 1.0
"""Seconds before the second try; doubled before each further one, and shortened by a random share of up to one half."""
LONGEST_WAIT = 600.0
"""Seconds. A server that asks for a longer wait, perhaps until its quota is renewed tomorrow, is given up."""
FAILURES = 3
"""Number of questions in a row that fail or are rejected before the server is given up."""

Warn = Callable[[str], None]
"""Called with a sentence for the user."""


class Client:
    """Client of one server for one run. Threads may share it.

    Args:
        params: The labeller's section of the params.
        key: Key of the section, for messages.
        cache: Answers of earlier runs.
        warn: Called with a sentence for the user when the server is given up.
        clock: Time and randomness; None for those of the system.
    """

    def __init__(self, params: "VlmLabeller", key: str, cache: AnswerCache, warn: Warn, clock: Clock | None = None) -> None:
        self._params = params
        self._key = key
        self._cache = cache
        self._warn = warn
        self._clock = clock or Clock()
        self._rate_limiter = RateLimiter(params.requests_per_minute, self._clock)
        self._budget = Budget(params.max_requests, params.max_tokens)
        self._opened: Server | None = None
        self._lock = threading.Lock()
        self._has_responded = False
        """Whether the server ever sent anything."""
        self._failures_in_a_row = 0
        self._given_up: str | None = None
        """Why the server was given up; None if it was not."""

    def ask(self, question: Question) -> Outcome:
        """Return the answer to a question, cached or new, or why there is none."""
        if cached := self._cache.get(question.key):
            return Outcome(cached, 0, 0)
        attempts = _Attempts()
        reply = self._no_answer_if_given_up() or self._send(question, attempts)
        if isinstance(reply, Completion):
            self._cache.add(question.key, self._params.model, reply)
            self._failures_in_a_row = 0
        return Outcome(reply, attempts.n_requests, reply.n_tokens if isinstance(reply, Completion) else 0)

    def _send(self, question: Question, attempts: "_Attempts") -> Completion | NoAnswer:
        """Send requests until one is answered, or there is a reason to stop."""
        from ommatid.label.labellers.vlm.server import RequestRejected, ServerUnusable, SettingRefused, TransientFailure

        parts: Sequence[str | bytes] = ()
        while True:
            if not self._budget.take():
                return self._over_budget(attempts)
            self._rate_limiter.wait()
            if no_answer := self._no_answer_if_given_up():  # Another thread may have given up while this one waited.
                return no_answer
            parts = parts or question.parts()
            attempts.n_requests += 1
            try:
                completion = self._server().send(parts, question.schema, attempts.with_schema)
            except SettingRefused as refused:
                attempts.with_schema = refused.with_schema
            except TransientFailure as failure:
                if no_answer := self._wait_to_retry(failure, attempts):
                    return no_answer
            except RequestRejected as error:
                self._has_responded = True
                return self._fail(str(error))
            except ServerUnusable as error:
                return self._give_up(str(error))
            else:
                self._has_responded = True
                self._budget.spend(completion.n_tokens)
                return completion

    def _wait_to_retry(self, failure: "TransientFailure", attempts: "_Attempts") -> NoAnswer | None:
        """Wait until the next try; if there is to be none, return why."""
        self._has_responded |= failure.has_response
        attempts.failures.append(str(failure))
        if failure.wait is not None and failure.wait > LONGEST_WAIT:
            return self._give_up(f"{failure}: it asks for a wait of {failure.wait:.0f} s")
        if len(attempts.failures) == TRIES:
            return self._fail(f"no answer after {TRIES} tries: {failure}")
        backoff = FIRST_WAIT * 2 ** (len(attempts.failures) - 1) * (1 - self._clock.chance() / 2) if failure.wait is None else failure.wait
        if failure.is_busy:
            self._rate_limiter.pause(backoff)
        else:
            self._clock.sleep(backoff)
        return None

    def _fail(self, detail: str) -> NoAnswer:
        with self._lock:
            self._failures_in_a_row += 1
            is_last = self._failures_in_a_row == FAILURES or not self._has_responded
        return self._give_up(detail) if is_last else NoAnswer("failed", detail)

    def _give_up(self, why: str) -> NoAnswer:
        with self._lock:
            is_first = self._given_up is None
            self._given_up = self._given_up or why
        if is_first:
            self._warn(
                f"{self._key}: gave up on {self._params.model} at {self._params.url}: {why}. Start the server or correct url, model or "
                "OPENAI_API_KEY, and run the stage again, which does not repeat answered questions; or remove this labeller from "
                "label.labellers. Latents that it did not label have the status failed; labels by other labellers are kept"
            )
        return NoAnswer("failed", why)

    def _no_answer_if_given_up(self) -> NoAnswer | None:
        return NoAnswer("failed", f"not asked, because the server was given up: {self._given_up}") if self._given_up else None

    def _over_budget(self, attempts: "_Attempts") -> NoAnswer:
        failed = f"; before that, {attempts.failures[-1]}" if attempts.failures else ""
        return NoAnswer("over_budget", f"{self._budget.spent()}{failed}")

    def _server(self) -> "Server":
        from ommatid.label.labellers.vlm.server import Server  # `openai` takes seconds to import, and is not needed if all is cached.

        with self._lock:
            self._opened = self._opened or Server(self._params.url, self._params.model, self._params.timeout)
            return self._opened


class _Attempts:
    """Requests sent so far for one question."""

    def __init__(self) -> None:
        self.n_requests = 0
        self.failures: list[str] = []
        self.with_schema = True
        """Whether the next request demands the answer's schema."""
