"""The MonoSemanticity score and its confidence interval."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ommatid.compute.checkpoint import Accumulator
from ommatid.metrics.sparse import Entries
from ommatid.metrics.vectors import nan_mean, row_norms, unit

WIDTH = 384
"""Number of columns per part of Σap. A sparse product adds to a part in place, and a part of this width stays in the cache."""


@dataclass(frozen=True)
class MonosemanticityScores:
    """Monosemanticity scores of latents, and the score that chance would give."""

    ms: Float64[Tensor, " d_sae"]
    """MS of each latent, `(d_sae,)` float64; NaN where it is undefined."""
    floor: float
    """Score of uniform weights, which is the judge's mean pairwise cosine on the same images."""


class Monosemanticity(Accumulator):
    """Accumulates the exact MonoSemanticity score (Pach et al. 2025, arXiv 2504.02821, eq. 9) in one pass.

    With ã = (a−min)/(max−min) over the images and p the judge's unit embeddings,
    MS = Σ_{n<m} ã_n ã_m p_n·p_m / Σ_{n<m} ã_n ã_m = (‖w‖²−v)/(u²−v), where u = Σã, v = Σã², w = Σãp.
    Since min and max are known only at the end, Σa, Σa², Σap, Σp, N, min and max are accumulated, and u, v and w are derived from them.

    All sums are float64. Σap dominates the cost; it is a sparse product if few latents fire, and a dense one otherwise.
    """

    STATE = ("n", "sum", "sum_squares", "sum_ap", "sum_p", "min", "max", "n_firing")

    def __init__(self, d_sae: int, d_judge: int) -> None:
        self.n = 0
        self.sum = torch.zeros(d_sae, dtype=torch.float64)
        self.sum_squares = torch.zeros(d_sae, dtype=torch.float64)
        widths = [min(WIDTH, d_judge - start) for start in range(0, d_judge, WIDTH)]
        self.sum_ap = [torch.zeros(d_sae, width, dtype=torch.float64) for width in widths]
        """Σap, in parts of `(d_sae, at most WIDTH)`."""
        self.sum_p = torch.zeros(d_judge, dtype=torch.float64)
        self.min = torch.full((d_sae,), math.inf, dtype=torch.float64)
        self.max = torch.full((d_sae,), -math.inf, dtype=torch.float64)
        self.n_firing = torch.zeros(d_sae, dtype=torch.int64)

    def add(self, acts_bs: Float[Tensor, "images d_sae"], judge_bd: Float[Tensor, "images d_judge"]) -> None:
        """Add a batch of images.

        Args:
            acts_bs: Image-level activations, `(images, d_sae)`, dense or in CSR form without duplicate entries, finite.
            judge_bd: The judge's embeddings of the same images, `(images, d_judge)`, finite and not zero.
        """
        if not len(judge_bd):
            return
        self.n += len(judge_bd)
        entries = Entries.of(acts_bs)
        a = self._add_all(acts_bs.to_dense()) if entries is None else self._add_entries(entries)
        lengths = row_norms(judge_bd)
        for sum_ap, sum_p, e in zip(self.sum_ap, self.sum_p.split(WIDTH), judge_bd.split(WIDTH, dim=1), strict=True):
            p = e / lengths
            sum_p += p.sum(0)
            sum_ap.addmm_(a, p)

    def _add_all(self, acts_bs: Float[Tensor, "images d_sae"]) -> Float64[Tensor, "d_sae images"]:
        """Update everything that does not need the judge. Return the activations by latent, `(d_sae, images)` float64."""
        self.min = torch.minimum(self.min, acts_bs.amin(0).double())
        self.max = torch.maximum(self.max, acts_bs.amax(0).double())
        self.n_firing += (acts_bs != 0).sum(0)
        a = acts_bs.double()
        self.sum += a.sum(0)
        self.sum_squares += a.square().sum(0)
        return a.T

    def _add_entries(self, entries: Entries) -> Float64[Tensor, "d_sae images"]:
        """Do the same as `_add_all` for sparse activations. The result is in CSR form."""
        low, high = entries.extremes()
        self.min, self.max = torch.minimum(self.min, low), torch.maximum(self.max, high)
        self.n_firing += entries.n_firing
        self.sum += entries.sums(entries.acts)
        self.sum_squares += entries.sums(entries.acts.square())
        return entries.transposed()

    def merge(self, other: "Monosemanticity") -> None:
        """Add the images of another accumulator."""
        self.n += other.n
        for name in ("sum", "sum_squares", "sum_p", "n_firing"):
            getattr(self, name).add_(getattr(other, name))
        for mine, theirs in zip(self.sum_ap, other.sum_ap, strict=True):
            mine += theirs
        self.min = torch.minimum(self.min, other.min)
        self.max = torch.maximum(self.max, other.max)

    def scores(self) -> MonosemanticityScores:
        """Return the scores over all images added."""
        u, v = self.scaled_sums()
        squares = (
            sum((torch.linalg.vector_norm(w, dim=1).square() for w in self._iter_w()), torch.zeros(())) / (self.max - self.min).square()
        )
        ms = torch.where(self.is_defined(), (squares - v) / (u.square() - v), math.nan)
        n = self.n
        floor = (float(self.sum_p.square().sum()) - n) / (n * (n - 1)) if n > 1 else math.nan
        return MonosemanticityScores(ms, floor)

    def is_defined(self) -> Bool[Tensor, " d_sae"]:
        """Return whether the score of each latent is defined, `(d_sae,)`: the latent varies, and fires on at least two images."""
        u, v = self.scaled_sums()
        return (self.max > self.min) & (self.n_firing >= 2) & (u.square() - v > 1e-12)

    def scaled_sums(self) -> tuple[Float64[Tensor, " d_sae"], Float64[Tensor, " d_sae"]]:
        """Return u = Σã and v = Σã², `(d_sae,)` each."""
        low, span = self.min, self.max - self.min
        u = (self.sum - self.n * low) / span
        v = (self.sum_squares - 2 * low * self.sum + self.n * low.square()) / span.square()
        return u, v

    def scaled_w(self) -> Float64[Tensor, "d_sae d_judge"]:
        """Return w = Σãp, `(d_sae, d_judge)`."""
        return torch.cat(list(self._iter_w()), dim=1).div_((self.max - self.min)[:, None])

    def _iter_w(self) -> Iterator[Tensor]:
        """Yield Σ (a−min) p, in parts of `(d_sae, at most WIDTH)`."""
        is_shifted = bool((self.min != 0).any())
        for sum_ap, sum_p in zip(self.sum_ap, self.sum_p.split(WIDTH), strict=True):
            yield torch.addr(sum_ap, self.min, sum_p, alpha=-1) if is_shifted else sum_ap


