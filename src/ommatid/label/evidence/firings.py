"""What one pass over the firings of an SAE leaves of each latent: what its names are made of.

The naming half of the evaluation images (see images/eval_split.py) makes the name and the detection threshold; the held-out half scores it:
firing images against images that do not fire, half of them random, half of them hard (they fire the latents whose directions are
nearest).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ommatid.compute.nearest import nearest
from ommatid.config import LabelParams
from ommatid.images.eval_split import EvalSplit, LatentFirings
from ommatid.metrics import unit
from ommatid.sae.model import SAE
from ommatid.store import Artefact

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


def draw_test(fired: LatentFirings, halves: EvalSplit, held_out: bool, neighbours: Sequence[np.ndarray], rng: np.random.Generator) -> Test:
    """Firing images of one half and as many that do not fire; `neighbours` are rows that fire the nearest latents."""
    drawn = rng.permutation(np.flatnonzero(halves.is_held_out[fired.rows] == held_out))[:MAX_FIRING]
    hard, random = draw_silent(fired, halves, held_out, neighbours, len(drawn), rng)
    return Test(fired.rows[drawn], fired.acts[drawn], hard, random)


def draw_silent(
    fired: LatentFirings, halves: EvalSplit, held_out: bool, neighbours: Sequence[np.ndarray], n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """At most n rows of one half that do not fire: up to half of them fire the nearest latents, the others are random."""
    silent = halves.is_held_out == held_out
    silent[fired.rows] = False
    near = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *neighbours]))
    hard = rng.permutation(near[silent[near]])[: n // 2]
    silent[hard] = False
    return hard, rng.permutation(np.flatnonzero(silent))[: n - len(hard)]


@dataclass(frozen=True)
class Strongest:
    """The strongest images of the naming half of a latent."""

    rows: Tensor
    """Rows of `EvalSplit`, strongest first."""
    acts: Tensor
    """Image-level activation of each, float64."""


class Gathered:
    """What is kept of each latent that fires."""

    def __init__(self, halves: EvalSplit, params: LabelParams, neighbours: np.ndarray) -> None:
        self._halves = halves
        self._params = params
        self._neighbours = neighbours
        self.strongest: dict[int, Strongest] = {}
        """Of the latents that both halves have enough firing images of, and only of those there can be a name by looking."""
        self._samples: dict[int, np.ndarray] = {}
        """Some rows that fire each latent, for its neighbours' hard negatives."""

    def fill(self, all_fired: Iterator[LatentFirings]) -> None:
        """One pass over the latents that fire."""
        for fired in all_fired:
            self._samples[fired.latent] = fired.rows[:: max(1, len(fired.rows) // MAX_FIRING)][:MAX_FIRING]
            naming = np.flatnonzero(~self._halves.is_held_out[fired.rows])
            if min(len(naming), len(fired.rows) - len(naming)) >= self._params.min_examples:
                first = naming[: self._params.n_examples]
                rows, acts = fired.rows[first].astype(np.int64), fired.acts[first]
                self.strongest[fired.latent] = Strongest(torch.from_numpy(rows), torch.from_numpy(acts))

    def near(self, latent: int) -> list[np.ndarray]:
        """Rows that fire each of the latents with the nearest directions."""
        return [self._samples[i] for i in self._neighbours[latent].tolist() if i in self._samples]


def nearest_latents(sae: Artefact) -> np.ndarray:
    """The latents with the nearest directions, nearest first, the lower latent first of equals, (d_sae, N_HARD_LATENTS), without itself."""
    directions = unit(SAE.load(sae.path).W_dec).float()
    n = min(N_HARD_LATENTS, len(directions) - 1)
    return nearest(directions, directions, n, np.arange(len(directions))).others
