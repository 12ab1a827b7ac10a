"""Zero-shot classification: how much of what a model needs to tell classes apart is left when x̂ takes the place of x.

Suffixes: n images, c classes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Z = 1.959964
"""Of a 95 % interval."""
SCALES = (1.0, 1000.0)
"""Between which a scale is fitted: from nearly no opinion to nearly no doubt about a cosine's third digit."""


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Classified:
    """What became of some images."""

    is_right: Tensor
    """Whether the class with the largest logit is the image's own, (n,) bool."""
    cross_entropies: Tensor
    """−log of the probability of its own class, (n,) float64, in nats."""

    @property
    def accuracy(self) -> Interval:
        """Interval of images that are right, and its interval (Wilson 1927)."""
        n, share = len(self.is_right), float(self.is_right.double().mean())
        middle, half = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
        low, high = ((middle + side * half) / (1 + Z**2 / n) for side in (-1, 1))
        return Interval(share, max(low, 0.0), min(high, 1.0))

    @property
    def cross_entropy(self) -> float:
        """Mean over images."""
        return float(self.cross_entropies.mean())


def classify(cosines_nc: Tensor, classes_n: Tensor, scale: float) -> Classified:
    """Softmax over the classes of scale · cosine of image and text.

    Args:
        cosines_nc: Of each image and the text of each class, (n, c).
        classes_n: Each image's own class, (n,) int64.
        scale: The model's own, or a fitted one (`fit_scale`).
    """
    logits = scale * cosines_nc.double()
    return Classified(logits.argmax(1) == classes_n, torch.nn.functional.cross_entropy(logits, classes_n, reduction="none"))


def fit_scale(cosines_nc: Tensor, classes_n: Tensor) -> float:
    """The scale within SCALES with the smallest mean cross-entropy, by bisection of its slope.

    The cross-entropy of softmax(scale · cosine) is convex in the scale: its slope, the mean over images of the expected cosine less
    that of the own class, only rises.
    """
    cosines = cosines_nc.double()
    own = cosines.gather(1, classes_n[:, None]).mean()
    low, high = (math.log(scale) for scale in SCALES)
    for _ in range(50):
        middle = (low + high) / 2
        expected = ((math.exp(middle) * cosines).softmax(1) * cosines).sum(1).mean()
        low, high = (low, middle) if expected > own else (middle, high)
    return math.exp((low + high) / 2)


def recovered(plain: Classified, spliced: Classified, mean: Classified) -> Interval:
    """(CE_mean − CE_spliced) / (CE_mean − CE_plain): 1 is the plain model, 0 the mean activation in the place of every activation.

    All three are of the same images in the same order. The interval is that of a ratio of paired means (delta method, Cochran 1977).
    NaN where the mean hurts no more than chance would (CE_mean − CE_plain within 1.96 standard errors of 0): then there is nothing to
    recover, and the ratio says nothing.
    """
    kept, all_ = mean.cross_entropies - spliced.cross_entropies, mean.cross_entropies - plain.cross_entropies
    n, whole = len(all_), float(all_.mean())
    if n < 2 or whole <= Z * float(all_.std()) / math.sqrt(n):
        return Interval(math.nan, math.nan, math.nan)
    share = float(kept.mean()) / whole
    half = Z * float((kept - share * all_).std()) / (whole * math.sqrt(n))
    return Interval(share, share - half, share + half)
