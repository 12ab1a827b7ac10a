"""The schedule of a training run, derived from its parameters and the number of training tokens."""

import math
from dataclasses import dataclass, replace

from ommatid.config import TrainParams
from ommatid.errors import TrainingError

CURVE_POINTS = 100
"""Smallest number of measurements in a run that has at least as many steps. Each measurement adds a row to the training curves."""


@dataclass(frozen=True)
class Plan:
    """The schedule of a training run."""

    n_tokens: int
    """Training tokens per epoch."""
    batch_size: int
    """Tokens per step, over all ranks."""
    n_steps: int
    """Total number of optimiser steps."""
    lr: float
    """Peak learning rate."""
    dead_after: int
    """Tokens without a firing after which a latent counts as dead: the least of 10 million, a tenth of the run, and 8 epochs."""
    measure_every: int
    """Steps between measurements. They do not change if the run is shortened."""

    def like(self, whole: "Plan") -> "Plan":
        """Return a copy of this plan, for a short run, whose steps cost as much as those of the whole run.

        Left unchanged, a short run would measure after every step, and would count latents as dead, and spend time on reviving them,
        after a few batches. The copy takes both intervals from the plan of the whole run.
        """
        return replace(self, dead_after=whole.dead_after, measure_every=whole.measure_every)

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up: 1000 or a twentieth of the run, whichever is less."""
        return max(1, min(1000, self.n_steps // 20))

    @property
    def threshold_start(self) -> int:
        """Step at which averaging of the threshold begins: 1000 or a tenth of the run, whichever is less."""
        return min(1000, self.n_steps // 10)

    @property
    def threshold_decay(self) -> float:
        """Decay of the threshold's moving average: 0.999, or less in short runs, so that it spans at most a twentieth of the run."""
        return min(0.999, 1 - 20 / max(self.n_steps, 40))

    def lr_at(self, step: int) -> float:
        """Return the learning rate at a step, counted from 0."""
        decay_start = self.n_steps - self.n_steps // 5
        warm = min((step + 1) / self.warmup, 1.0)
        cool = min((self.n_steps - step) / max(self.n_steps - decay_start, 1), 1.0)
        return self.lr * warm * cool


def make_plan(params: TrainParams, n_tokens: int) -> Plan:
    """Derive the schedule.

    Args:
        params: Parameters of training.
        n_tokens: Training tokens per epoch.

    Returns:
        The schedule.

    Raises:
        TrainingError: There are too few tokens for one step.
    """
    batch_size = min(params.batch_size, n_tokens)
    if batch_size < 2:
        raise TrainingError(f"train: {n_tokens} training tokens; at least 2 are needed: add images, or lower images.eval_share")
    steps_per_epoch = n_tokens // batch_size
    lr = params.lr if params.lr is not None else 2e-4 / math.sqrt(params.d_sae / 16384)
    n_steps = steps_per_epoch * params.epochs
    # dead_after is bounded by a share of the run because AuxK must begin while there is still time to revive latents.
    dead_after = min(10_000_000, n_steps * batch_size // 10, 8 * n_tokens)
    return Plan(n_tokens, batch_size, n_steps, lr, dead_after, max(1, n_steps // CURVE_POINTS))
