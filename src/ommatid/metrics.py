"""Every metric once, from accumulators in float64 that can be merged over batches, shards and workers.

Suffixes: b tokens or images of a batch, d d_model or the judge's width, s latents.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class Fidelity:
    """How well x̂ stands for x: FVU, cosine and L0 over everything added.

    FVU = Σ‖x−x̂‖² / Σ‖x−x̄‖², x̄ the mean over everything added. 0 is perfect.
    """

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
        return Fidelity.of({name: sum_(tensor.clone()) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        scalars = [self.n, self.squared_error, self.squared_norm, self.sum_cosine, self.n_firings]
        sum_x = torch.zeros(0, dtype=torch.float64) if self.sum_x is None else self.sum_x
        return {"scalars": torch.tensor(scalars, dtype=torch.float64), "sum_x": sum_x}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Fidelity":
        """What `tensors` gave."""
        found = cls()
        n, found.squared_error, found.squared_norm, found.sum_cosine, n_firings = tensors["scalars"].tolist()
        found.n, found.n_firings = int(n), int(n_firings)
        found.sum_x = tensors["sum_x"] if len(tensors["sum_x"]) else None
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


def _squares(x_bd: Tensor) -> Tensor:
    """Squared lengths of rows, (batch,) float64."""
    return torch.linalg.vecdot(x_bd, x_bd).double()


class Firing:
    """Per latent: on how many tokens and images it fires, and how strongly."""

    def __init__(self, d_sae: int) -> None:
        self.n_tokens = 0
        self.count = torch.zeros(d_sae, dtype=torch.int64)
        self.n_images = torch.zeros(d_sae, dtype=torch.int64)
        self.sum = torch.zeros(d_sae, dtype=torch.float64)
        self.max = torch.zeros(d_sae, dtype=torch.float64)

    def add(self, acts_bs: Tensor, image_acts_bs: Tensor) -> None:
        """Add token activations (tokens, d_sae) and the same images' image-level activations (images, d_sae)."""
        self.n_tokens += acts_bs.shape[0]
        self.count += (acts_bs > 0).sum(0)
        self.n_images += (image_acts_bs > 0).sum(0)
        self.sum += acts_bs.sum(0, dtype=torch.float64)
        self.max = torch.maximum(self.max, acts_bs.amax(0).double())

    @property
    def density(self) -> Tensor:
        """Share of tokens on which each latent fires, (d_sae,)."""
        return self.count.double() / max(self.n_tokens, 1)

    @property
    def mean(self) -> Tensor:
        """Mean activation over the tokens on which a latent fires, (d_sae,); NaN if it never does."""
        return self.sum / self.count.double()

    @property
    def is_dead(self) -> Tensor:
        """Never fired, (d_sae,)."""
        return self.count == 0


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


class TopImages:
    """The images on which each latent is strongest, found in a stream; ties go to the earlier image."""

    def __init__(self, d_sae: int, n: int) -> None:
        self.acts = torch.full((n, d_sae), -math.inf)
        self.images = torch.full((n, d_sae), -1, dtype=torch.int64)

    def add(self, acts_bs: Tensor, images_b: Tensor) -> None:
        """Image-level activations (images, d_sae) and the images' numbers (images,)."""
        acts = torch.cat([self.acts, acts_bs.float()])
        images = torch.cat([self.images, images_b[:, None].expand(-1, acts_bs.shape[1])])
        order = torch.sort(acts, dim=0, descending=True, stable=True).indices[: self.acts.shape[0]]
        self.acts, self.images = acts.gather(0, order), images.gather(0, order)


def purity(labels: list[list[str]], n: int) -> list[float]:
    """Purity@n: share of the commonest class among a latent's n strongest images; NaN where it fires on fewer.

    `labels` has, for each latent, the classes of its strongest firing images, at most n of them.
    """
    return [max(map(of_one.count, of_one)) / n if len(of_one) == n else math.nan for of_one in labels]


def balanced_accuracy(positive: Tensor, negative: Tensor, threshold: float) -> float:
    """Mean of the share of `positive` scores above the threshold and the share of `negative` scores at or below it."""
    return float(((positive > threshold).double().mean() + (negative <= threshold).double().mean()) / 2)


def best_threshold(positive: Tensor, negative: Tensor) -> float:
    """The threshold between observed scores with the highest balanced accuracy, the middle of the gap it falls into."""
    scores, order = torch.sort(torch.cat([positive, negative]).double())
    is_positive = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])[order].double()
    # cutting after position i: positives above, negatives at or below; after the last, everything is at or below
    above = 1 - is_positive.cumsum(0) / len(positive)
    below = (1 - is_positive).cumsum(0) / len(negative)
    can_cut = torch.cat([scores[1:] > scores[:-1], torch.tensor([True])])
    best = int(torch.where(can_cut, above + below, -1.0).argmax())
    return float(scores[best : best + 2].mean())


def auroc(positive: Tensor, negative: Tensor) -> tuple[float, float, float]:
    """Area under the ROC curve (ties count half) and its 95 % interval (DeLong, DeLong and Clarke-Pearson 1988)."""
    wins = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    area = float(wins.mean())
    variance = sum(float(mean.var()) / len(mean) for mean in (wins.mean(1), wins.mean(0)) if len(mean) > 1)
    half = 1.959964 * math.sqrt(variance)
    return area, max(area - half, 0.0), min(area + half, 1.0)


def unit(x_bd: Tensor) -> Tensor:
    """Rows scaled to unit norm, in float64."""
    return torch.nn.functional.normalize(x_bd.double(), dim=1)


def nan_mean(x: Tensor) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    return float(x.nanmean())
