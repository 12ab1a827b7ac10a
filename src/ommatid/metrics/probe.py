"""Logistic probes: can a class be read off some features.

Suffixes: n images, c classes, d features; features are shared by all classes (n, d), or each class has its own (n, c, d).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

PENALTY = 0.01
"""Of half the squared weights, beside the mean loss. On standardised features one value serves one latent and hundreds of dimensions."""
STEPS = 50
"""Of Newton's method, at most; about eight are needed."""
TOLERANCE = 1e-7
"""Of the gradient, at which it ends."""


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
    All classes are fitted together, by Newton's method with conjugate gradients: no matrix of features x features is made.

    Args:
        x: Features, (images, features), or of each class its own, (images, classes, features).
        y_nc: Which images are of each class, (images, classes) bool; each class has some and lacks some.
    """
    x = x.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    with_bias = torch.cat([(x - mean) / std, torch.ones_like(x[..., :1])], dim=-1)
    weights = _Loss(with_bias, y_nc).minimise()
    return LogisticProbes(mean, std, weights[:, :-1], weights[:, -1])


def _logits(x: Tensor, weights_cd: Tensor, bias_c: Tensor | float) -> Tensor:
    return (x @ weights_cd.T if x.ndim == 2 else (x * weights_cd).sum(2)) + bias_c


class _Loss:
    """Of each class, as a function of its weights, the last of which is the bias."""

    def __init__(self, x: Tensor, y_nc: Tensor) -> None:
        self._x = x
        self._y = y_nc.double()
        self._v = torch.where(y_nc, 1 / self._y.sum(0), 1 / (1 - self._y).sum(0)) / 2
        self._penalty = torch.full((x.shape[-1],), PENALTY, dtype=torch.float64)
        self._penalty[-1] = 0

    def minimise(self) -> Tensor:
        """The best weights, (classes, features + 1)."""
        weights = torch.zeros(self._y.shape[1], self._x.shape[-1], dtype=torch.float64)
        for _ in range(STEPS):
            p = _logits(self._x, weights, 0.0).sigmoid()
            gradient = self._sum(self._v * (p - self._y)) + self._penalty * weights
            if gradient.abs().max() < TOLERANCE:
                break
            weights = self._descend(weights, self._solve(self._v * p * (1 - p), -gradient))
        return weights

    def _values(self, weights_cd: Tensor) -> Tensor:
        losses = binary_cross_entropy_with_logits(_logits(self._x, weights_cd, 0.0), self._y, self._v, reduction="none")
        return losses.sum(0) + (self._penalty * weights_cd.square()).sum(1) / 2

    def _sum(self, of_nc: Tensor) -> Tensor:
        """Σ_n of_nc x_n, (classes, features + 1)."""
        return of_nc.T @ self._x if self._x.ndim == 2 else (of_nc[:, :, None] * self._x).sum(0)

    def _solve(self, curvature_nc: Tensor, target_cd: Tensor) -> Tensor:
        """Steps s with H s = target, H = Σ_n curvature_n x_n x_nᵀ + penalty, by conjugate gradients to a hundredth of the target."""
        steps, rest = torch.zeros_like(target_cd), target_cd.clone()
        direction, squared = rest.clone(), rest.square().sum(1)
        enough = 1e-4 * squared
        for _ in range(2 * target_cd.shape[1]):
            if (squared <= enough).all():
                break
            product = self._sum(curvature_nc * _logits(self._x, direction, 0.0)) + self._penalty * direction
            length = torch.where(squared > enough, squared / (direction * product).sum(1), 0.0)[:, None]
            steps, rest = steps + length * direction, rest - length * product
            before, squared = squared, rest.square().sum(1)
            direction = rest + torch.where(before > 0, squared / before, 0.0)[:, None] * direction
        return steps

    def _descend(self, weights_cd: Tensor, steps_cd: Tensor) -> Tensor:
        """Weights after a step each, halved until no class's loss is higher than before."""
        before = self._values(weights_cd)
        for _ in range(30):
            is_worse = self._values(weights_cd + steps_cd) > before
            if not is_worse.any():
                break
            steps_cd = torch.where(is_worse[:, None], steps_cd / 2, steps_cd)
        return weights_cd + steps_cd