class MonosemanticityInterval(Accumulator):
    """Accumulates confidence intervals of MS by the infinitesimal jackknife, in a second pass over the same images.

    The influence of image n on a latent's MS is the derivative of MS with respect to the weight of the image,
    g_n = 2 ã_n [(p_n·w − ã_n) − MS (u − ã_n)] / (u² − v). Σ g_n² is, to first order, the variance of a Poisson bootstrap over images
    (Efron 1982, ch. 6), but needs no replicates, each of which would take a copy of w. The accumulator of the first pass may be freed: the
    values needed from it are copied.
    """

    STATE = ("defined", "u", "w", "denominator", "ms", "floor", "low", "span", "variance", "variance_of_mean")

    def __init__(self, first_pass: Monosemanticity) -> None:
        self.defined = first_pass.is_defined()
        self.u, v = first_pass.scaled_sums()
        self.w = first_pass.scaled_w()
        self.denominator = self.u.square() - v
        scores = first_pass.scores()
        self.ms, self.floor = scores.ms, scores.floor
        self.low, self.span = first_pass.min, first_pass.max - first_pass.min
        self.variance = torch.zeros_like(self.ms)
        self.variance_of_mean = 0.0

    def add(self, acts_bs: Float[Tensor, "images d_sae"], judge_bd: Float[Tensor, "images d_judge"]) -> None:
        """Add a batch. The batches must be those of the first pass, in any order."""
        a = (acts_bs.double() - self.low) / self.span
        alignment = unit(judge_bd) @ self.w.T
        influence = 2 * a * ((alignment - a) - self.ms * (self.u - a)) / self.denominator
        influence = influence[:, self.defined]
        self.variance[self.defined] += influence.square().sum(0)
        if influence.shape[1]:
            self.variance_of_mean += float(influence.mean(1).square().sum())

    def of_latents(self) -> tuple[Float64[Tensor, " d_sae"], Float64[Tensor, " d_sae"]]:
        """Return the lower and upper ends of each latent's 95 % interval, `(d_sae,)` each; NaN where MS is undefined."""
        half = 1.959964 * self.variance.sqrt()
        return self.ms - half, self.ms + half

    def of_mean(self) -> tuple[float, float]:
        """Return the lower and upper ends of the 95 % interval of the mean MS, over latents for which MS is defined."""
        mean, half = nan_mean(self.ms), 1.959964 * math.sqrt(self.variance_of_mean)
        return mean - half, mean + half
