"""Finding and counting positive values, faster than through boolean comparisons and sums."""

import torch
from jaxtyping import Bool, Int64, Num
from torch import Tensor


def true_at(mask: Bool[Tensor, "..."]) -> Int64[Tensor, " true"]:
    """Return the flat indices of a mask's true entries, ascending, `(n,)` int64. On the CPU, eight false entries are skipped at a time."""
    if mask.numel() % 8 or mask.is_cuda:
        return mask.flatten().nonzero()[:, 0]
    words = mask.flatten().view(torch.int64)
    nonzero_words = words.nonzero()[:, 0]
    found = words.index_select(0, nonzero_words).view(torch.bool).nonzero()[:, 0]
    return nonzero_words.index_select(0, found >> 3) * 8 + (found & 7)


def positive(x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """Return 1 where x is positive and 0 elsewhere, in the dtype of x: comparing into booleans takes several times as long."""
    return torch.gt(x, 0, out=torch.empty_like(x))


def count_positive(x_bs: Num[Tensor, "rows columns"]) -> Int64[Tensor, " columns"]:
    """Count the positive values of each column of x, which has at most 2^24 rows, `(columns,)` int64."""
    return positive(x_bs).sum(0, dtype=torch.float32).long()
