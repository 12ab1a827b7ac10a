"""An iterator that runs ahead of its consumer in a thread."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

_END = object()


def prefetch(items: Iterable[T], n: int) -> Generator[T, None, None]:
    """Yield items while a thread computes up to `n` of them in advance.

    An error is raised where it would have been raised without the thread. The thread ends when the consumer does, even if the consumer
    stops early.

    Args:
        items: Items to compute in the thread.
        n: Number of items computed in advance.

    Yields:
        The items, in order.
    """
    waiting: queue.Queue[Any] = queue.Queue(n)
    stopped = threading.Event()

    def put(value: Any) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:  # Passed on, for the consumer's thread to raise.
            put((_END, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
