"""Which tokens of a forward pass are kept, and where they are: the policy `extract.tokens`."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ommatid.errors import ModelError
from ommatid.vlm import Hookpoint


@dataclass(frozen=True)
class Place:
    """What the table of activations says of a token."""

    token: int
    """Position in the model's sequence, special tokens first; 0 for pooled."""
    kind: str
    """cls, register, distillation (DeiT), patch or pooled."""
    row: int
    """Row of a patch in the grid; -1 for tokens without a place."""
    col: int
    """Column of a patch in the grid; -1 for tokens without a place."""


@dataclass(frozen=True)
class TokenPicker:
    """The tokens of one hookpoint that a policy keeps.

    Raises:
        ModelError: the hookpoint has no such token.
    """

    name: str
    """The hookpoint."""
    hookpoint: Hookpoint
    policy: str
    """patch, cls, register, pooled or all."""

    def __post_init__(self) -> None:
        if self._averages or self._kept:
            return
        has = sorted({*self.hookpoint.special, *(("patch", "pooled") if self.hookpoint.grid else ())})
        raise ModelError(f"extract.tokens: {self.policy!r} is not at hookpoint {self.name}; it has {', '.join([*has, 'all'])}")

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the kept patches, which come last; None when no kept token has a place."""
        return self.hookpoint.grid if any(place.kind == "patch" for place in self.places) else None

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """The kept tokens, in the order of `pick`."""
        return (Place(0, "pooled", -1, -1),) if self._averages else self._kept

    def pick(self, x_btd: Tensor) -> Tensor:
        """Of all tokens (batch, tokens, d_model) the kept ones, (batch, kept, d_model)."""
        if self._averages:
            return x_btd[:, len(self.hookpoint.special) :].float().mean(1, keepdim=True)
        return x_btd[:, self._positions]

    def put(self, x_btd: Tensor, kept_bkd: Tensor) -> Tensor:
        """The tokens with others in the place of the kept ones: what `pick` then gives is `kept_bkd`.

        Raises:
            ModelError: what is kept is a mean of tokens, and is at no place of the model.
        """
        if self._averages:
            raise ModelError(f"extract.tokens: pooled is the mean of the patches at {self.name}, no token whose place another can take")
        x_btd = x_btd.clone()
        x_btd[:, self._positions] = kept_bkd.to(x_btd)
        return x_btd

    @property
    def _averages(self) -> bool:
        return self.policy == "pooled" and self.hookpoint.grid is not None

    @cached_property
    def _kept(self) -> tuple[Place, ...]:
        return tuple(place for place in _all_places(self.hookpoint) if self.policy in (place.kind, "all"))

    @cached_property
    def _positions(self) -> Tensor | slice:
        kept = [place.token for place in self._kept]
        # consecutive as a rule: a slice copies nothing
        return slice(kept[0], kept[-1] + 1) if kept[-1] - kept[0] + 1 == len(kept) else torch.tensor(kept)


def _all_places(hookpoint: Hookpoint) -> list[Place]:
    special = [Place(i, kind, -1, -1) for i, kind in enumerate(hookpoint.special)]
    rows, cols = hookpoint.grid or (0, 0)
    patches = [Place(len(special) + r * cols + c, "patch", r, c) for r in range(rows) for c in range(cols)]
    return special + patches


def draw_kept(tokens_btd: Tensor, sample: int | None, max_norm: float | None, rng: np.random.Generator) -> np.ndarray:
    """Which tokens of training images are written: (images, tokens) bool.

    Args:
        tokens_btd: Kept tokens, (images, tokens, d_model).
        sample: At most this many an image, drawn without replacement; None: all.
        max_norm: Only tokens at most this many times as long as the median token of their image; None: all. Tokens of abnormal
            norm hold global information in place of local (arXiv 2309.16588).
        rng: Of the draw.
    """
    keep = np.ones(tokens_btd.shape[:2], dtype=bool)
    if max_norm is not None:
        norms = tokens_btd.float().norm(dim=2).numpy()
        # what is not a number is kept for the gate to find
        limit = max_norm * np.nan_to_num(np.median(norms, axis=1, keepdims=True), nan=np.inf)
        keep &= ~(norms > limit) | ~np.isfinite(norms)
    if sample is not None:
        draw = np.where(keep, rng.random(keep.shape), 2.0)
        keep &= draw.argsort(axis=1).argsort(axis=1) < sample
    return keep
