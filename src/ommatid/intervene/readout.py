"""Readouts: what is read of a model's output, as scores by which names are compared.

Suffixes: b images of a batch, d width of the output, m names.
"""

from dataclasses import dataclass

from jaxtyping import Float, Float64
from torch import Tensor

from ommatid.errors import InputError
from ommatid.intervene.attribution import class_log_odds, similarity
from ommatid.metrics import unit
from ommatid.vlm import Score


@dataclass(frozen=True, eq=False)
class Readout:
    """Similarity of a model's outputs to texts, or the logits of a linear head."""

    names: tuple[str, ...]
    """Names of what is read: classes, or texts."""
    weights: Float64[Tensor, "names d"]
    """Embedding of each name's text at unit norm, or weights of each name's logit, `(m, d)` float64."""
    scale: float
    """Factor by which scores are multiplied before the softmax; 1 for logits."""
    bias: Float64[Tensor, " names"] | None = None
    """Bias of each name's logit, `(m,)` float64; None for texts, which are compared with outputs at unit norm."""

    def scores(self, outputs: Float[Tensor, "batch d"]) -> Float64[Tensor, "batch names"]:
        """Return the cosine of each image's output `(b, d)` and each text, or the logits, `(b, m)` float64."""
        if self.bias is None:
            return unit(outputs.cpu()) @ self.weights.T
        return outputs.cpu().double() @ self.weights.T + self.bias

    def log_probabilities(self, outputs: Float[Tensor, "batch d"]) -> Float64[Tensor, "batch names"]:
        """Return the log-probability of each name among all, given outputs `(b, d)`, `(b, m)` float64."""
        return (self.scale * self.scores(outputs)).log_softmax(1)

    def log_odds(self, name: str) -> Score:
        """Return the score log(p / (1 − p)) of a name's probability p among all, for attribution.

        Raises:
            InputError: There is no such name, or no other one.
        """
        index = self.index(name)
        if len(self.names) < 2:
            raise InputError(f"log-odds of {name!r} need another name to compare it with; give two or more")
        if self.bias is None:
            return class_log_odds(self.weights.float(), index, self.scale)
        rivals = [other for other in range(len(self.names)) if other != index]

        def score(outputs: Tensor) -> Tensor:
            logits = self._logits(outputs)
            return logits[:, index] - logits[:, rivals].logsumexp(1)

        return score

    def difference(self, name: str, against: str) -> Score:
        """Return the score of a name minus that of another one, for attribution.

        Raises:
            InputError: There is no such name.
        """
        one, other = self.index(name), self.index(against)
        if self.bias is None:
            return similarity(self.weights[one].float(), self.weights[other].float())
        return lambda outputs: self._logits(outputs)[:, one] - self._logits(outputs)[:, other]

    def _logits(self, outputs: Tensor) -> Tensor:
        """Return logits in the dtype of outputs, through which gradients pass."""
        assert self.bias is not None
        return outputs @ self.weights.to(outputs).T + self.bias.to(outputs)

    def index(self, name: str) -> int:
        """Return the place of a name.

        Raises:
            InputError: There is no such name.
        """
        if name not in self.names:
            some = ", ".join(map(repr, self.names[:8])) + (", ..." if len(self.names) > 8 else "")
            raise InputError(f"{name!r} is not among the names that are read from the output: {some}")
        return self.names.index(name)
