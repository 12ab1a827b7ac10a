"""The arithmetic of an estimate: seconds as a line over work, and how large the trials grow within a budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SMALLEST = 32
"""Images of the first trial."""
LARGEST = 8192
"""Images of the last trial at most: a shard of activations; larger runs repeat what one shard takes."""
SHARE = 2
"""Trials take at most one image of so many: an estimate should not cost what it estimates."""


@dataclass(frozen=True)
class Timed:
    """A trial."""

    work: float
    """Units: images, tokens."""
    seconds: float
    """What they took."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a stage by its work."""

    known: Timed
    """A whole process, alone: start, imports, networks, work, gate, end."""
    per_unit: float
    """Seconds of one more unit."""

    def seconds(self, work: float) -> float:
        """Of a whole process with so much work."""
        return max(0.0, self.known.seconds + self.per_unit * (work - self.known.work))


def fit(warm: Sequence[Timed], known: Timed) -> Cost:
    """The line that has the slope of the trials of one process, and goes through what a process of its own took.

    Args:
        warm: Runs in one process that has paid for imports and first calls, which would hide what the work costs.
        known: A process that ran only the largest trial, from its start to its end.
    """
    least, most = (choose(warm, key=lambda trial: trial.work) for choose in (min, max)) if warm else (known, known)
    more = most.work - least.work
    return Cost(known, max(0.0, most.seconds - least.seconds) / more if more > 0 else 0.0)


def trial_sizes(n_images: int) -> list[int]:
    """Images of trials that a set of so many allows, ascending: powers of two from SMALLEST on, two sizes at least where there are."""
    most = min(LARGEST, max(2 * SMALLEST, n_images // SHARE))
    sizes = []
    size = SMALLEST
    while size <= min(most, n_images):
        sizes.append(size)
        size *= 2
    return sizes or [n_images]


def grow(run: Callable[[int], float], works: Sequence[float], budget: float) -> list[Timed]:
    """Run trials from small to large, while the next is expected to take at most `budget` seconds.

    The first is run twice and the second in any case, for a line needs two points. From two points on the largest that the
    budget allows comes next, so that few trials are needed; a single point is taken for a proportion, which expects too much.

    Args:
        run: Runs the trial of this index; gives its seconds.
        works: Work of each trial there can be, ascending.
        budget: Seconds of one trial.

    Returns:
        All but the very first, which paid for imports and first calls.
    """
    run(0)
    last, warm = 0, [Timed(works[0], run(0))]
    while last + 1 < len(works):
        affordable = [i for i in range(last + 1, len(works)) if expect(warm, works[i]) <= budget]
        if not affordable and len(warm) > 1:
            break
        last = affordable[-1] if affordable else last + 1
        warm.append(Timed(works[last], run(last)))
    return warm


def expect(warm: Sequence[Timed], work: float) -> float:
    """Seconds of a warm trial of so much work, by those that were done."""
    if len(warm) == 1:
        return warm[0].seconds * work / max(warm[0].work, 1e-9)
    before, last = warm[-2], warm[-1]
    per_unit = max(0.0, last.seconds - before.seconds) / (last.work - before.work)
    return last.seconds + per_unit * (work - last.work)
