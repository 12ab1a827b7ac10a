"""The schedule of a run: what follows from params and the number of tokens."""

import math
from dataclasses import dataclass

from ommatid.config import TrainParams
from ommatid.errors import TrainingError


@dataclass(frozen=True)
class Plan:
    """What follows from params and the number of tokens."""

    n_tokens: int
    """Training tokens of an epoch."""
    batch_size: int
    """Tokens a step, of all ranks."""
    n_steps: int
    """Optimiser steps in all."""
    lr: float
    """Peak learning rate."""
    dead_after: int
    """Tokens without a firing after which a latent is dead: 10 M, a tenth of the run, or 8 epochs, whichever is least."""

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up: 1000 or a twentieth of the run."""
        return max(1, min(1000, self.n_steps // 20))

    @property
    def threshold_start(self) -> int:
        """Step at which the threshold's average begins: 1000 or a tenth of the run."""
        return min(1000, self.n_steps // 10)

    @property
    def threshold_decay(self) -> float:
        """0.999, or less in short runs, so that the average spans at most the last twentieth."""
        return min(0.999, 1 - 20 / max(self.n_steps, 40))

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        decay_start = self.n_steps - self.n_steps // 5
        warm = min((step + 1) / self.warmup, 1.0)
        cool = min((self.n_steps - step) / max(self.n_steps - decay_start, 1), 1.0)
        return self.lr * warm * cool


def make_plan(params: TrainParams, n_tokens: int) -> Plan:
    """The schedule for so many training tokens.

    Raises:
        TrainingError: fewer tokens than make one step.
    """
    batch_size = min(params.batch_size, n_tokens)
    if batch_size < 2:
        raise TrainingError(f"train: {n_tokens} training tokens; at least 2 are needed: give more images, or lower images.eval_share")
    steps_per_epoch = n_tokens // batch_size
    lr = params.lr if params.lr is not None else 2e-4 / math.sqrt(params.d_sae / 16384)
    n_steps = steps_per_epoch * params.epochs
    # of the run: AuxK has to begin while there is time to bring latents back
    return Plan(n_tokens, batch_size, n_steps, lr, min(10_000_000, n_steps * batch_size // 10, 8 * n_tokens))
