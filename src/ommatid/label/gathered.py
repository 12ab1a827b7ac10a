"""What one pass over the firings of an SAE leaves of each latent: what its names are made of."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ommatid.config import LabelParams
from ommatid.halves import Fired, Halves
from ommatid.label.examples import MAX_FIRING, N_HARD_LATENTS
from ommatid.largest import largest
from ommatid.metrics import unit
from ommatid.sae.model import SAE
from ommatid.store import Artefact


@dataclass(frozen=True)
class Strongest:
    """The strongest images of the naming half of a latent."""

    rows: Tensor
    """Rows of `Halves`, strongest first."""
    acts: Tensor
    """Image-level activation of each, float64."""


class Gathered:
    """What is kept of each latent that fires."""

    def __init__(self, halves: Halves, params: LabelParams, neighbours: np.ndarray) -> None:
        self._halves = halves
        self._params = params
        self._neighbours = neighbours
        self.strongest: dict[int, Strongest] = {}
        """Of the latents that both halves have enough firing images of, and only of those there can be a name by looking."""
        self._samples: dict[int, np.ndarray] = {}
        """Some rows that fire each latent, for its neighbours' hard negatives."""

    def fill(self, all_fired: Iterator[Fired]) -> None:
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


def nearest_latents(sae: Artefact, block: int = 1024) -> np.ndarray:
    """The latents with the nearest directions, nearest first, the lower latent first of equals, (d_sae, N_HARD_LATENTS), without itself."""
    directions = unit(SAE.load(sae.path).W_dec).float()
    n = min(N_HARD_LATENTS, len(directions) - 1)
    nearest = []
    for start in range(0, len(directions), block):
        cosines = (directions[start : start + block] @ directions.T).numpy()
        np.fill_diagonal(cosines[:, start:], -np.inf)
        nearest.append(largest(cosines, n))
    return np.concatenate(nearest)
