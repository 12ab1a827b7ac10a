"""Do two dictionaries hold the same directions: best matches by cosine, one-to-one matches, and what chance would give.

Suffixes: n and m directions of two dictionaries, d their width. scipy, which takes a second to import, waits until it is needed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ommatid.compute.nearest import Nearest, nearest_both_ways

MOST_ONE_TO_ONE = 4096
"""Directions of the larger dictionary up to which one-to-one matching is done: 14 s and 200 MB there, and it grows with the cube."""


@dataclass(frozen=True)
class BestMatches:
    """Of each direction of a dictionary the nearest of another; the first where several are equally near."""

    other: Tensor
    """Which, (n,) int64."""
    cosine: Tensor
    """How near, (n,) float32; 0 for a direction of length 0."""

    @property
    def mmcs(self) -> float:
        """Mean max cosine similarity (Sharkey et al. 2022): the mean over the directions of the best cosine."""
        return float(self.cosine.double().mean())

    def mutual(self, back: "BestMatches") -> Tensor:
        """Whether each direction is the best match of its own best match, (n,)."""
        return back.other[self.other] == torch.arange(len(self.other))


def best_matches(a_nd: Tensor, b_md: Tensor) -> tuple[BestMatches, BestMatches]:
    """Best match of each direction of `a_nd` in `b_md`, and of each of `b_md` in `a_nd`; rows of any length.

    In tiles: beside the dictionaries themselves memory does not grow with their size.
    """
    there, back = nearest_both_ways(_unit(a_nd), _unit(b_md))
    return _best_matches(there), _best_matches(back)


def _best_matches(found: Nearest) -> BestMatches:
    return BestMatches(torch.from_numpy(found.others[:, 0]), torch.from_numpy(found.cosines[:, 0]))


def match_one_to_one(a_nd: Tensor, b_md: Tensor) -> Tensor | None:
    """Cosines of the pairs of the one-to-one matching with the highest sum (Hungarian), (min(n, m),).

    None where a dictionary is larger than MOST_ONE_TO_ONE: there `BestMatches.mutual` says what can be said in bounded time.
    """
    if max(len(a_nd), len(b_md)) > MOST_ONE_TO_ONE:
        return None
    from scipy.optimize import linear_sum_assignment

    cosines = _unit(a_nd) @ _unit(b_md).T
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    return cosines[rows, columns]


def chance_cosine(m: int, d: int) -> float:
    """Expected cosine of a direction with the nearest of `m` directions drawn at random, uniformly, in `d` dimensions: MMCS by chance.

    One cosine is below t with probability F(t) = (1 + sign(t) I(t²; 1/2, (d-1)/2)) / 2, I the regularised incomplete beta function; so
    the largest of m has the mean 1 - ∫ F(t)^m dt over -1 to 1.
    """
    if d == 1:
        return 1 - 2.0 ** (1 - m)
    from scipy.integrate import quad
    from scipy.special import betainc

    def below(t: float) -> float:
        half = float(betainc(0.5, (d - 1) / 2, t * t)) / 2
        return (0.5 + half if t > 0 else 0.5 - half) ** m

    return 1 - quad(below, -1, 1, limit=200, points=[0.0])[0]


def _unit(x_nd: Tensor) -> Tensor:
    """Rows of unit length in float32, zeros where a row is."""
    return torch.nn.functional.normalize(x_nd.float(), dim=1)
