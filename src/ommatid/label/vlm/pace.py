"""When the next request may be sent, and whether any may: rate limit, pauses that a server asks for, budget."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


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
