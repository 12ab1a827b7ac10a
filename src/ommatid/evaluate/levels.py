"""The `levels` table: what each level of a Matryoshka dictionary does."""

import pyarrow as pa
import torch
from torch import Tensor

from ommatid import schemas
from ommatid.evaluate.nulls import none_for_nan
from ommatid.metrics import Fidelity, nan_mean
from ommatid.sae.model import SAE


class Levels:
    """Fidelity of every level but the last, which is the whole dictionary; of an SAE without levels that is none."""

    def __init__(self, sae: SAE) -> None:
        bounds = [bound for bound in sae.config.prefixes or () if bound < sae.n_latents]
        self.inner = [Fidelity() for _ in bounds]
        self.bounds = (*bounds, sae.n_latents)
        """So many first latents are each level's."""
        self._sae = sae

    def add(self, target_bd: Tensor, acts_bs: Tensor) -> None:
        """Add tokens: what is to be decoded (tokens, d_out), and activations (tokens, d_sae)."""
        x_hat, start = self._sae.b_dec.expand(len(acts_bs), -1), 0
        for bound, fidelity in zip(self.bounds, self.inner, strict=False):
            x_hat = torch.addmm(x_hat, acts_bs[:, start:bound], self._sae.W_dec[start:bound])
            fidelity.add(target_bd, x_hat, int((acts_bs[:, :bound] > 0).sum()))
            start = bound

    def table(self, name: str, whole: Fidelity, ms: Tensor, lca_depth: Tensor) -> pa.Table:
        """The `levels` table.

        Args:
            name: Of the SAE.
            whole: Fidelity of the last level.
            ms: Of each latent, NaN where it is undefined, (d_sae,).
            lca_depth: The same.
        """
        firsts = (0, *self.bounds)
        rows = []
        for i, (bound, fidelity) in enumerate(zip(self.bounds, (*self.inner, whole), strict=True)):
            mine, depths = ms[firsts[i] : bound], lca_depth[firsts[i] : bound]
            values = {"fvu": fidelity.fvu, "ms": nan_mean(mine), "lca_depth": nan_mean(depths)}
            counts = {"n_ms": int((~mine.isnan()).sum()), "n_lca": int((~depths.isnan()).sum())}
            rows.append({"sae": name, "level": i + 1, "first": firsts[i], "last": bound - 1, **none_for_nan(values), **counts})
        return pa.Table.from_pylist(rows, schema=schemas.LEVELS)
