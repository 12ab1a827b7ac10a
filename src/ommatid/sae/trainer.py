"""The trainer: it trains several learners on one stream of batches, writes checkpoints and emits events.

The recipe and its sources:

- saprmarks/dictionary_learning: Adam with lr 2e-4/√(d_sae/16384), warm-up, and linear decay over the last fifth; gradients without the
  component parallel to the directions, clipped to norm 1; directions renormalised; mean ‖x‖² scaled to 1
- saev: datapoint init
- arXiv 2406.04093: AuxK
- arXiv 2412.06410, appendix: moving average of the threshold for inference
"""

import math
import resource
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ommatid.compute.checkpoint import Checkpoint
from ommatid.errors import StoppedError, TrainingError
from ommatid.events import Listener, Measured, Noticed, Progress
from ommatid.sae import distributed
from ommatid.sae.learner import PROGRESS, Learner, histograms
from ommatid.sae.step import Batch

FEWEST_STEPS = 200
"""Number of steps below which a run is reported as short: until then, Adam's averages and the schedule have hardly begun to work."""
FEWEST_FIRINGS = 1000
"""Mean number of firings per latent below which a run is reported as short. In the demo, 1,280 latents fire 13,800 times each."""
PATIENCE = 20
"""Number of measurements (hundredths of the run) without progress after which the lack of progress is reported."""


class Trainer:
    """Trains learners on the same batches until the end of their schedule."""

    def __init__(
        self,
        learners: Sequence[Learner],
        on_event: Listener,
        checkpoint: Checkpoint | None,
        patience: int | None = None,
        must_survive: bool = True,
    ):
        """Make a trainer.

        Args:
            learners: Learners that have all completed the same number of steps and have the same number left.
            on_event: Called with each progress event and warning.
            checkpoint: Checkpoint of the state of all learners, written after a measurement if it is due, and when the process receives
                SIGTERM. None means that nothing is written.
            patience: Number of measurements (hundredths of the run) without progress by any learner after which the run ends early. None
                means that it never ends early.
            must_survive: Whether it is an error if all learners diverge. If not, training ends early then.
        """
        self._learners = learners
        self._must_survive = must_survive
        self._on_event = on_event if distributed.rank() == 0 else lambda event: None
        self._checkpoint = checkpoint if distributed.rank() == 0 else None
        self._patience = patience
        self._clock = _Clock()

    @property
    def _step(self) -> int:
        return max(learner.guides.step for learner in self._learners)

    @property
    def _active(self) -> list[Learner]:
        """Learners that have not diverged."""
        return [learner for learner in self._learners if not learner.has_diverged]

    @property
    def _n_steps(self) -> int:
        return self._learners[0].plan.n_steps

    def fit(self, batches: Iterator[Batch]) -> None:
        """Train the learners.

        Args:
            batches: Batches of raw activations, beginning with the one for the learners' next step.

        Raises:
            TrainingError: The only learner that has not diverged diverges, so that its loss or gradient is no longer finite, and one must
                survive.
            StoppedError: The process received SIGTERM. A checkpoint was written.
        """
        every = self._learners[0].plan.measure_every
        if self._step == 0:
            for learner in self._learners:
                for what in _short_run_notices(learner):
                    self._on_event(Noticed(learner.name, 0, what))
        with _deferred_sigterm() as stop_requested:
            while self._step < self._n_steps and self._active:
                with self._clock.waiting():
                    batch = next(batches)
                self._learn(batch)
                self._clock.count(batch.n_total)
                if self._step % every == 0 or self._step == self._n_steps:
                    self._measure()
                    if self._checkpoint and self._checkpoint.is_due:
                        self._write()
                if distributed.total(int(stop_requested.is_set())) and self._step < self._n_steps:
                    self._write()
                    raise StoppedError(f"train: stopped at step {self._step} of {self._n_steps}; run it again to continue from there")

    def _learn(self, batch: Batch) -> None:
        """Take one step with each learner. A learner that diverges is given up, unless it is the only one left."""
        for learner in self._active:
            try:
                learner.learn(batch)
            except TrainingError as error:
                if len(self._active) == 1 and self._must_survive:
                    raise
                learner.give_up()
                self._on_event(Noticed(learner.name, learner.guides.step, f"given up; training continues with the remaining SAEs: {error}"))

    def _write(self) -> None:
        if self._checkpoint:
            self._checkpoint.save({learner.name: learner for learner in self._learners})

    def _measure(self) -> None:
        pace = self._clock.read()
        for learner in self._active:
            density, values = learner.take_density(), learner.measure()
            self._on_event(Measured(learner.name, self._step, values | pace, histograms(learner.weights, density)))
            for what in _notices(learner):
                self._on_event(Noticed(learner.name, self._step, what))
        self._on_event(Progress("train steps", self._step, self._n_steps))
        if self._patience and all(learner.n_stalled >= self._patience for learner in self._active):
            self._end_early()

    def _end_early(self) -> None:
        """Shorten the run to five quarters of the steps so far: its last fifth, in which the learning rate decays, begins now."""
        whole = self._step + max(1, self._step // 4)
        if whole < self._n_steps:
            for learner in self._learners:
                learner.shorten(whole)
                what = f"FVU has not fallen by {PROGRESS:.1%} for {self._patience} measurements: training ends at step {whole}"
                self._on_event(Noticed(learner.name, self._step, what))


def _short_run_notices(learner: Learner) -> Iterator[str]:
    """Yield a notice if the run is too short. It comes before the first step, so that no time is lost."""
    plan, params = learner.plan, learner.params
    seen = plan.n_steps * plan.batch_size * params.k / params.d_sae
    if plan.n_steps < FEWEST_STEPS or seen < FEWEST_FIRINGS:
        epochs = math.ceil(params.epochs * max(FEWEST_STEPS / plan.n_steps, FEWEST_FIRINGS / seen))
        yield (
            f"a short run: {plan.n_steps} steps, in which a latent fires {seen:,.0f} times on average ({plan.n_tokens:,} tokens per epoch "
            f"for {params.d_sae:,} latents); that is less than {FEWEST_STEPS} steps or {FEWEST_FIRINGS:,} firings: set train.epochs to "
            f"{epochs} or more, lower train.d_sae or train.batch_size, or add images"
        )


def _notices(learner: Learner) -> Iterator[str]:
    if learner.n_stalled == PATIENCE:
        yield f"no progress: FVU has not fallen by {PROGRESS:.1%} for {PATIENCE} measurements (it is {learner.fvu:.4g})"
    if learner.fvu >= 1 and learner.guides.step == learner.plan.n_steps:
        yield f"FVU is {learner.fvu:.4g}, worse than predicting the mean activation: lower train.lr, or train for more steps"


class _Clock:
    """Measures the speed of training and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self._n_tokens = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def count(self, n_tokens: int) -> None:
        self._n_tokens += n_tokens

    def read(self) -> dict[str, float]:
        """Return the values since the last reading."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        values = {
            "tokens_per_second": self._n_tokens / seconds,
            "waiting": self._waited / seconds,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        self._start, self._waited, self._n_tokens = time.perf_counter(), 0.0, 0
        return values


@contextmanager
def _deferred_sigterm() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets instead of ending the process. Only the main thread can do so; in others the event is never set."""
    stop_requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested
        return

    def handler(number: int, frame: FrameType | None) -> None:
        stop_requested.set()

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield stop_requested
    finally:
        signal.signal(signal.SIGTERM, previous)
