"""Logistic probes, which measure how well a class can be predicted from some features.

Features here are the inputs of a probe, such as activations of latents. They are shared by all classes, `(n, d)`, or differ by class,
`(n, c, d)`. Suffixes of names: n images, c classes, d features.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

PENALTY = 0.01
"""Factor of half the squared norm of the weights in the loss. It suits one feature as well as hundreds, because they are standardised."""
STEPS = 50
"""Largest number of steps of Newton's method; about eight are needed."""
TOLERANCE = 1e-7
"""Largest component of the gradient at which Newton's method stops."""


@dataclass(frozen=True)
class LogisticProbes:
    """A logistic regression for each class against all others."""

    mean: Float64[Tensor, " features"] | Float64[Tensor, "classes features"]
    """Means of the features in the training data, `(features,)` or `(classes, features)`."""
    std: Float64[Tensor, " features"] | Float64[Tensor, "classes features"]
    """Standard deviations of the same features; 1 for a feature that does not vary."""
    weights_cd: Float64[Tensor, "classes features"]
    """Weights of standardised features, `(classes, features)`."""
    bias_c: Float64[Tensor, " classes"]
    """Biases, `(classes,)`."""

    def scores(self, x: Float[Tensor, "images features"] | Float[Tensor, "images classes features"]) -> Float64[Tensor, "images classes"]:
        """Return the log-odds of each class, `(images, classes)` float64, from features in the layout of the training data."""
        return _logits((x.double() - self.mean) / self.std, self.weights_cd, self.bias_c)


def fit_probes(
    x: Float[Tensor, "images features"] | Float[Tensor, "images classes features"],
    y_nc: Bool[Tensor, "images classes"],
    start: LogisticProbes | None = None,
) -> LogisticProbes:
    """Fit a probe for each class by minimising Σ_n v_n log(1 + exp(∓(w·x_n + b))) + PENALTY/2 ‖w‖², for standardised x.

    The weights v give a class and its complement half of the total weight each, so that 0 is the best threshold for balanced accuracy,
    however rare the class is. All classes are fitted together by Newton's method with conjugate gradients, which needs no matrix of
    features x features.

    Args:
        x: Features, `(images, features)`, or different ones for each class, `(images, classes, features)`.
        y_nc: Whether each image belongs to each class, `(images, classes)` bool. No class may be empty or have all images.
        start: Probes for the same classes from similar features, from which the same probes are found in fewer steps.

    Returns:
        The probes.
    """
    x = x.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    with_bias = torch.cat([(x - mean) / std, torch.ones_like(x[..., :1])], dim=-1)
    known = None if start is None else torch.cat([start.weights_cd, start.bias_c[:, None]], dim=1)
    weights = _Loss(with_bias, y_nc).minimise(known)
    return LogisticProbes(mean, std, weights[:, :-1], weights[:, -1])


def _logits(
    x: Float64[Tensor, "images d"] | Float64[Tensor, "images classes d"],
    weights_cd: Float64[Tensor, "classes d"],
    bias_c: Float64[Tensor, " classes"] | float,
) -> Float64[Tensor, "images classes"]:
    return (x @ weights_cd.T if x.ndim == 2 else (x * weights_cd).sum(2)) + bias_c


class _Loss:
    """The loss of each class as a function of its weights, the last of which is the bias."""

    def __init__(self, x: Float64[Tensor, "images d"] | Float64[Tensor, "images classes d"], y_nc: Bool[Tensor, "images classes"]) -> None:
        self._x = x
        self._y = y_nc.double()
        self._v = torch.where(y_nc, 1 / self._y.sum(0), 1 / (1 - self._y).sum(0)) / 2
        self._penalty = torch.full((x.shape[-1],), PENALTY, dtype=torch.float64)
        self._penalty[-1] = 0

    def minimise(self, start_cd: Float64[Tensor, "classes d"] | None = None) -> Float64[Tensor, "classes d"]:
        """Return the weights that minimise the loss, `(classes, features + 1)`, beginning at some weights, or at 0."""
        weights = torch.zeros(self._y.shape[1], self._x.shape[-1], dtype=torch.float64) if start_cd is None else start_cd
        for _ in range(STEPS):
            p = _logits(self._x, weights, 0.0).sigmoid()
            gradient = self._sum(self._v * (p - self._y)) + self._penalty * weights
            if gradient.abs().max() < TOLERANCE:
                break
            weights = self._descend(weights, self._solve(self._v * p * (1 - p), -gradient))
        return weights

    def _values(self, weights_cd: Float64[Tensor, "classes d"]) -> Float64[Tensor, " classes"]:
        losses = binary_cross_entropy_with_logits(_logits(self._x, weights_cd, 0.0), self._y, self._v, reduction="none")
        return losses.sum(0) + (self._penalty * weights_cd.square()).sum(1) / 2

    def _sum(self, of_nc: Float64[Tensor, "images classes"]) -> Float64[Tensor, "classes d"]:
        """Return Σ_n of_nc x_n, `(classes, features + 1)`."""
        return of_nc.T @ self._x if self._x.ndim == 2 else (of_nc[:, :, None] * self._x).sum(0)

    def _solve(
        self, curvature_nc: Float64[Tensor, "images classes"], target_cd: Float64[Tensor, "classes d"]
    ) -> Float64[Tensor, "classes d"]:
        """Solve H s = target by conjugate gradients, to 1 % of the target's norm, where H = Σ_n curvature_n x_n x_nᵀ + penalty."""
        steps, residual = torch.zeros_like(target_cd), target_cd.clone()
        direction, squared = residual.clone(), residual.square().sum(1)
        enough = 1e-4 * squared
        for _ in range(2 * target_cd.shape[1]):
            if (squared <= enough).all():
                break
            product = self._sum(curvature_nc * _logits(self._x, direction, 0.0)) + self._penalty * direction
            length = torch.where(squared > enough, squared / (direction * product).sum(1), 0.0)[:, None]
            steps, residual = steps + length * direction, residual - length * product
            before, squared = squared, residual.square().sum(1)
            direction = residual + torch.where(before > 0, squared / before, 0.0)[:, None] * direction
        return steps

    def _descend(self, weights_cd: Float64[Tensor, "classes d"], steps_cd: Float64[Tensor, "classes d"]) -> Float64[Tensor, "classes d"]:
        """Return the weights after a step of each class, which is halved until the loss is not higher than before."""
        before = self._values(weights_cd)
        for _ in range(30):
            is_worse = self._values(weights_cd + steps_cd) > before
            if not is_worse.any():
                break
            steps_cd = torch.where(is_worse[:, None], steps_cd / 2, steps_cd)
        return weights_cd + steps_cd
