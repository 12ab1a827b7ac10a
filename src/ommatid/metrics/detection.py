"""Metrics of how well a score separates positive from negative images."""

import math

import torch
from jaxtyping import Float, Float64, Num
from torch import Tensor


def balanced_accuracy(positive: Float[Tensor, " positives"], negative: Float[Tensor, " negatives"], threshold: float) -> float:
    """Return the mean of two shares: `positive` scores above the threshold, and `negative` scores at or below it."""
    return float(((positive > threshold).double().mean() + (negative <= threshold).double().mean()) / 2)


def precision_at(recall: float, alarm_rate: float, base_rate: float) -> float:
    """Return the share of positive images among those that are detected; NaN if none is.

    Args:
        recall: Share of positive images that are detected.
        alarm_rate: Share of negative images that are detected.
        base_rate: Share of positive images among all, which is also the precision of a detector that does not distinguish them.
    """
    hits, alarms = base_rate * recall, (1 - base_rate) * alarm_rate
    return hits / (hits + alarms) if hits + alarms else math.nan


def best_threshold(positive: Float[Tensor, " positives"], negative: Float[Tensor, " negatives"]) -> float:
    """Return the threshold with the highest balanced accuracy, in the middle of a gap between observed scores.

    If several thresholds are equally good, the lowest is returned. Accuracies are compared as integers, so that rounding has no influence.
    """
    scores, order = torch.sort(torch.cat([positive, negative]).double())
    is_positive = (order < len(positive)).long()
    # For a cut after position i: positives above it, and negatives at or below it. After the last position, all scores are below.
    above = len(positive) - is_positive.cumsum(0)
    below = (1 - is_positive).cumsum(0)
    can_cut = torch.cat([scores[1:] > scores[:-1], torch.tensor([True])])
    best = int(torch.where(can_cut, above * len(negative) + below * len(positive), -1).argmax())
    return float(scores[best : best + 2].mean())


def auroc(positive: Float[Tensor, " positives"], negative: Float[Tensor, " negatives"]) -> tuple[float, float, float]:
    """Compute the area under the ROC curve, where ties count half.

    Args:
        positive: Scores of positive images.
        negative: Scores of negative images.

    Returns:
        The area, and the lower and upper end of its 95 % interval (DeLong, DeLong and Clarke-Pearson 1988).
    """
    wins = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    area = float(wins.mean())
    variance = sum(float(mean.var()) / len(mean) for mean in (wins.mean(1), wins.mean(0)) if len(mean) > 1)
    half = 1.959964 * math.sqrt(variance)
    return area, max(area - half, 0.0), min(area + half, 1.0)


def rank_correlation(x: Num[Tensor, " n"], y: Num[Tensor, " n"]) -> float:
    """Return Spearman's rank correlation, in which equal values share their mean rank; NaN if either input is constant."""
    ranks = torch.stack([_ranks(x), _ranks(y)])
    centred = ranks - ranks.mean(1, keepdim=True)
    norms = centred.norm(dim=1)
    return float(centred[0] @ centred[1] / norms.prod()) if norms.prod() > 0 else math.nan


def _ranks(x: Num[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Return the rank of each value, from 0, `(n,)` float64. Equal values share their mean rank."""
    _, place, times = torch.unique(x, return_inverse=True, return_counts=True)
    return (times.cumsum(0) - (times + 1) / 2)[place].double()
