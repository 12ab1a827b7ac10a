"""The journal of a training: measurements, histograms and notices waiting to be sent to MLflow.

The training thread only appends events to a queue; the sending thread does everything else.
"""

import itertools
import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ommatid.events import Event, Measured, Noticed

if TYPE_CHECKING:
    from mlflow.entities import Metric

MAX_BATCH = 1000
"""Maximum number of metrics in one request, set by MLflow."""
HISTOGRAM_COLUMNS = ("step", "histogram", "low", "high", "latents")
"""Columns of the table of histograms, which has a row for each bin."""


@dataclass
class Page:
    """The events of one SAE."""

    unsent: list[tuple[int, Measured]] = field(default_factory=list)
    """Measurements not yet sent to MLflow, each with its time in milliseconds since 1970."""
    rows: list[tuple[int, str, float, float, int]] = field(default_factory=list)
    """Rows of the table of histograms, in the order of `HISTOGRAM_COLUMNS`."""
    notes: list[str] = field(default_factory=list)
    """Notices, one sentence each, for the description of the run."""

    def add(self, when: int, event: Measured | Noticed) -> None:
        """Add an event that occurred at `when`, in milliseconds since 1970."""
        if isinstance(event, Noticed):
            self.notes.append(f"Step {event.step}: {event.what}")
            return
        self.unsent.append((when, event))
        for name, (edges, counts) in event.histograms.items():
            self.rows += [(event.step, name, low, high, n) for (low, high), n in zip(itertools.pairwise(edges), counts, strict=True)]

    def iter_metrics(self) -> Iterator[list["Metric"]]:
        """Iterate over the unsent measurements, in batches small enough for one request."""
        from mlflow.entities import Metric

        metrics = (Metric(key, value, when, event.step) for when, event in self.unsent for key, value in event.values.items())
        while batch := list(itertools.islice(metrics, MAX_BATCH)):
            yield batch

    def histograms(self) -> str:
        """The table of histograms, as JSON that MLflow displays as a table."""
        return json.dumps({"columns": HISTOGRAM_COLUMNS, "data": self.rows})


class Journal:
    """The events of all SAEs of a training, with a page for each SAE."""

    def __init__(self, saes: list[str]) -> None:
        self._queue: deque[tuple[int, Measured | Noticed]] = deque()  # all that the two threads share; append and popleft are atomic
        self.pages = {name: Page() for name in saes}

    def record(self, event: Event) -> None:
        """Append an event to the queue; the only method that the training thread calls."""
        if isinstance(event, Measured | Noticed):
            assert event.sae in self.pages, f"event of {event.sae!r}, which is none of {list(self.pages)}"
            self._queue.append((time.time_ns() // 1_000_000, event))

    def sort(self) -> None:
        """Move the events from the queue to the pages of their SAEs."""
        while self._queue:
            when, event = self._queue.popleft()
            self.pages[event.sae].add(when, event)
