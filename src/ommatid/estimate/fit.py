"""The arithmetic of an estimate: seconds as a linear function of work, and the sizes of trials that a budget of time allows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SMALLEST = 32
"""Number of images of the smallest trial."""
LARGEST = 8192
"""Maximum number of images of a trial. It is that of a shard of activations, and larger runs only repeat what one shard takes."""
SHARE = 2
"""A trial takes at most one in this many images, so that an estimate costs less than the run."""


@dataclass(frozen=True)
class Timing:
    """Time that a trial took."""

    work: float
    """Amount of work, in units such as images or tokens."""
    seconds: float
    """Seconds that it took."""


@dataclass(frozen=True)
class Cost:
    """Cost of a stage: seconds as a linear function of work."""

    known: Timing
    """Timing of a process that ran alone, with its start, imports, loading of networks, work, gate and end."""
    per_unit: float
    """Seconds that one more unit of work takes."""

    def seconds(self, work: float) -> float:
        """Return the seconds that a process takes from start to end for an amount of work."""
        return max(0.0, self.known.seconds + self.per_unit * (work - self.known.work))


def fit(warm: Sequence[Timing], known: Timing) -> Cost:
    """Fit a line whose slope comes from trials in one warm process, and which passes through a process that ran alone.

    Args:
        warm: Timings in one process that had already run the stage, so that imports and first calls do not hide what the work costs.
        known: Timing of a process that ran only the largest trial, from start to end.

    Returns:
        The cost of the stage.
    """
    least, most = (choose(warm, key=lambda trial: trial.work) for choose in (min, max)) if warm else (known, known)
    more = most.work - least.work
    return Cost(known, max(0.0, most.seconds - least.seconds) / more if more > 0 else 0.0)


def trial_sizes(n_images: int) -> list[int]:
    """Return the possible sizes of trials, in images, for a data set of `n_images`, in ascending order.

    They are powers of two from SMALLEST on, and at least two if the data set is large enough.
    """
    most = min(LARGEST, max(2 * SMALLEST, n_images // SHARE))
    sizes = []
    size = SMALLEST
    while size <= min(most, n_images):
        sizes.append(size)
        size *= 2
    return sizes or [n_images]


def grow(run: Callable[[int], float], works: Sequence[float], budget: float) -> list[Timing]:
    """Run trials from small to large, as long as the next is expected to take at most `budget` seconds.

    The first trial runs twice, and a second one runs in any case, because a line needs two points. The next trial is always the largest
    that the budget allows, so that few are needed. While there is only one point, seconds are taken to be proportional to work, which
    overestimates them.

    Args:
        run: Function that runs the trial of an index and returns its seconds.
        works: Work of each possible trial, ascending.
        budget: Maximum seconds of one trial.

    Returns:
        Timings of all runs but the very first, which paid for imports and first calls.
    """
    run(0)
    last, warm = 0, [Timing(works[0], run(0))]
    while last + 1 < len(works):
        affordable = [i for i in range(last + 1, len(works)) if expect(warm, works[i]) <= budget]
        if not affordable and len(warm) > 1:
            break
        last = affordable[-1] if affordable else last + 1
        warm.append(Timing(works[last], run(last)))
    return warm


def expect(warm: Sequence[Timing], work: float) -> float:
    """Return the seconds that a trial of this much work is expected to take in the warm process."""
    if len(warm) == 1:
        return warm[0].seconds * work / max(warm[0].work, 1e-9)
    before, last = warm[-2], warm[-1]
    per_unit = max(0.0, last.seconds - before.seconds) / (last.work - before.work)
    return last.seconds + per_unit * (work - last.work)
