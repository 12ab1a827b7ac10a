"""Selection of tokens from a forward pass, by the policy that `extract.tokens` sets, and their places in the image."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ommatid.errors import ModelError
from ommatid.vlm import Hookpoint


@dataclass(frozen=True)
class Place:
    """Columns that describe a token in the table of activations."""

    token: int
    """Position in the model's sequence, with special tokens first; 0 for a pooled token."""
    kind: str
    """Kind of token: cls, register, distillation (DeiT), patch or pooled."""
    row: int
    """Row of a patch in the grid; -1 for other tokens."""
    col: int
    """Column of a patch in the grid; -1 for other tokens."""


@dataclass(frozen=True)
class TokenPicker:
    """Picks the tokens of one hookpoint that a policy keeps.

    Raises:
        ModelError: The hookpoint has no such token.
    """

    name: str
    """Name of the hookpoint."""
    hookpoint: Hookpoint
    """Description of the hookpoint."""
    policy: str
    """Kind of token to keep: patch, cls, register, pooled or all."""

    def __post_init__(self) -> None:
        if self._averages or self._kept:
            return
        has = sorted({*self.hookpoint.special, *(("patch", "pooled") if self.hookpoint.grid else ())})
        raise ModelError(f"extract.tokens: hookpoint {self.name} has no {self.policy!r}; it has {', '.join([*has, 'all'])}")

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the kept patches, which come after all other tokens; None if no kept token is a patch."""
        return self.hookpoint.grid if any(place.kind == "patch" for place in self.places) else None

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Descriptions of the kept tokens, in the order of `pick`."""
        return (Place(0, "pooled", -1, -1),) if self._averages else self._kept

    def pick(self, x_btd: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch kept d_model"]:
        """Return the kept tokens, `(batch, kept, d_model)`, given all tokens, `(batch, tokens, d_model)`."""
        if self._averages:
            return x_btd[:, len(self.hookpoint.special) :].float().mean(1, keepdim=True)
        return x_btd[:, self._positions]

    def put(
        self, x_btd: Float[Tensor, "batch tokens d_model"], kept_bkd: Float[Tensor, "batch kept d_model"]
    ) -> Float[Tensor, "batch tokens d_model"]:
        """Replace the kept tokens, so that `pick` returns the new ones.

        Args:
            x_btd: All tokens, `(batch, tokens, d_model)`.
            kept_bkd: New values of the kept tokens, `(batch, kept, d_model)`.

        Returns:
            A copy of `x_btd` with the kept tokens replaced, `(batch, tokens, d_model)`.

        Raises:
            ModelError: The policy keeps the mean of the patches, which is not a token.
        """
        if self._averages:
            raise ModelError(f"extract.tokens: pooled is the mean of the patches at {self.name}, not a token that can be replaced")
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
        # The positions are usually consecutive, and a slice copies nothing.
        return slice(kept[0], kept[-1] + 1) if kept[-1] - kept[0] + 1 == len(kept) else torch.tensor(kept)


def _all_places(hookpoint: Hookpoint) -> list[Place]:
    special = [Place(i, kind, -1, -1) for i, kind in enumerate(hookpoint.special)]
    rows, cols = hookpoint.grid or (0, 0)
    patches = [Place(len(special) + r * cols + c, "patch", r, c) for r in range(rows) for c in range(cols)]
    return special + patches


def draw_kept(
    tokens_btd: Float[Tensor, "images tokens d_model"], sample: int | None, max_norm: float | None, rng: np.random.Generator
) -> Bool[np.ndarray, "images tokens"]:
    """Decide which tokens of training images are written.

    Args:
        tokens_btd: Tokens kept by the policy, `(images, tokens, d_model)`.
        sample: Largest number of tokens per image, which are drawn without replacement; None means all.
        max_norm: Largest norm of a token, as a multiple of the median norm in its image; None means no limit. Tokens of abnormal norm hold
            global instead of local information (arXiv 2309.16588).
        rng: Generator of the draw.

    Returns:
        Whether each token is written, `(images, tokens)` bool.
    """
    keep = np.ones(tokens_btd.shape[:2], dtype=bool)
    if max_norm is not None:
        norms = tokens_btd.float().norm(dim=2).numpy()
        # NaN and infinity are kept, for the gate to find.
        limit = max_norm * np.nan_to_num(np.median(norms, axis=1, keepdims=True), nan=np.inf)
        keep &= ~(norms > limit) | ~np.isfinite(norms)
    if sample is not None:
        draw = np.where(keep, rng.random(keep.shape), 2.0)
        keep &= draw.argsort(axis=1).argsort(axis=1) < sample
    return keep
