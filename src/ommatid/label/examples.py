"""Which images a latent is named by, and which ones its name is tested on: never the same.

The naming half of the evaluation images (see halves.py) makes the name and the detection threshold; the held-out half scores it:
firing images against images that do not fire, half of them random, half of them hard (they fire the latents whose directions are
nearest).
"""

from dataclasses import dataclass

import numpy as np

from ommatid.halves import Fired, Halves

MAX_FIRING = 64
"""Firing images drawn for a test, from all strengths."""
N_HARD_LATENTS = 8
"""Nearest latents whose images serve as hard negatives."""


@dataclass(frozen=True)
class Test:
    """Rows on which a name is tried."""

    positive: np.ndarray
    negative: np.ndarray


def draw_test(fired: Fired, halves: Halves, held_out: bool, neighbours: list[np.ndarray], rng: np.random.Generator) -> Test:
    """Firing images of one half and as many that do not fire; `neighbours` are rows that fire the nearest latents."""
    positive = fired.rows[halves.is_held_out[fired.rows] == held_out]
    positive = rng.permutation(positive)[:MAX_FIRING]
    silent = halves.is_held_out == held_out
    silent[fired.rows] = False
    hard = np.unique(np.concatenate([rows[silent[rows]] for rows in neighbours])) if neighbours else np.empty(0, dtype=np.int64)
    hard = rng.permutation(hard)[: len(positive) // 2]
    silent[hard] = False
    others = np.flatnonzero(silent)
    random = rng.permutation(others)[: len(positive) - len(hard)]
    return Test(positive, np.concatenate([hard, random]))
