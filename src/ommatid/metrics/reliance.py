"""Reliance of a model on features: whether it leans on one, when it answers with a class, more than the images justify.

An image has a feature or not, a true class, and a class that the model calls it. Of a pair of a feature and a class, this module counts
four groups of images: of the class and of all others, with the feature and without it. That the model is more often right where the
feature is there says nothing: so it is with every feature that is the class itself. Two numbers together tell one that misleads:

- mistaken_more: images of other classes that have the feature are called the class more often than images of the same classes are.
- trust_less: the answer "the class" is right less often where the feature is there than where it is not. A feature that is the class
  itself makes the answer more trustworthy.

All intervals hold for all pairs at once with a probability of 95 % (Bonferroni), and are exact for shares (Clopper and Pearson 1934);
those of differences of shares combine them as Newcombe (1998, method 10) does.

Suffixes: n images, c classes, l latents, p pairs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from jaxtyping import Float64, Int, Int64

from ommatid.metrics.interventions import LEAST_IN_GROUP

LEVEL = 0.05
"""Probability that any of the intervals of all pairs misses the true number."""
AT_ONCE = 256
"""Number of latents that are counted together."""


@dataclass(frozen=True)
class Span:
    """Numbers and their intervals, `(pairs,)` float64 each. Undefined numbers are NaN, with the widest possible interval."""

    value: Float64[np.ndarray, " pairs"]
    """The numbers."""
    low: Float64[np.ndarray, " pairs"]
    """Lower ends."""
    high: Float64[np.ndarray, " pairs"]
    """Upper ends."""

    def __sub__(self, other: "Span") -> "Span":
        """Return the differences of independent shares."""
        value = self.value - other.value
        below = np.hypot(self.value - self.low, other.high - other.value)
        above = np.hypot(self.high - self.value, other.value - other.low)
        is_known = np.isfinite(value)
        return Span(value, np.where(is_known, value - below, -1.0), np.where(is_known, value + above, 1.0))


def share_of(hits_p: Int[np.ndarray, " pairs"], n_p: Int[np.ndarray, " pairs"], n_pairs: int) -> Span:
    """Return shares of n cases, with intervals that hold for `n_pairs` shares at once."""
    from scipy.special import betainccinv, betaincinv

    tail, misses = LEVEL / 2 / max(1, n_pairs), n_p - hits_p
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.where(n_p > 0, hits_p / n_p, np.nan)
        low = np.where(hits_p > 0, betaincinv(hits_p, misses + 1.0, tail), 0.0)
        high = np.where(misses > 0, betainccinv(hits_p + 1.0, misses, tail), 1.0)
    return Span(value, low, high)


@dataclass(frozen=True)
class Pairs:
    """Counts of images for pairs of a latent and a class, `(pairs,)` each. An image "has" a latent or lacks it."""

    latents: Int64[np.ndarray, " pairs"]
    """Index of the latent."""
    classes: Int64[np.ndarray, " pairs"]
    """Index of the class."""
    n_with: Int64[np.ndarray, " pairs"]
    """Number of images of the class that have the latent."""
    n_without: Int64[np.ndarray, " pairs"]
    """Number of images of the class that lack it."""
    n_others_with: Int64[np.ndarray, " pairs"]
    """Number of images of other classes that have it."""
    n_others_without: Int64[np.ndarray, " pairs"]
    """Number of images of other classes that lack it."""
    right_with: Int64[np.ndarray, " pairs"]
    """Number of images of the class that have it and are called the class."""
    right_without: Int64[np.ndarray, " pairs"]
    """Number of images of the class that lack it and are called the class."""
    mistaken_with: Int64[np.ndarray, " pairs"]
    """Number of images of other classes that have it and are called the class."""
    mistaken_without: Int64[np.ndarray, " pairs"]
    """Number of images of other classes that lack it and are called the class."""
    expected: Float64[np.ndarray, " pairs"]
    """Number of images of other classes that have it and would be called the class, if those that have it were called the class as often as
    all images of their own class."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.latents)

    def take(self, places: Int[np.ndarray, " chosen"]) -> "Pairs":
        """Return the pairs at some places."""
        return Pairs(**{name: column[places] for name, column in vars(self).items()})


_COLUMNS = tuple(Pairs.__dataclass_fields__)


@dataclass(frozen=True)
class Counted:
    """All pairs of a set of images."""

    pairs: Pairs
    """Those that have enough images in each of the four groups."""
    n_too_few: int
    """Number of those that have not."""


