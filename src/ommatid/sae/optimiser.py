"""Adam for the weights of an SAE, with gradient clipping and directions kept at unit norm."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ommatid.compute.checkpoint import State
from ommatid.sae import distributed
from ommatid.sae.weights import ROWS_PER_CHUNK, Weights

MAX_NORM = 1.0
"""Norm of the whole gradient, over all tensors, above which it is clipped."""


_MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}


class Optimiser:
    """Adam(0.9, 0.999) with the recipe of dictionary_learning: gradients clipped to norm 1, directions kept at unit norm."""

    def __init__(self, weights: Weights, rates: Mapping[str, float] | None = None) -> None:
        """Make an optimiser.

        Args:
            weights: Weights to train.
            rates: Learning rates of individual tensors by name, as multiples of the common rate.
        """
        self._weights = weights
        rates = rates or {}
        groups = [{"params": [tensor], "rate": rates.get(name, 1.0)} for name, tensor in weights.trained().items() if name in rates]
        rest = [tensor for name, tensor in weights.trained().items() if name not in rates]
        self.adam = torch.optim.Adam([{"params": rest, "rate": 1.0}, *groups], betas=(0.9, 0.999), fused=True)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Update the weights with their gradients, summed over all ranks. If the gradient is not finite, leave the weights as they are.

        Returns:
            The norm of the gradient before clipping.
        """
        weights = self._weights
        for grad in weights.grads().values():
            distributed.all_reduce(grad)
        squares = [self._prepare(name, tensor) for name, tensor in weights.trained().items()]
        norm = float(torch.stack(squares).sum().sqrt())
        if norm != norm or norm == float("inf"):
            return norm
        # Fused Adam divides by grad_scale as it reads the gradient, so clipping needs no extra pass over memory.
        self.adam.grad_scale = torch.tensor(max(norm / MAX_NORM, 1.0), device=squares[0].device, dtype=torch.float32)  # pyright: ignore
        self.adam.found_inf = torch.zeros((), device=squares[0].device)  # pyright: ignore
        for group in self.adam.param_groups:
            group["lr"] = lr * group["rate"]
        self.adam.step()
        if not weights.derives_W_dec:
            _normalise(weights.W_dec)
        return norm

    def _prepare(self, name: str, tensor: Float[Tensor, "..."]) -> Float64[Tensor, ""]:
        """Remove the part of W_dec's gradient that is parallel to the directions; return the squared norm of a tensor's gradient."""
        grad = tensor.grad
        assert grad is not None, name
        if tensor.ndim == 1:
            return grad.double().square().sum()
        total = torch.zeros((), dtype=torch.float64, device=grad.device)
        for grads, rows in zip(grad.split(ROWS_PER_CHUNK), tensor.split(ROWS_PER_CHUNK), strict=True):
            if name == "W_dec":
                grads.addcmul_(torch.linalg.vecdot(grads, rows)[:, None], rows, value=-1)
            total += torch.linalg.vector_norm(grads, dim=1).square().sum(dtype=torch.float64)
        return total

    def forget(self, names: tuple[str, ...], rows: Int[Tensor, " rows"]) -> None:
        """Reset the moments of some rows of the named tensors to 0."""
        for name in names:
            state = self.adam.state.get(self._weights.trained()[name], {})
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in state:
                    state[moment][rows] = 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Return both moments of each tensor, by name, and the number of steps completed."""
        found = {"step": torch.tensor(0.0)}
        for name, tensor in self._weights.trained().items():
            state = self.adam.state[tensor]  # Empty before the first step.
            found["step"] = state.get("step", found["step"])
            found |= {f"{which}.{name}": state.get(key, torch.zeros_like(tensor)) for which, key in _MOMENTS.items()}
        return found

    def load_state_dict(self, state: State) -> None:
        """Load the state that `state_dict` returned."""
        for name, tensor in self._weights.trained().items():
            moments = {key: state[f"{which}.{name}"].to(tensor.device) for which, key in _MOMENTS.items()}
            self.adam.state[tensor] = {"step": state["step"].to(tensor.device, copy=True), **moments}


def _normalise(W_dec: Float[Tensor, "d_sae d_out"]) -> None:
    for rows in W_dec.split(ROWS_PER_CHUNK):
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
