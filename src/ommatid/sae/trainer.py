"""The trainer: several learners over one stream of batches; measures, notices, checkpoints. It is given batches and gives events.

Recipe and sources: Adam, lr 2e-4/√(d_sae/16384), warm-up, linear decay over the last fifth, clipping to 1, the gradient's part
parallel to each direction removed, directions renormalised, mean‖x‖² scaled to 1 (saprmarks/dictionary_learning);
datapoint init (saev); AuxK (arXiv 2406.04093); EMA threshold for inference (arXiv 2412.06410, appendix).
"""

import math
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ommatid.errors import StoppedError, TrainingError
from ommatid.events import Listener, Measured, Noticed, Progress
from ommatid.sae import distributed
from ommatid.sae.learner import PROGRESS, Learner, histograms
from ommatid.sae.step import Batch

CURVE_POINTS = 100
"""Rows of the training curves."""
FEWEST_STEPS = 200
"""Below it Adam's averages and the schedule have hardly begun."""
FEWEST_FIRINGS = 1000
"""Of a latent on average, below which that is said; the demo's 1,280 latents have 13,800."""
CHECKPOINT_SECONDS = 60.0
"""A run that is killed without warning loses so much, or what is between two measurements."""
PATIENCE = 20
"""Measurements without progress, of a hundred, after which that is said."""


class Trainer:
    """Runs learners through the same batches up to the end of their plan."""

    def __init__(self, learners: Sequence[Learner], on_event: Listener, checkpoint: Callable[[], None], patience: int | None = None):
        """Prepare.

        Args:
            learners: All of the same number of steps done, and to do.
            on_event: Hears of measurements and progress.
            checkpoint: Writes all learners' tensors; called now and then, and when the process is asked to end.
            patience: Measurements (hundredths of the run) without progress of any learner after which the run begins to end early;
                None: it never does.
        """
        self._learners = learners
        self._on_event = on_event if distributed.mine() == 0 else lambda event: None
        self._checkpoint = checkpoint if distributed.mine() == 0 else lambda: None
        self._patience = patience
        self._clock = _Clock()
        self._written = time.monotonic()

    @property
    def _step(self) -> int:
        return max(learner.guides.step for learner in self._learners)

    @property
    def _going(self) -> list[Learner]:
        """Those that have not diverged."""
        return [learner for learner in self._learners if not learner.has_diverged]

    @property
    def _n_steps(self) -> int:
        return self._learners[0].plan.n_steps

    def fit(self, batches: Iterator[Batch]) -> None:
        """Train on raw activations, beginning with the batch of the learners' step.

        Raises:
            TrainingError: the loss of the only learner, or of the last that had a finite one, is no longer finite.
            StoppedError: the process was asked to end; a checkpoint was written.
        """
        every = max(1, self._n_steps // CURVE_POINTS)
        if self._step == 0:
            for learner in self._learners:
                for what in _lacks(learner):
                    self._on_event(Noticed(learner.name, 0, what))
        with _terminating() as asked:
            while self._step < self._n_steps:
                with self._clock.waiting():
                    batch = next(batches)
                self._learn(batch)
                self._clock.count(batch.n_total)
                if self._step % every == 0 or self._step == self._n_steps:
                    self._measure()
                    if time.monotonic() - self._written > CHECKPOINT_SECONDS:
                        self._write()
                if distributed.total(int(asked.is_set())) and self._step < self._n_steps:
                    self._write()
                    raise StoppedError(f"train: step {self._step} of {self._n_steps}; run it again to go on from there")

    def _learn(self, batch: Batch) -> None:
        """One step of each learner; one that diverges is given up where others go on."""
        for learner in self._going:
            try:
                learner.learn(batch)
            except TrainingError as error:
                if len(self._going) == 1:
                    raise
                learner.give_up()
                self._on_event(Noticed(learner.name, learner.guides.step, f"given up, the others go on: {error}"))

    def _write(self) -> None:
        self._checkpoint()
        self._written = time.monotonic()

    def _measure(self) -> None:
        pace = self._clock.read()
        for learner in self._going:
            density, values = learner.take_density(), learner.measure()
            self._on_event(Measured(learner.name, self._step, values | pace, histograms(learner.weights, density)))
            for what in _notices(learner):
                self._on_event(Noticed(learner.name, self._step, what))
        self._on_event(Progress("train steps", self._step, self._n_steps))
        if self._patience and all(learner.stalled >= self._patience for learner in self._going):
            self._end_early()

    def _end_early(self) -> None:
        """The learning rate begins to fall now: it falls over the last fifth of what is then the whole run."""
        whole = self._step + max(1, self._step // 4)
        if whole < self._n_steps:
            for learner in self._learners:
                learner.shorten(whole)
                what = f"FVU has not fallen by {PROGRESS:.1%} for {self._patience} measurements: training ends at step {whole}"
                self._on_event(Noticed(learner.name, self._step, what))


def _lacks(learner: Learner) -> Iterator[str]:
    """Sentences about a run that is too short, before any of it is spent."""
    plan, params = learner.plan, learner.params
    seen = plan.n_steps * plan.batch_size * params.k / params.d_sae
    if plan.n_steps < FEWEST_STEPS or seen < FEWEST_FIRINGS:
        epochs = math.ceil(params.epochs * max(FEWEST_STEPS / plan.n_steps, FEWEST_FIRINGS / seen))
        yield (
            f"a short run: {plan.n_steps} steps, in which a latent fires {seen:,.0f} times on average ({plan.n_tokens:,} tokens an epoch "
            f"for {params.d_sae:,} latents); that is less than {FEWEST_STEPS} steps or {FEWEST_FIRINGS:,} firings: set train.epochs to "
            f"{epochs} or more, or a lower train.d_sae or train.batch_size, or give more images"
        )


def _notices(learner: Learner) -> Iterator[str]:
    if learner.stalled == PATIENCE:
        yield f"no progress: FVU has not fallen by {PROGRESS:.1%} for {PATIENCE} measurements (it is {learner.fvu:.4g})"
    if learner.fvu >= 1 and learner.guides.step == learner.plan.n_steps:
        yield f"FVU is {learner.fvu:.4g}, worse than the mean activation: lower train.lr, or give more steps"


class _Clock:
    """How fast training is, and how much of its time it waits for data."""

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
        """Since the last reading."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        values = {
            "tokens_per_second": self._n_tokens / seconds,
            "waiting": self._waited / seconds,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        self._start, self._waited, self._n_tokens = time.perf_counter(), 0.0, 0
        return values


@contextmanager
def _terminating() -> Iterator[threading.Event]:
    """In this block SIGTERM is only noted; outside the main thread, where no signals arrive, nothing changes."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: FrameType | None) -> None:
        asked.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