def count_pairs(
    having: Iterable[tuple[int, Int[np.ndarray, " _having"]]],
    truth_n: Int[np.ndarray, " images"],
    called_n: Int[np.ndarray, " images"],
    n_classes: int,
    least: int = LEAST_IN_GROUP,
) -> Counted:
    """Count the four groups of images of every latent and class.

    Args:
        having: Latents, and the places of the images that have each.
        truth_n: Class of each image, `(images,)`.
        called_n: Class that the model calls each image, `(images,)`.
        n_classes: Number of classes.
        least: Smallest number of images in each of the four groups with which a pair is examined.

    Returns:
        The counts.
    """
    n_c, called_c, right_c = (np.bincount(of, minlength=n_classes) for of in (truth_n, called_n, truth_n[truth_n == called_n]))
    rates_cc = np.zeros((n_classes, n_classes))
    np.add.at(rates_cc, (truth_n, called_n), 1.0)
    rates_cc /= np.maximum(n_c, 1)[:, None]
    np.fill_diagonal(rates_cc, 0.0)
    found, n_all, rest = [], 0, iter(having)
    while some := list(islice(rest, AT_ONCE)):
        latents = np.array([latent for latent, _ in some], dtype=np.int64)
        with_lc, called_lc, right_lc = (np.stack(rows) for rows in zip(*_count_each(some, truth_n, called_n, n_classes), strict=True))
        others_lc = with_lc.sum(1, keepdims=True) - with_lc
        without_lc, others_without_lc = n_c - with_lc, len(truth_n) - n_c - others_lc
        n_all += int((n_c > 0).sum()) * len(some)
        of, to = np.nonzero(np.minimum.reduce([with_lc, without_lc, others_lc, others_without_lc]) >= least)
        right, mistaken = right_lc[of, to], (called_lc - right_lc)[of, to]
        groups = [group[of, to] for group in (with_lc, without_lc, others_lc, others_without_lc)]
        missed = [right, right_c[to] - right, mistaken, (called_c - right_c)[to] - mistaken]
        found.append(dict(zip(_COLUMNS, [latents[of], to, *groups, *missed, (with_lc @ rates_cc)[of, to]], strict=True)))
    empty = {name: np.zeros(0, dtype=np.float64 if name == "expected" else np.int64) for name in _COLUMNS}
    pairs = Pairs(**{name: np.concatenate([empty[name], *(part[name] for part in found)]) for name in _COLUMNS})
    return Counted(pairs, n_all - len(pairs))


def _count_each(
    some: Iterable[tuple[int, np.ndarray]], truth_n: np.ndarray, called_n: np.ndarray, n_classes: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Count, for each latent, the images that have it by class, by what they are called, and those that are called what they are."""
    for _, images in some:
        truth, called = truth_n[images], called_n[images]
        yield tuple(np.bincount(of, minlength=n_classes) for of in (truth, called, truth[truth == called]))  # type: ignore[misc]


@dataclass(frozen=True)
class Reliance:
    """How a model leans on the latents of pairs."""

    accuracy_with: Span
    """Share of the images of the class that are called the class, where the latent is."""
    accuracy_without: Span
    """The same where it is not."""
    accuracy_more: Span
    """accuracy_with − accuracy_without."""
    mistaken_with: Span
    """Share of the images of other classes that are called the class, where the latent is."""
    mistaken_more: Span
    """mistaken_with, less the same of all images of the same classes. The latter is taken as known: it rests on more images."""
    trust_with: Span
    """Share of the images that are called the class that are of it, where the latent is."""
    trust_without: Span
    """The same where it is not."""
    trust_less: Span
    """trust_without − trust_with."""


def measure_reliance(pairs: Pairs, n_pairs: int | None = None) -> Reliance:
    """Measure how a model leans on the latents of pairs, with intervals that hold for `n_pairs` pairs at once (default: those given)."""
    n = len(pairs) if n_pairs is None else n_pairs
    accuracy_with, accuracy_without = share_of(pairs.right_with, pairs.n_with, n), share_of(pairs.right_without, pairs.n_without, n)
    mistaken = share_of(pairs.mistaken_with, pairs.n_others_with, n)
    expected = pairs.expected / pairs.n_others_with
    trust_with = share_of(pairs.right_with, pairs.right_with + pairs.mistaken_with, n)
    trust_without = share_of(pairs.right_without, pairs.right_without + pairs.mistaken_without, n)
    return Reliance(
        accuracy_with,
        accuracy_without,
        accuracy_with - accuracy_without,
        mistaken,
        Span(mistaken.value - expected, mistaken.low - expected, mistaken.high - expected),
        trust_with,
        trust_without,
        trust_without - trust_with,
    )


def suspicion(reliance: Reliance, follows: Span | None = None) -> Float64[np.ndarray, " pairs"]:
    """Return how suspicious each pair is, `(pairs,)`: above 0 if the latent misleads the model.

    It is the smaller of two numbers that are certain at least: by how much more often images of other classes are called the class where
    the latent is (the lower end of `mistaken_more`), and by how much less the answer can be trusted there (that of `trust_less`) or, if
    it is larger, by how much the latent follows a competing attribute rather than the class.

    Args:
        reliance: Numbers of the pairs.
        follows: By how much each latent follows an attribute rather than the class, from `follow_attribute`; None if there is no attribute.
    """
    evidence = reliance.trust_less.low if follows is None else np.maximum(reliance.trust_less.low, follows.low)
    return np.minimum(reliance.mistaken_more.low, evidence)


def follow_attribute(
    has_other_p: Int[np.ndarray, " pairs"],
    n_other_p: Int[np.ndarray, " pairs"],
    has_class_p: Int[np.ndarray, " pairs"],
    n_class_p: Int[np.ndarray, " pairs"],
    n_pairs: int,
) -> Span:
    """Return by how much latents follow an attribute rather than a class.

    That is the share of images of other classes with the attribute that have the latent, less that of images of the class without the
    attribute: 1 if it is the attribute, −1 if it is the class, and 0 if it is neither.

    Args:
        has_other_p: Number of images of other classes with the attribute that have the latent, `(pairs,)`.
        n_other_p: Number of images of other classes with the attribute.
        has_class_p: Number of images of the class without the attribute that have the latent.
        n_class_p: Number of images of the class without the attribute.
        n_pairs: Number of pairs for which the intervals hold at once.
    """
    return share_of(has_other_p, n_other_p, n_pairs) - share_of(has_class_p, n_class_p, n_pairs)
