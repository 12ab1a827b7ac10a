"""Zero-shot classification with x̂ in the place of x, which measures how much of a model's ability to separate classes is preserved.

Suffixes of names: n images, c classes.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ommatid.compute.intervals import Z

SCALES = (1.0, 1000.0)
"""Bounds of a fitted scale. At the lower one, all classes are almost equally likely; at the upper, the third digit of a cosine decides."""


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval; all are NaN where the number is undefined."""

    value: float
    """The number."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""


def wilson(share: float, n: float) -> Interval:
    """Return a share of n cases and its interval (Wilson 1927). All are NaN if there are no cases; n may be an effective number."""
    if n <= 0:
        return Interval(math.nan, math.nan, math.nan)
    middle, half = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    low, high = ((middle + side * half) / (1 + Z**2 / n) for side in (-1, 1))
    return Interval(share, max(low, 0.0), min(high, 1.0))


@dataclass(frozen=True)
class Classified:
    """The results of classifying some images."""

    is_right: Bool[Tensor, " images"]
    """Whether the class with the largest logit is the true one, `(n,)` bool."""
    cross_entropies: Float[Tensor, " images"]
    """−log of the probability of the true class, `(n,)` float64, in nats."""

    @property
    def accuracy(self) -> Interval:
        """Share of images classified correctly, and its interval (Wilson 1927)."""
        return wilson(float(self.is_right.double().mean()), len(self.is_right))

    @property
    def cross_entropy(self) -> float:
        """Mean cross-entropy over images, in nats."""
        return float(self.cross_entropies.mean())


def classify(cosines_nc: Float[Tensor, "images classes"], classes_n: Int[Tensor, " images"], scale: float) -> Classified:
    """Classify images by a softmax over scale · cosine of image and text.

    Args:
        cosines_nc: Cosines of each image with the text of each class, `(n, c)`.
        classes_n: True class of each image, `(n,)` int64.
        scale: Logit scale of the model, or one from `fit_scale`.

    Returns:
        The results.
    """
    logits = scale * cosines_nc.double()
    return Classified(logits.argmax(1) == classes_n, torch.nn.functional.cross_entropy(logits, classes_n, reduction="none"))


def fit_scale(cosines_nc: Float[Tensor, "images classes"], classes_n: Int[Tensor, " images"]) -> float:
    """Fit the scale, within `SCALES`, that has the smallest mean cross-entropy.

    The cross-entropy of softmax(scale · cosine) is convex in the scale, so the zero of its slope is found by bisection. The slope is the
    mean over images of the expected cosine minus the cosine of the true class.

    Args:
        cosines_nc: Cosines of each image with the text of each class, `(n, c)`.
        classes_n: True class of each image, `(n,)` int64.

    Returns:
        The scale.
    """
    cosines = cosines_nc.double()
    true = cosines.gather(1, classes_n[:, None]).mean()
    low, high = (math.log(scale) for scale in SCALES)
    for _ in range(50):
        middle = (low + high) / 2
        expected = ((math.exp(middle) * cosines).softmax(1) * cosines).sum(1).mean()
        low, high = (low, middle) if expected > true else (middle, high)
    return math.exp((low + high) / 2)


def downstream_loss(plain: Classified, spliced: Classified) -> Interval:
    """Return the mean rise of cross-entropy over the plain model's, in nats, with its interval over paired images (Gao et al. 2024).

    It is negative if the model classifies better than before, which `downstream_kl` shows to be a change, too.
    """
    rise = spliced.cross_entropies - plain.cross_entropies
    half = Z * float(rise.std()) / math.sqrt(len(rise)) if len(rise) > 1 else math.nan
    return Interval(float(rise.mean()), float(rise.mean()) - half, float(rise.mean()) + half)


def downstream_kl(plain_nc: Float[Tensor, "images classes"], spliced_nc: Float[Tensor, "images classes"], scale: float) -> float:
    """Return the mean divergence KL(plain ‖ spliced) of the probabilities of the classes, in nats: 0 only if no image's change.

    Args:
        plain_nc: Cosines of each image with the text of each class in the unchanged model, `(n, c)`.
        spliced_nc: The same with x̂ in the place of x.
        scale: As for `classify`.
    """
    plain, spliced = ((scale * cosines.double()).log_softmax(1) for cosines in (plain_nc, spliced_nc))
    return float((plain.exp() * (plain - spliced)).sum(1).mean())


def recovered(plain: Classified, spliced: Classified, mean: Classified) -> Interval:
    """Compute the share of cross-entropy recovered, (CE_mean − CE_spliced) / (CE_mean − CE_plain).

    Args:
        plain: Results of the unchanged model, for which the share is 1.
        spliced: Results with x̂ in the place of x.
        mean: Results with the mean activation in the place of x, for which the share is 0. All three have the same images in the same
            order.

    Returns:
        The share and its interval, which is that of a ratio of paired means (delta method, Cochran 1977). Both are NaN if replacing
        activations by their mean has no significant effect (CE_mean − CE_plain is within 1.96 standard errors of 0): there is then nothing
        to recover.
    """
    return share_of_means(mean.cross_entropies - spliced.cross_entropies, mean.cross_entropies - plain.cross_entropies)


def share_of_means(part_n: Float[Tensor, " images"], whole_n: Float[Tensor, " images"]) -> Interval:
    """Return mean(part) / mean(whole) over paired images, `(n,)` each, with its interval (delta method, Cochran 1977).

    All are NaN unless the mean of the whole is significantly above 0: there is then nothing to have a share of.
    """
    n, whole = len(whole_n), float(whole_n.mean())
    if n < 2 or whole <= Z * float(whole_n.std()) / math.sqrt(n):
        return Interval(math.nan, math.nan, math.nan)
    share = float(part_n.mean()) / whole
    half = Z * float((part_n - share * whole_n).std()) / (whole * math.sqrt(n))
    return Interval(share, share - half, share + half)
