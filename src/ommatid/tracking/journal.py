"""Journal: what a training said, on its way to MLflow: points of curves, rows of histograms, notes.

The training thread only appends to a queue; all else is done by whoever takes from it.
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
"""MLflow's limit of metrics a request."""
HISTOGRAM_COLUMNS = ("step", "histogram", "low", "high", "latents")
"""Of the table of histograms: a row a bin."""


@dataclass
class Page:
    """What is known of one SAE."""

    unsent: list[tuple[int, Measured]] = field(default_factory=list)
    """Measurements that MLflow does not have yet, and when they were made, in milliseconds since 1970."""
    rows: list[tuple[int, str, float, float, int]] = field(default_factory=list)
    """Of `HISTOGRAM_COLUMNS`."""
    notes: list[str] = field(default_factory=list)
    """Sentences that whoever looks at the run should read."""

    def add(self, when: int, event: Measured | Noticed) -> None:
        """Take in what was said."""
        if isinstance(event, Noticed):
            self.notes.append(f"Step {event.step}: {event.what}")
            return
        self.unsent.append((when, event))
        for name, (edges, counts) in event.histograms.items():
            self.rows += [(event.step, name, low, high, n) for (low, high), n in zip(itertools.pairwise(edges), counts, strict=True)]

    def iter_metrics(self) -> Iterator[list["Metric"]]:
        """What is unsent, in batches that MLflow takes."""
        from mlflow.entities import Metric

        metrics = (Metric(key, value, when, event.step) for when, event in self.unsent for key, value in event.values.items())
        while batch := list(itertools.islice(metrics, MAX_BATCH)):
            yield batch

    def histograms(self) -> str:
        """The table of histograms as JSON, which MLflow shows as one."""
        return json.dumps({"columns": HISTOGRAM_COLUMNS, "data": self.rows})


class Journal:
    """Of all SAEs of a training."""

    def __init__(self, saes: list[str]) -> None:
        self._heard: deque[tuple[int, Measured | Noticed]] = deque()  # the one thing both threads touch; append and popleft are atomic
        self.pages = {name: Page() for name in saes}

    def hear(self, event: Event) -> None:
        """Note an event; all that the training thread does."""
        if isinstance(event, Measured | Noticed):
            assert event.sae in self.pages, f"measured of {event.sae!r}, which is none of {list(self.pages)}"
            self._heard.append((time.time_ns() // 1_000_000, event))

    def sort(self) -> None:
        """Put what was heard on the page of its SAE."""
        while self._heard:
            when, event = self._heard.popleft()
            self.pages[event.sae].add(when, event)
