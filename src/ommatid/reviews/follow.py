"""Finds reviewed features again in another SAE, by their directions.

A retrained SAE has other latents under the same numbers. What was said of a feature therefore goes with its direction, which the log keeps.
In another SAE it belongs to the latent whose direction has a cosine of at least `ALIKE` with it. Each latent takes at most one feature of
each older SAE, the most similar pairs first. The comparison is always with the direction of which something was said, so errors do not add
up over a chain of retrained SAEs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32

from ommatid.compute.nearest import ALIKE, TILE
from ommatid.reviews.event import Key
from ommatid.reviews.state import Feature, State, lists_of


@dataclass(frozen=True)
class Followed:
    """Where the features of which something was said are in one SAE."""

    sae: str
    """Name of the SAE in the tables."""
    latents: Mapping[Key, int]
    """Latent in which a feature of another SAE was found again."""
    cosines: Mapping[Key, float]
    """Cosine of the two directions."""
    orphans: tuple[Key, ...]
    """Features of other SAEs that were not found, sorted."""

    def covers(self, state: State) -> bool:
        """Return whether these are the reviewed features of other SAEs in `state`, so that `follow` need not be called again."""
        return {key for key in state.keys if key[0] != self.sae} == {*self.latents, *self.orphans}

    def key_of(self, key: Key) -> Key:
        """Return the feature of this SAE in which a feature is found; an orphan is returned as it is."""
        return (self.sae, self.latents[key]) if key in self.latents else key

    def feature(self, state: State, latent: int) -> Feature:
        """Return what is said of a latent of this SAE, with what was said of the features found in it, in the order of time."""
        return state.feature(*self._keys_of.get(latent, ((self.sae, latent),)))

    def features(self, state: State) -> dict[int, Feature]:
        """Return what is said of each latent of which something was said."""
        reviewed = {*self.latents.values(), *(latent for sae, latent in state.keys if sae == self.sae)}
        return {latent: self.feature(state, latent) for latent in sorted(reviewed)}

    def orphaned(self, state: State) -> dict[Key, Feature]:
        """Return what is said of the features that were not found."""
        return {key: state.feature(key) for key in self.orphans}

    def lists(self, state: State) -> dict[str, tuple[Key, ...]]:
        """Return the members of each list, as features of this SAE where they are found."""
        here = {(self.sae, latent): feature for latent, feature in self.features(state).items()}
        return lists_of(here | self.orphaned(state))

    @cached_property
    def _keys_of(self) -> dict[int, tuple[Key, ...]]:
        found: dict[int, list[Key]] = {}
        for key, latent in self.latents.items():
            found.setdefault(latent, [(self.sae, latent)]).append(key)
        return {latent: tuple(keys) for latent, keys in found.items()}


def follow(
    state: State, sae: str, directions: Float[np.ndarray, "d_sae d_model"] | Iterable[np.ndarray], keys: Iterable[Key] | None = None
) -> Followed:
    """Find the features of other SAEs of which something was said among the latents of an SAE.

    Args:
        state: What is said.
        sae: Name of the SAE in the tables.
        directions: Its directions, `(d_sae, d_model)` of any norm and any kind of float, or an iterable of tiles of their rows in order,
            so that not all of them have to be in memory at once.
        keys: Features to find; None for all of which something was said.

    Returns:
        Where the features are. Features of another width, and those whose direction is zeros, are orphans.
    """
    others = sorted(key for key in (state.keys if keys is None else keys) if key[0] != sae)
    pairs = sorted(_iter_alike(state, others, directions)) if others else []
    latents: dict[Key, int] = {}
    cosines: dict[Key, float] = {}
    taken: set[tuple[str, int]] = set()
    for negative, place, latent in pairs:  # of equal cosines, the lower latents
        key = others[place]
        if key not in latents and (key[0], latent) not in taken:
            latents[key], cosines[key] = latent, -negative
            taken.add((key[0], latent))
    return Followed(sae, latents, cosines, tuple(key for key in others if key not in latents))


def _iter_alike(state: State, keys: Sequence[Key], directions: np.ndarray | Iterable[np.ndarray]) -> Iterator[tuple[float, int, int]]:
    """Iterate over the pairs of directions that count as the same, as (minus their cosine, place in `keys`, latent)."""
    known = [state.direction(key).astype(np.float32) for key in keys]
    first = 0
    for tile in _iter_tiles(directions):
        places = [place for place, direction in enumerate(known) if len(direction) == tile.shape[1] and direction.any()]
        queries = np.stack([known[place] / np.linalg.norm(known[place]) for place in places]) if places else tile[:0]
        norms = np.sqrt(np.einsum("ld,ld->l", tile, tile))
        products = queries @ tile.T
        for row, column in np.argwhere(products >= ALIKE * np.where(norms > 0, norms, np.inf)).tolist():
            yield -float(products[row, column] / norms[column]), places[row], first + column
        first += len(tile)


def _iter_tiles(directions: np.ndarray | Iterable[np.ndarray]) -> Iterator[Float32[np.ndarray, "latents d_model"]]:
    is_whole = isinstance(directions, np.ndarray)
    tiles = (directions[start : start + TILE] for start in range(0, len(directions), TILE)) if is_whole else directions
    return (np.asarray(tile, dtype=np.float32) for tile in tiles)
