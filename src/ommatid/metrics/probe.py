"""Logistic probes: can a class be read off some features.

Suffixes: n images, c classes, d features; features are shared by all classes (n, d), or each class has its own (n, c, d).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

PENALTY = 0.01
"""Of half the squared weights, beside the mean loss. On standardised features one value serves one latent and hundreds of dimensions."""
STEPS = 500
"""Of L-BFGS, at most; it ends where the gradient vanishes."""


@dataclass(frozen=True)
class LogisticProbes:
    """A logistic regression for each class against all others."""

    mean: Tensor
    """Of the features it was fitted on."""
    std: Tensor
    """Of the same; 1 where one does not vary."""
    weights_cd: Tensor
    """Weights of standardised features, (classes, features)."""
    bias_c: Tensor
    """(classes,)."""

    def scores(self, x: Tensor) -> Tensor:
        """Log-odds of each class, (images, classes) float64, from features shaped as those it was fitted on."""
        return _logits((x.double() - self.mean) / self.std, self.weights_cd, self.bias_c)


def fit_probes(x: Tensor, y_nc: Tensor) -> LogisticProbes:
    """Minimise, for each class, Σ_n v_n log(1 + exp(∓(w·x_n + b))) + PENALTY/2 ‖w‖², x standardised.

    v is such that a class and its complement weigh half each: then 0 is the threshold of balanced accuracy, however rare the class.
    The classes are fitted together, by L-BFGS on the sum of their losses, which has the minima of each.

    Args:
        x: Features, (images, features), or of each class its own, (images, classes, features).
        y_nc: Which images are of each class, (images, classes) bool; each class has some and lacks some.
    """
    x = x.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    x = (x - mean) / std
    y = y_nc.double()
    v = torch.where(y_nc, 1 / y.sum(0), 1 / (1 - y).sum(0)) / 2
    weights = torch.zeros(y.shape[1], x.shape[-1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(y.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights, bias], max_iter=STEPS, history_size=20, tolerance_grad=1e-6, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = binary_cross_entropy_with_logits(_logits(x, weights, bias), y, v, reduction="sum") + PENALTY / 2 * weights.square().sum()
        value.backward()
        return value

    optimiser.step(loss)  # pyright: ignore[reportArgumentType]
    return LogisticProbes(mean, std, weights.detach(), bias.detach())


def _logits(x: Tensor, weights_cd: Tensor, bias_c: Tensor) -> Tensor:
    return (x @ weights_cd.T if x.ndim == 2 else (x * weights_cd).sum(2)) + bias_c
