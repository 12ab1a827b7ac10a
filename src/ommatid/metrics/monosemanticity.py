"""MonoSemanticity score and its interval."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ommatid.metrics.vectors import nan_mean, unit


@dataclass(frozen=True)
class MonosemanticityScores:
    """What `Monosemanticity.scores` gives."""

    ms: Tensor
    """MS of each latent, (d_sae,) float64; NaN where it is undefined."""
    floor: float
    """Score of uniform weights: the mean pairwise cosine of the judge on the same images."""


class Monosemanticity:
    """MonoSemanticity score (Pach et al. 2025, arXiv 2504.02821, eq. 9), exact and in one pass.

    With ã = (a−min)/(max−min) over the images and p the judge's unit embeddings,
    MS = Σ_{n<m} ã_n ã_m p_n·p_m / Σ_{n<m} ã_n ã_m = (‖w‖²−v)/(u²−v), where u = Σã, v = Σã², w = Σãp.
    min and max are known only at the end, so Σa, Σa², Σap, Σp, N, min and max are carried and expanded then.
    """

    def __init__(self, d_sae: int, d_judge: int) -> None:
        self.n = 0
        self.sum = torch.zeros(d_sae, dtype=torch.float64)
        self.sum_squares = torch.zeros(d_sae, dtype=torch.float64)
        self.sum_ap = torch.zeros(d_sae, d_judge, dtype=torch.float64)
        self.sum_p = torch.zeros(d_judge, dtype=torch.float64)
        self.min = torch.full((d_sae,), math.inf, dtype=torch.float64)
        self.max = torch.full((d_sae,), -math.inf, dtype=torch.float64)
        self.n_firing = torch.zeros(d_sae, dtype=torch.int64)

    def add(self, acts_bs: Tensor, judge_bd: Tensor) -> None:
        """Add image-level activations (images, d_sae) and the judge's embeddings of the same images (images, d_judge)."""
        a = acts_bs.double()
        p = unit(judge_bd)
        self.n += a.shape[0]
        self.sum += a.sum(0)
        self.sum_squares += a.square().sum(0)
        self.sum_ap += a.T @ p
        self.sum_p += p.sum(0)
        self.min = torch.minimum(self.min, a.amin(0))
        self.max = torch.maximum(self.max, a.amax(0))
        self.n_firing += (a != 0).sum(0)

    def merge(self, other: "Monosemanticity") -> None:
        """Take in what another accumulator has seen."""
        self.n += other.n
        for name in ("sum", "sum_squares", "sum_ap", "sum_p", "n_firing"):
            getattr(self, name).add_(getattr(other, name))
        self.min = torch.minimum(self.min, other.min)
        self.max = torch.maximum(self.max, other.max)

    def scores(self) -> MonosemanticityScores:
        """The scores of all that was added."""
        u, v, w = self.scaled_sums()
        ms = (w.square().sum(1) - v) / (u.square() - v)
        ms[~self.is_defined()] = math.nan
        n = self.n
        floor = (float(self.sum_p.square().sum()) - n) / (n * (n - 1)) if n > 1 else math.nan
        return MonosemanticityScores(ms, floor)

    def is_defined(self) -> Tensor:
        """Whether each latent varies and fires on at least two images, (d_sae,)."""
        u, v, _ = self.scaled_sums()
        return (self.max > self.min) & (self.n_firing >= 2) & (u.square() - v > 1e-12)

    def scaled_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (d_sae,), v (d_sae,) and w (d_sae, d_judge) of the scaled activations."""
        low, span = self.min, self.max - self.min
        u = (self.sum - self.n * low) / span
        v = (self.sum_squares - 2 * low * self.sum + self.n * low.square()) / span.square()
        w = (self.sum_ap - low[:, None] * self.sum_p) / span[:, None]
        return u, v, w


class MonosemanticityInterval:
    """Standard errors of MS over images by the infinitesimal jackknife, in a second pass over the same images.

    The influence of image n on a latent's MS is g_n = 2 ã_n [(p_n·w − ã_n) − MS (u − ã_n)] / (u² − v): the derivative by the
    image's weight. Σ g_n² is the variance that a Poisson bootstrap over images has to first order (Efron 1982, ch. 6), without
    replicates: those would need a copy of w for each.
    """

    def __init__(self, first_pass: Monosemanticity) -> None:
        self._pass = first_pass
        self._defined = first_pass.is_defined()
        self._u, v, self._w = first_pass.scaled_sums()
        self._denominator = self._u.square() - v
        self._ms = first_pass.scores().ms
        self._span = first_pass.max - first_pass.min
        self.variance = torch.zeros_like(self._ms)
        self.variance_of_mean = 0.0

    def add(self, acts_bs: Tensor, judge_bd: Tensor) -> None:
        """The same batches as in the first pass, in any order."""
        a = (acts_bs.double() - self._pass.min) / self._span
        alignment = unit(judge_bd) @ self._w.T
        influence = 2 * a * ((alignment - a) - self._ms * (self._u - a)) / self._denominator
        influence = influence[:, self._defined]
        self.variance[self._defined] += influence.square().sum(0)
        if influence.shape[1]:
            self.variance_of_mean += float(influence.mean(1).square().sum())

    def of_latents(self) -> tuple[Tensor, Tensor]:
        """Lower and upper end of each latent's 95 % interval, (d_sae,) each; NaN where MS is undefined."""
        half = 1.959964 * self.variance.sqrt()
        return self._ms - half, self._ms + half

    def of_mean(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval of the mean MS over the latents that have one."""
        mean, half = nan_mean(self._ms), 1.959964 * math.sqrt(self.variance_of_mean)
        return mean - half, mean + half
