"""Which images a latent is named by, and which ones its name is tested on: never the same.

The naming half of the evaluation images (see halves.py) makes the name and the detection threshold; the held-out half scores it:
firing images against images that do not fire, half of them random, half of them hard (they fire the latents whose directions are
nearest).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ommatid.halves import Fired, Halves

MAX_FIRING = 64
"""Firing images drawn for a test, from all strengths."""
N_HARD_LATENTS = 8
"""Nearest latents whose images serve as hard negatives."""


@dataclass(frozen=True)
class Test:
    """Rows on which a name is tried, all of one half, in an order that has nothing to do with their activations."""

    positive: np.ndarray
    """Rows that fire the latent."""
    acts: np.ndarray
    """Image-level activation of each of them."""
    hard: np.ndarray
    """Rows that do not, but fire the latents with the nearest directions."""
    random: np.ndarray
    """Other rows that do not."""

    @property
    def negative(self) -> np.ndarray:
        """All rows that do not fire it."""
        return np.concatenate([self.hard, self.random])

    @property
    def rows(self) -> np.ndarray:
        """All of them."""
        return np.concatenate([self.positive, self.negative])


def draw_test(fired: Fired, halves: Halves, held_out: bool, neighbours: Sequence[np.ndarray], rng: np.random.Generator) -> Test:
    """Firing images of one half and as many that do not fire; `neighbours` are rows that fire the nearest latents."""
    drawn = rng.permutation(np.flatnonzero(halves.is_held_out[fired.rows] == held_out))[:MAX_FIRING]
    hard, random = draw_silent(fired, halves, held_out, neighbours, len(drawn), rng)
    return Test(fired.rows[drawn], fired.acts[drawn], hard, random)


def draw_silent(
    fired: Fired, halves: Halves, held_out: bool, neighbours: Sequence[np.ndarray], n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """At most n rows of one half that do not fire: up to half of them fire the nearest latents, the others are random."""
    silent = halves.is_held_out == held_out
    silent[fired.rows] = False
    near = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *neighbours]))
    hard = rng.permutation(near[silent[near]])[: n // 2]
    silent[hard] = False
    return hard, rng.permutation(np.flatnonzero(silent))[: n - len(hard)]
