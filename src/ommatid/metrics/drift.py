"""Tests of whether new images come from the distribution of earlier ones. The unit is the image: tokens of an image are not independent.

Suffixes of names: n images of both samples together, the new ones first, or of one sample; d width of embeddings; p permutations, the
first of which is the identity; s latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from ommatid.metrics.interventions import REPLICATES
from ommatid.metrics.probe import fit_probes

WIDTH = 64
"""Number of principal components of the embeddings on which the domain classifier is fitted."""
MEDIAN_IMAGES = 1024
"""Largest number of images from whose distances the bandwidth of the kernel is taken."""
ROWS = 1024
"""Number of rows of the kernel that are computed at once."""
LEAST_FIRING = 8
"""Number of images below which a latent is not tested: of both samples together for its firing rate, and of each for its activation."""
POWER = 0.8
"""Probability with which the smallest shift that `least_found` returns would have been found."""


@dataclass(frozen=True)
class PermutationTest:
    """A statistic, and how it is distributed if images are new or not at random."""

    value: float
    """The statistic."""
    chance: float
    """95th percentile of the statistic over the permutations: what it reaches by chance."""
    mean: float
    """Mean over the permutations."""
    spread: float
    """Standard deviation over the permutations."""
    p: float
    """Share of all permutations, the identity among them, that have at least this value. Under no drift it is valid exactly."""

    @classmethod
    def of(cls, values_p: Float64[Tensor, " permutations"]) -> "PermutationTest":
        """Make the result from the statistic of every permutation, the identity first."""
        value = values_p[0]
        # Rounding must not hide a tie with the identity.
        n_as_large = int((values_p >= value - 1e-12 * value.abs()).sum())
        others = values_p[1:]
        return cls(float(value), float(others.quantile(0.95)), float(others.mean()), float(others.std()), n_as_large / len(values_p))


def n_permutations(alpha: float) -> int:
    """Return the number of permutations, the identity among them, that resolve p values well below a level `alpha`: 20 / alpha."""
    return round(20 / alpha)


def permute(is_new_n: Bool[Tensor, " images"], n: int, seed: int) -> Bool[Tensor, "images permutations"]:
    """Draw which images count as new in each of `n` permutations, of which the first is the identity, `(images, n)` bool."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [is_new_n[torch.randperm(len(is_new_n), generator=generator)] for _ in range(n - 1)]
    return torch.stack([is_new_n, *drawn], dim=1)


