"""What labels of images say of latents: purity, coverage, entropy, depth in a taxonomy."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def lca_depth(paths: Sequence[Sequence[str]]) -> int:
    """Depth of the lowest common ancestor of classes: how many names their paths from the root have in common; 0 is the root.

    The deeper, the more special what they share: (animal, mammal, dog) and (animal, mammal, cat) give 2.
    """
    depth = 0
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        depth += 1
    return depth


COVERED = 0.75
"""Purity from which on a latent stands for its commonest class: 12 of 16. Of two equally frequent classes chance gives that to four
latents in a hundred, of ten classes to none."""


def purity(labels: Sequence[Sequence[Hashable]], n: int) -> list[float]:
    """Purity@n: share of the commonest class among a latent's n strongest images; NaN where it fires on fewer.

    `labels` has, for each latent, the classes of its strongest firing images, at most n of them.
    """
    return [Counter(of_one).most_common(1)[0][1] / n if len(of_one) == n else math.nan for of_one in labels]


def coverage(labels: Sequence[Sequence[Hashable]], n: int, n_classes: int) -> float:
    """Share of the classes that are the commonest of some latent with purity@n of at least `COVERED`; NaN without classes."""
    pure = zip(labels, purity(labels, n), strict=True)
    covered = {Counter(of_one).most_common(1)[0][0] for of_one, share in pure if share >= COVERED}
    return len(covered) / n_classes if n_classes else math.nan


def label_entropy(mass_c: np.ndarray) -> float:
    """Entropy in bits of a latent's labels, a class weighing as much as its images' activations: `mass_c`, (classes,).

    0: it fires on one class only; log2(n): on n classes alike. NaN where it fires on no labelled image.
    """
    total = mass_c.sum()
    share = mass_c / total if total > 0 else np.array([math.nan])
    share = share[share != 0]
    return abs(float((share * np.log2(share)).sum()))  # abs: of one class the sum is -0
