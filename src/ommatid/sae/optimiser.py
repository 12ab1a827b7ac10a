"""Adam over the weights of an SAE: clipped, and without what would only change the length of directions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ommatid.sae import distributed
from ommatid.sae.weights import ROWS_PER_CHUNK, Weights

MAX_NORM = 1.0
"""Of all gradients together."""


_MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}


class Optimiser:
    """Adam(0.9, 0.999) with the recipe of dictionary_learning: clipping to 1, directions kept at unit length."""

    def __init__(self, weights: Weights, rates: Mapping[str, float] | None = None) -> None:
        """`rates` are those of some tensors, by name, as multiples of the learning rate."""
        self._weights = weights
        rates = rates or {}
        groups = [{"params": [tensor], "rate": rates.get(name, 1.0)} for name, tensor in weights.trained().items() if name in rates]
        rest = [tensor for name, tensor in weights.trained().items() if name not in rates]
        self.adam = torch.optim.Adam([{"params": rest, "rate": 1.0}, *groups], betas=(0.9, 0.999), fused=True)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Change the weights by their gradients, summed over the ranks; gives the gradient's length before clipping.

        A gradient that is not finite changes nothing.
        """
        weights = self._weights
        for grad in weights.grads().values():
            distributed.sum_(grad)
        squares = [self._prepare(name, tensor) for name, tensor in weights.trained().items()]
        norm = float(torch.stack(squares).sum().sqrt())
        if norm != norm or norm == float("inf"):
            return norm
        # Adam divides by grad_scale while it reads the gradient: clipping costs no pass of its own
        self.adam.grad_scale = torch.tensor(max(norm / MAX_NORM, 1.0), device=squares[0].device, dtype=torch.float32)  # pyright: ignore
        self.adam.found_inf = torch.zeros((), device=squares[0].device)  # pyright: ignore
        for group in self.adam.param_groups:
            group["lr"] = lr * group["rate"]
        self.adam.step()
        if not weights.derives_W_dec:
            _normalise(weights.W_dec)
        return norm

    def _prepare(self, name: str, tensor: Tensor) -> Tensor:
        """Of W_dec's gradient take away what is along the directions; gives the squared length."""
        grad = tensor.grad
        assert grad is not None, name
        if tensor.ndim == 1:
            return grad.double().square().sum()
        total = torch.zeros((), dtype=torch.float64, device=grad.device)
        for rows, of_rows in zip(grad.split(ROWS_PER_CHUNK), tensor.split(ROWS_PER_CHUNK), strict=True):
            if name == "W_dec":
                rows.addcmul_(torch.linalg.vecdot(rows, of_rows)[:, None], of_rows, value=-1)
            total += torch.linalg.vector_norm(rows, dim=1).square().sum(dtype=torch.float64)
        return total

    def forget(self, names: tuple[str, ...], rows: Tensor) -> None:
        """Begin anew for some rows of some tensors: their moments are 0."""
        for name in names:
            state = self.adam.state.get(self._weights.trained()[name], {})
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in state:
                    state[moment][rows] = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Moments by name, as a checkpoint holds them."""
        found = {}
        for name, tensor in self._weights.trained().items():
            state = self.adam.state[tensor]  # empty before the first step
            found |= {f"{which}.{name}": state.get(key, torch.zeros_like(tensor)) for which, key in _MOMENTS.items()}
        return found

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take what `tensors` gave after so many steps."""
        for name, tensor in self._weights.trained().items():
            done = torch.tensor(float(step), device=tensor.device)
            self.adam.state[tensor] = {"step": done, "exp_avg": tensors[f"first.{name}"], "exp_avg_sq": tensors[f"second.{name}"]}


def _normalise(W_dec: Tensor) -> None:
    for rows in W_dec.split(ROWS_PER_CHUNK):
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
