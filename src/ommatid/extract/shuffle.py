"""The order of training rows: rounds, so that rows beside one another come from different images.

A shard's images each put their tokens in a random order; round r takes the r-th token of every image. Images are dealt to four
strata, which every round goes through in the same order, each shuffled anew. So two rows of one image are at least three quarters
of the shard's images apart, whatever the number of tokens: a batch holds as many different images as it has rows.
(A uniform shuffle of 2,048 rows over 7,000 images repeats 14 % of them.)

An image with fewer rows than there are rounds skips some, evenly, from a random one on: no round is left to a few images with many
rows. Then rows of one image are about `window` apart, which falls with the share of the image that has most; an image whose rows
come to a shard in several chunks is spread by each of them alone.
"""

from dataclasses import dataclass

import numpy as np

N_STRATA = 4


@dataclass(frozen=True)
class RowOrder:
    """Where each row of a chunk stands in its shard; sorts by round, stratum, draw."""

    round: np.ndarray
    """(rows,) int32: where all images have equally many rows, the how-manieth of its image."""
    stratum: np.ndarray
    """(rows,) int8: of its image."""
    draw: np.ndarray
    """(rows,) float64: the place within round and stratum."""

    def argsort(self) -> np.ndarray:
        """Indices that put the rows in order."""
        return np.lexsort((self.draw, self.stratum, self.round))


def order_rows(image: np.ndarray, rng: np.random.Generator, n_rounds: int | None = None) -> RowOrder:
    """Draw the order of a chunk's rows.

    Args:
        image: Image of each row, (rows,); an image's rows need not be adjacent.
        rng: Seeded by shard and chunk.
        n_rounds: Rounds of the shard, at least as many as rows of an image in the chunk; None: just so many.
    """
    _, member = np.unique(image, return_inverse=True)
    n_images = int(member.max(initial=-1)) + 1
    shuffled = rng.permutation(len(image))
    by_image = shuffled[np.argsort(member[shuffled], kind="stable")]
    counts = np.bincount(member, minlength=n_images)
    starts = counts.cumsum() - counts
    place = np.arange(len(image)) - starts.repeat(counts)
    n_rounds = n_rounds or int(counts.max(initial=1))
    round_ = np.empty(len(image), np.int32)
    round_[by_image] = (place * n_rounds + rng.integers(n_rounds, size=n_images).repeat(counts)) // counts.repeat(counts)
    stratum = (rng.permutation(n_images) % N_STRATA).astype(np.int8)
    return RowOrder(round_, stratum[member], rng.random(len(image)))


def window(rows_per_stratum: np.ndarray, most: int) -> int:
    """So many consecutive rows of a shard come from different images: a round but for the largest stratum.

    Args:
        rows_per_stratum: Rows of each.
        most: Rows of the image that has most. Where all have so many it is true of any consecutive rows, else about.
    """
    return int(rows_per_stratum.sum() - rows_per_stratum.max(initial=0)) // max(1, most)