def mmd(
    new_nd: Float[Tensor, "new width"], before_nd: Float[Tensor, "before width"], n: int, seed: int = 0
) -> tuple[PermutationTest, float]:
    """Test by the unbiased squared maximum mean discrepancy, with the kernel exp(−‖x − y‖² / 2σ²), whether two samples differ.

    Source: Gretton et al. 2012, equation 3. σ is the median distance between the images of both samples, on up to `MEDIAN_IMAGES` of them.

    Args:
        new_nd: Embeddings of the new images, `(new, width)`, at least 2.
        before_nd: Embeddings of the earlier images, `(before, width)`, at least 2.
        n: Number of permutations.
        seed: Seed of the permutations.

    Returns:
        The test, and σ.
    """
    x_nd = torch.cat([new_nd, before_nd]).float()
    every = max(1, -(-len(x_nd) // MEDIAN_IMAGES))
    sigma = float(torch.nn.functional.pdist(x_nd[::every].double()).median().clamp_min(1e-12))
    n_new, n_before = len(new_nd), len(before_nd)
    is_new_np = permute(torch.arange(n_new + n_before) < n_new, n, seed).float()
    kernel_nn = _kernel(x_nd, sigma)
    # The statistic does not change if the same number is subtracted from all entries, and near 0 float32 rounds less.
    kernel_nn -= kernel_nn.sum(dtype=torch.float64) / (len(x_nd) * (len(x_nd) - 1))
    kernel_nn.fill_diagonal_(0)
    rows_n = kernel_nn.sum(1, dtype=torch.float64)
    within_new = (is_new_np * (kernel_nn @ is_new_np)).sum(0, dtype=torch.float64)
    between = rows_n @ is_new_np.double() - within_new
    within_before = rows_n.sum() - within_new - 2 * between
    values_p = within_new / (n_new * (n_new - 1)) + within_before / (n_before * (n_before - 1)) - 2 * between / (n_new * n_before)
    return PermutationTest.of(values_p), sigma


def _kernel(x_nd: Float[Tensor, "images width"], sigma: float) -> Float[Tensor, "images images"]:
    """Return the kernel of all pairs, with 0 on the diagonal."""
    x_nd = x_nd - x_nd.mean(0)
    squares_n = x_nd.square().sum(1)
    kernel_nn = torch.empty(len(x_nd), len(x_nd))
    for start in range(0, len(x_nd), ROWS):
        rows = torch.addmm(squares_n + squares_n[start : start + ROWS, None], x_nd[start : start + ROWS], x_nd.T, alpha=-2)
        torch.exp(rows.clamp_min_(0).div_(-2 * sigma**2), out=kernel_nn[start : start + ROWS])
    return kernel_nn.fill_diagonal_(0)


def domain_auroc(new_nd: Float[Tensor, "new width"], before_nd: Float[Tensor, "before width"], n: int, seed: int = 0) -> PermutationTest:
    """Test whether a classifier tells new images from earlier ones: the AUROC of a cross-fitted logistic regression.

    Images are divided into two halves with equal shares of new ones. A regression is fitted to the first `WIDTH` principal components of
    the embeddings of each half and scored on the other. The statistic is the mean of both areas: 0.5 by chance, and 1 if both kinds of
    image can be told apart. In a permutation both regressions are fitted anew to images that are new at random within each half.

    Args:
        new_nd: Embeddings of the new images, `(new, width)`, at least 4.
        before_nd: Embeddings of the earlier images, `(before, width)`, at least 4.
        n: Number of permutations.
        seed: Seed of the halves and of the permutations.

    Returns:
        The test.
    """
    x_nd = torch.cat([new_nd, before_nd]).double()
    x_nd = _components(x_nd - x_nd.mean(0))
    generator = torch.Generator().manual_seed(seed)
    half_n = torch.cat([torch.randperm(len(sample), generator=generator) % 2 for sample in (new_nd, before_nd)])
    is_new_n = torch.arange(len(x_nd)) < len(new_nd)
    x, is_new = [x_nd[half_n == half] for half in (0, 1)], [permute(is_new_n[half_n == half], n, seed + 1 + half) for half in (0, 1)]
    areas = [aurocs(fit_probes(x[half], is_new[half]).scores(x[1 - half]), is_new[1 - half]) for half in (0, 1)]
    return PermutationTest.of((areas[0] + areas[1]) / 2)


def _components(x_nd: Float64[Tensor, "images width"]) -> Float64[Tensor, "images components"]:
    """Return the first principal components of centred rows, which do not depend on which of them are new."""
    _, vectors = torch.linalg.eigh(x_nd.T @ x_nd)
    return x_nd @ vectors[:, -WIDTH:]


def aurocs(scores_np: Float[Tensor, "images columns"], is_positive_np: Bool[Tensor, "images columns"]) -> Float64[Tensor, " columns"]:
    """Return the area under the ROC curve of each column, `(columns,)` float64, where ties count half."""
    sorted_pn = scores_np.T.contiguous().sort(dim=1).values
    places = [torch.searchsorted(sorted_pn, scores_np.T.contiguous(), right=right) for right in (False, True)]
    ranks_np = ((places[0] + places[1] + 1).double() / 2).T  # from 1; equal scores share their mean rank
    n_positive = is_positive_np.sum(0).double()
    n_negative = len(scores_np) - n_positive
    return ((ranks_np * is_positive_np).sum(0) - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


@dataclass(frozen=True)
class RatioShift:
    """The difference of a ratio of sums between new images and earlier ones, such as FVU."""

    new: float
    """The ratio over the new images."""
    before: float
    """The ratio over the earlier images."""
    low: float
    """Lower end of the 95 % interval of new − before, a percentile bootstrap over images (Efron 1979)."""
    high: float
    """Upper end of the same interval."""
    test: PermutationTest
    """Test of |new − before|."""


def ratio_shift(new_n2: Float[Tensor, "new 2"], before_n2: Float[Tensor, "before 2"], n: int, seed: int = 0) -> RatioShift:
    """Compare Σ numerator / Σ denominator between two samples.

    Args:
        new_n2: Numerator and denominator of each new image, `(new, 2)`.
        before_n2: Those of each earlier image, `(before, 2)`.
        n: Number of permutations.
        seed: Seed of the permutations and of the resamples.

    Returns:
        Both ratios, the interval of their difference, and the test.
    """
    both_n2, n_new = torch.cat([new_n2, before_n2]).double(), len(new_n2)
    is_new_np = permute(torch.arange(len(both_n2)) < n_new, n, seed).double()
    of_new = is_new_np.T @ both_n2
    of_before = both_n2.sum(0) - of_new
    differences = of_new[:, 0] / of_new[:, 1] - of_before[:, 0] / of_before[:, 1]
    generator = torch.Generator().manual_seed(seed)
    resampled = [_resample(sample.double(), generator) for sample in (new_n2, before_n2)]
    low, high = (resampled[0] - resampled[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    ratios = [float(sample.double().sum(0)[0] / sample.double().sum(0)[1]) for sample in (new_n2, before_n2)]
    return RatioShift(ratios[0], ratios[1], low, high, PermutationTest.of(differences.abs()))


def _resample(sample_n2: Float64[Tensor, "images 2"], generator: torch.Generator) -> Float64[Tensor, " replicates"]:
    """Return the ratio in each of `REPLICATES` resamples of the images."""
    ratios = []
    for _ in range(REPLICATES):
        sums = sample_n2[torch.randint(len(sample_n2), (len(sample_n2),), generator=generator)].sum(0)
        ratios.append(sums[0] / sums[1])
    return torch.stack(ratios)


def rate_shift(
    firing_new_s: Int[Tensor, " latents"], n_new: int, firing_before_s: Int[Tensor, " latents"], n_before: int
) -> Float64[Tensor, " latents"]:
    """Test whether each latent fires on another share of new images than of earlier ones, by Fisher's exact test.

    Args:
        firing_new_s: Number of new images on which each latent fires, `(latents,)`.
        n_new: Number of new images.
        firing_before_s: Number of earlier images on which it fires, `(latents,)`.
        n_before: Number of earlier images.

    Returns:
        Two-sided p values, twice the smaller tail, `(latents,)`; NaN for latents that fire on fewer than `LEAST_FIRING` of all images. As
        the test conditions on that number, leaving them out is allowed (Tarone 1990).
    """
    from scipy.stats import hypergeom

    new, before = firing_new_s.numpy(), firing_before_s.numpy()
    distribution = hypergeom(n_new + n_before, new + before, n_new)
    p = np.minimum(1.0, 2 * np.minimum(distribution.cdf(new), distribution.sf(new - 1)))
    return torch.from_numpy(np.where(new + before < LEAST_FIRING, np.nan, p))


def activation_shift(
    latents_n: Int64[Tensor, " firings"], acts_n: Float[Tensor, " firings"], is_new_n: Bool[Tensor, " firings"], n_latents: int
) -> Float64[Tensor, " latents"]:
    """Test whether each latent fires more or less strongly on new images than on earlier ones, among those on which it fires.

    It is the rank-sum test (Mann and Whitney 1947) with the normal approximation, corrected for ties and continuity. Ranks are used, and
    not means, as activations are skewed: the tails of a t test would be wrong where a correction for thousands of latents needs them.

    Args:
        latents_n: Latent of each firing, `(firings,)`; a firing is an image and a latent that fires on it.
        acts_n: Its image-level activation, `(firings,)`.
        is_new_n: Whether its image is new, `(firings,)`.
        n_latents: Number of latents.

    Returns:
        Two-sided p values, `(latents,)`; NaN for latents that fire on fewer than `LEAST_FIRING` new or `LEAST_FIRING` earlier images.
    """
    from scipy.special import ndtr

    latents, acts, is_new = latents_n.numpy(), acts_n.double().numpy(), is_new_n.numpy()
    order = np.lexsort((acts, latents))
    latents, acts, is_new = latents[order], acts[order], is_new[order]
    counts = np.bincount(latents, minlength=n_latents)
    begins = np.ones(len(acts), bool)
    begins[1:] = (latents[1:] != latents[:-1]) | (acts[1:] != acts[:-1])
    group = begins.cumsum() - 1
    firsts, sizes = np.flatnonzero(begins), np.bincount(group).astype(float)
    ranks = (firsts + (sizes + 1) / 2)[group] - (counts.cumsum() - counts)[latents] if len(acts) else acts
    n_new = np.bincount(latents, is_new, n_latents)
    n_before, n_all = counts - n_new, counts.astype(float)
    sums = np.bincount(latents, ranks * is_new, n_latents)
    ties = np.bincount(latents[firsts], sizes**3 - sizes, n_latents) if len(acts) else np.zeros(n_latents)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = n_new * n_before / 12 * (n_all + 1 - ties / (n_all * (n_all - 1)))
        z = (np.abs(sums - n_new * (n_all + 1) / 2) - 0.5).clip(0) / np.sqrt(variance)
    p = np.where(variance > 0, 2 * ndtr(-z), 1.0)
    return torch.from_numpy(np.where((n_new < LEAST_FIRING) | (n_before < LEAST_FIRING), np.nan, p))


def holm(p_n: Float64[Tensor, " tests"]) -> Float64[Tensor, " tests"]:
    """Adjust p values for their number by Holm's method (1979), `(tests,)`; NaN, which is not counted, stays NaN.

    The probability that any of the adjusted values of true null hypotheses is at most α is at most α, however the tests depend on one
    another. Latents fire together, so Benjamini and Hochberg's method, which assumes positive dependence, is not used.
    """
    known = ~p_n.isnan()
    p, order = p_n[known].sort()
    adjusted = (p * torch.arange(len(p), 0, -1, dtype=p.dtype)).clamp_max(1.0)
    adjusted = adjusted.cummax(0).values if len(p) else adjusted
    result = p_n.clone()
    result[known] = torch.empty_like(p).scatter_(0, order, adjusted)
    return result


def least_found(spread: float, alpha: float, two_sided: bool = False) -> float:
    """Return the smallest shift of a statistic that a test at level `alpha` finds with the probability `POWER`: (z₁₋α + z₀.₈) spread."""
    quantile: Callable[[float], float] = NormalDist().inv_cdf
    return (quantile(1 - (alpha / 2 if two_sided else alpha)) + quantile(POWER)) * spread
