"""What labels of images say of latents."""

import math


def purity(labels: list[list[str]], n: int) -> list[float]:
    """Purity@n: share of the commonest class among a latent's n strongest images; NaN where it fires on fewer.

    `labels` has, for each latent, the classes of its strongest firing images, at most n of them.
    """
    return [max(map(of_one.count, of_one)) / n if len(of_one) == n else math.nan for of_one in labels]
