"""Fidelity of reconstructions: how closely x̂ reproduces x."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ommatid.compute.checkpoint import Accumulator
from ommatid.compute.nonzero import count_positive


class Fidelity(Accumulator):
    """Accumulates the FVU, the mean cosine and the L0 of reconstructions.

    FVU = Σ‖x−x̂‖² / Σ‖x−x̄‖², where x̄ is the mean over all tokens added. 0 is perfect.
    """

    STATE = ("n", "squared_error", "squared_norm", "sum_x", "sum_cosine", "n_firings")

    def __init__(self) -> None:
        self.n = 0
        self.squared_error = 0.0
        self.squared_norm = 0.0
        self.sum_x: Tensor | None = None
        self.sum_cosine = 0.0
        self.n_firings = 0

    def add(self, x_bd: Float[Tensor, "batch d_model"], x_hat_bd: Float[Tensor, "batch d_model"], n_firings: int) -> None:
        """Add a batch: x and x̂, `(batch, d_model)` each, and the number of (token, latent) pairs that fired."""
        # Sums within a row use the dtype of the data, and sums over rows float64. Converting all of the data would take twice as long.
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
        """Add the tokens of another accumulator."""
        if other.sum_x is None:
            return
        self.n += other.n
        self.squared_error += other.squared_error
        self.squared_norm += other.squared_norm
        self.sum_x = other.sum_x if self.sum_x is None else self.sum_x + other.sum_x
        self.sum_cosine += other.sum_cosine
        self.n_firings += other.n_firings

    def merged(self, all_reduce: Callable[[Tensor], Tensor]) -> "Fidelity":
        """Return the fidelity over all processes, given a function that sums a tensor over them."""
        total = Fidelity()
        total.load_state_dict({name: all_reduce(tensor.clone()) for name, tensor in self.state_dict().items()})
        return total

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; NaN if x does not vary."""
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
        """Mean number of latents that fire per token."""
        return self.n_firings / self.n if self.n else math.nan


class FidelityByKind(Accumulator):
    """Fidelity of each kind of token (cls, patch, ...), and of all tokens."""

    STATE = ("of",)

    def __init__(self, kinds: Sequence[str]) -> None:
        """Make empty accumulators for images whose tokens have these kinds, in order."""
        self.of = {kind: Fidelity() for kind in kinds}
        """Fidelity of the tokens of each kind."""
        self._places = {kind: torch.tensor([i for i, kind_ in enumerate(kinds) if kind_ == kind]) for kind in self.of}

    def add(
        self,
        x_btd: Float[Tensor, "images tokens d_model"],
        x_hat_btd: Float[Tensor, "images tokens d_model"],
        acts_bts: Float[Tensor, "images tokens d_sae"],
    ) -> None:
        """Add images: x and x̂, `(images, tokens, d_model)` each, and the latents' activations `(images, tokens, d_sae)`."""
        for kind, fidelity in self.of.items():
            of_kind = (tokens if len(self.of) == 1 else tokens[:, self._places[kind]] for tokens in (x_btd, x_hat_btd, acts_bts))
            x, x_hat, acts = (tokens.flatten(0, 1) for tokens in of_kind)
            fidelity.add(x, x_hat, int(count_positive(acts).sum()))

    @property
    def whole(self) -> Fidelity:
        """Fidelity of all tokens together."""
        whole = Fidelity()
        for fidelity in self.of.values():
            whole.merge(fidelity)
        return whole


def _squares(x_bd: Float[Tensor, "batch d_model"]) -> Float[Tensor, " batch"]:
    """Return the squared norms of rows, `(batch,)` float64."""
    return torch.linalg.vector_norm(x_bd, dim=1).double().square()
