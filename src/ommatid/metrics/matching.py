"""Comparison of the directions of two dictionaries: best matches by cosine, one-to-one matches, and what chance would give.

Suffixes of names: n and m directions of two dictionaries, d their width. scipy takes a second to import, so it is imported when needed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from ommatid.compute.nearest import Nearest, nearest_both_ways

MOST_ONE_TO_ONE = 4096
"""Largest number of directions for one-to-one matching. It takes 14 s and 200 MB, and time grows with the cube of the number."""


@dataclass(frozen=True)
class BestMatches:
    """The nearest direction in another dictionary for each direction of a dictionary. Of equally near directions, the first is taken."""

    other: Int[Tensor, " n"]
    """Index of the nearest direction, `(n,)` int64."""
    cosine: Float32[Tensor, " n"]
    """Cosine with the nearest direction, `(n,)` float32; 0 for a direction of norm 0."""

    @property
    def mmcs(self) -> float:
        """Mean max cosine similarity (Sharkey et al. 2022): the mean of the best cosines."""
        return float(self.cosine.double().mean())

    def mutual(self, back: "BestMatches") -> Bool[Tensor, " n"]:
        """Return whether each direction is the best match of its best match, `(n,)`; `back` holds the matches in the other direction."""
        return back.other[self.other] == torch.arange(len(self.other))


def best_matches(a_nd: Float[Tensor, "n d"], b_md: Float[Tensor, "m d"]) -> tuple[BestMatches, BestMatches]:
    """Find the best matches between two dictionaries, in tiles, so that extra memory does not grow with their size.

    Args:
        a_nd: Directions, `(n, d)`, of any norm.
        b_md: Directions, `(m, d)`, of any norm.

    Returns:
        The best matches of `a_nd` in `b_md`, and those of `b_md` in `a_nd`.
    """
    there, back = nearest_both_ways(_unit(a_nd), _unit(b_md))
    return _best_matches(there), _best_matches(back)


def _best_matches(found: Nearest) -> BestMatches:
    return BestMatches(torch.from_numpy(found.others[:, 0]), torch.from_numpy(found.cosines[:, 0]))


def match_one_to_one(a_nd: Float[Tensor, "n d"], b_md: Float[Tensor, "m d"]) -> Float32[Tensor, " pairs"] | None:
    """Find the one-to-one matching with the highest sum of cosines (Hungarian algorithm).

    Args:
        a_nd: Directions, `(n, d)`, of any norm.
        b_md: Directions, `(m, d)`, of any norm.

    Returns:
        The cosines of the matched pairs, `(min(n, m),)`. None if a dictionary has more than `MOST_ONE_TO_ONE` directions:
        `BestMatches.mutual` is the alternative that takes a bounded time.
    """
    if max(len(a_nd), len(b_md)) > MOST_ONE_TO_ONE:
        return None
    from scipy.optimize import linear_sum_assignment

    cosines = _unit(a_nd) @ _unit(b_md).T
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    return cosines[rows, columns]


def chance_cosine(m: int, d: int) -> float:
    """Return the MMCS expected by chance: the mean cosine of a direction with the nearest of `m` uniformly random ones in `d` dimensions.

    One cosine is below t with probability F(t) = (1 + sign(t) I(t²; 1/2, (d-1)/2)) / 2, where I is the regularised incomplete beta
    function, so the mean of the largest of m is 1 - ∫ F(t)^m dt over -1 to 1.
    """
    if d == 1:
        return 1 - 2.0 ** (1 - m)
    from scipy.integrate import quad
    from scipy.special import betainc

    def below(t: float) -> float:
        half = float(betainc(0.5, (d - 1) / 2, t * t)) / 2
        return (0.5 + half if t > 0 else 0.5 - half) ** m

    return 1 - quad(below, -1, 1, limit=200, points=[0.0])[0]


def _unit(x_nd: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return rows scaled to unit norm, in float32; rows of zeros stay zero."""
    return torch.nn.functional.normalize(x_nd.float(), dim=1)
