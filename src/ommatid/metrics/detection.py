"""Does a score tell some images from others."""

import math

import torch
from torch import Tensor


def balanced_accuracy(positive: Tensor, negative: Tensor, threshold: float) -> float:
    """Mean of the share of `positive` scores above the threshold and the share of `negative` scores at or below it."""
    return float(((positive > threshold).double().mean() + (negative <= threshold).double().mean()) / 2)


def best_threshold(positive: Tensor, negative: Tensor) -> float:
    """The threshold between observed scores with the highest balanced accuracy, the middle of the gap it falls into.

    Of thresholds that are equally good the lowest: accuracies are compared as integers, so that rounding decides nothing.
    """
    scores, order = torch.sort(torch.cat([positive, negative]).double())
    is_positive = (order < len(positive)).long()
    # cutting after position i: positives above, negatives at or below; after the last, everything is at or below
    above = len(positive) - is_positive.cumsum(0)
    below = (1 - is_positive).cumsum(0)
    can_cut = torch.cat([scores[1:] > scores[:-1], torch.tensor([True])])
    best = int(torch.where(can_cut, above * len(negative) + below * len(positive), -1).argmax())
    return float(scores[best : best + 2].mean())


def auroc(positive: Tensor, negative: Tensor) -> tuple[float, float, float]:
    """Area under the ROC curve (ties count half) and its 95 % interval (DeLong, DeLong and Clarke-Pearson 1988)."""
    wins = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    area = float(wins.mean())
    variance = sum(float(mean.var()) / len(mean) for mean in (wins.mean(1), wins.mean(0)) if len(mean) > 1)
    half = 1.959964 * math.sqrt(variance)
    return area, max(area - half, 0.0), min(area + half, 1.0)


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's: Pearson's correlation of the ranks, where equal values share the mean of theirs; NaN where either is constant."""
    ranks = torch.stack([_ranks(x), _ranks(y)])
    centred = ranks - ranks.mean(1, keepdim=True)
    norms = centred.norm(dim=1)
    return float(centred[0] @ centred[1] / norms.prod()) if norms.prod() > 0 else math.nan


def _ranks(x: Tensor) -> Tensor:
    """Mean rank of each value among all, from 0, float64."""
    _, place, times = torch.unique(x, return_inverse=True, return_counts=True)
    return (times.cumsum(0) - (times + 1) / 2)[place].double()
