"""Metrics of latents that use the classes of images: purity, coverage, entropy, and depth in a taxonomy."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Num


def lca_depth(paths: Sequence[Sequence[str]]) -> int:
    """Return the depth of the lowest common ancestor of classes: the number of leading names that their paths from the root share.

    The deeper it is, the more specific is what they share: (animal, mammal, dog) and (animal, mammal, cat) give 2. The root has depth 0.
    """
    depth = 0
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        depth += 1
    return depth


COVERED = 0.75
"""Purity at which a latent counts as representing its most common class: 12 images of 16. With two equally frequent classes, four latents
in a hundred reach it by chance; with ten, none does."""


def purity(labels: Sequence[Sequence[Hashable]], n: int) -> list[float]:
    """Return purity@n of each latent: the share of the most common class among its n strongest images.

    Args:
        labels: For each latent, the classes of its strongest firing images, at most n.
        n: Number of images.

    Returns:
        The purities; NaN for a latent that fires on fewer than n images.
    """
    return [Counter(of_one).most_common(1)[0][1] / n if len(of_one) == n else math.nan for of_one in labels]


def coverage(labels: Sequence[Sequence[Hashable]], n: int, n_classes: int) -> float:
    """Return the share of classes that are the most common class of a latent with purity@n of at least `COVERED`.

    Args:
        labels: For each latent, the classes of its strongest firing images, at most n.
        n: Number of images.
        n_classes: Number of classes.

    Returns:
        The share; NaN if there are no classes.
    """
    pure = zip(labels, purity(labels, n), strict=True)
    covered = {Counter(of_one).most_common(1)[0][0] for of_one, share in pure if share >= COVERED}
    return len(covered) / n_classes if n_classes else math.nan


def label_entropy(mass_c: Num[np.ndarray, " classes"]) -> float:
    """Return the entropy in bits of the classes on which a latent fires.

    Args:
        mass_c: Sum of the latent's activations over the images of each class, `(classes,)`.

    Returns:
        The entropy: 0 if the latent fires on one class only, log2(n) if it fires equally on n, NaN if it fires on no labelled image.
    """
    total = mass_c.sum()
    share = mass_c / total if total > 0 else np.array([math.nan])
    share = share[share != 0]
    return abs(float((share * np.log2(share)).sum()))  # With one class the sum is -0.
