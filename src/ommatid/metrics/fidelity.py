"""How well x̂ stands for x."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ommatid.compute.checkpoint import Accumulator
from ommatid.compute.nonzero import count_positive


class Fidelity(Accumulator):
    """How well x̂ stands for x: FVU, cosine and L0 over everything added.

    FVU = Σ‖x−x̂‖² / Σ‖x−x̄‖², x̄ the mean over everything added. 0 is perfect.
    """

    STATE = ("n", "squared_error", "squared_norm", "sum_x", "sum_cosine", "n_firings")

    def __init__(self) -> None:
        self.n = 0
        self.squared_error = 0.0
        self.squared_norm = 0.0
        self.sum_x: Tensor | None = None
        self.sum_cosine = 0.0
        self.n_firings = 0

    def add(self, x_bd: Tensor, x_hat_bd: Tensor, n_firings: int) -> None:
        """Add a batch: x and x̂ of shape (batch, d_model), and how many (token, latent) pairs fired."""
        # a row's sums in the arithmetic of the data, everything over rows in float64: half the time of converting all of it
        error, norms, norms_hat = x_bd - x_hat_bd, _squares(x_bd), _squares(x_hat_bd)
        total = x_bd.sum(0).double()
        self.n += x_bd.shape[0]
        self.squared_error += float(_squares(error).sum())
        self.squared_norm += float(norms.sum())
        self.sum_x = total if self.sum_x is None else self.sum_x + total
        cosines = torch.linalg.vecdot(x_bd, x_hat_bd).double() / (norms * norms_hat).sqrt().clamp_min(1e-300)
        self.sum_cosine += float(cosines.sum())
        self.n_firings += n_firings

    def merge(self, other: "Fidelity") -> None:
        """Take in what another accumulator has seen."""
        if other.sum_x is None:
            return
        self.n += other.n
        self.squared_error += other.squared_error
        self.squared_norm += other.squared_norm
        self.sum_x = other.sum_x if self.sum_x is None else self.sum_x + other.sum_x
        self.sum_cosine += other.sum_cosine
        self.n_firings += other.n_firings

    def merged(self, sum_: Callable[[Tensor], Tensor]) -> "Fidelity":
        """With those of other processes; `sum_` adds a tensor over all."""
        found = Fidelity()
        found.load_state_dict({name: sum_(tensor.clone()) for name, tensor in self.state_dict().items()})
        return found

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; NaN where x does not vary."""
        if self.sum_x is None:
            return math.nan
        variance = self.squared_norm - float(self.sum_x.square().sum()) / self.n
        return self.squared_error / variance if variance > 0 else math.nan

    @property
    def cosine(self) -> float:
        """Mean cos(x, x̂)."""
        return self.sum_cosine / self.n if self.n else math.nan

    @property
    def l0(self) -> float:
        """Mean number of latents that fire a token."""
        return self.n_firings / self.n if self.n else math.nan


class FidelityByKind(Accumulator):
    """Fidelity of each kind of token (cls, patch, ...), and of all of them."""

    STATE = ("of",)

    def __init__(self, kinds: Sequence[str]) -> None:
        """`kinds` names the kind of each token of an image, in order."""
        self.of = {kind: Fidelity() for kind in kinds}
        self._places = {kind: torch.tensor([i for i, own in enumerate(kinds) if own == kind]) for kind in self.of}

    def add(self, x_btd: Tensor, x_hat_btd: Tensor, acts_bts: Tensor) -> None:
        """Add images: x and x̂ (images, tokens, d_model) and the latents' activations (images, tokens, d_sae)."""
        for kind, fidelity in self.of.items():
            mine = (tokens if len(self.of) == 1 else tokens[:, self._places[kind]] for tokens in (x_btd, x_hat_btd, acts_bts))
            x, x_hat, acts = (tokens.flatten(0, 1) for tokens in mine)
            fidelity.add(x, x_hat, int(count_positive(acts).sum()))

    @property
    def whole(self) -> Fidelity:
        """Of all tokens together."""
        found = Fidelity()
        for fidelity in self.of.values():
            found.merge(fidelity)
        return found


def _squares(x_bd: Tensor) -> Tensor:
    """Squared lengths of rows, (batch,) float64."""
    return torch.linalg.vector_norm(x_bd, dim=1).double().square()
