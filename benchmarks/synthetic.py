"""Synthetic activations, sparse sums of planted directions with noise, identical for this project and for the peers. Needs only torch."""

import torch
from torch import Tensor

N_DIRECTIONS = 4096
"""Number of planted directions."""
PER_TOKEN = 24
"""Number of directions in a token, with weights between 0 and 1."""
NOISE = 0.02
"""Standard deviation of the noise added to each coordinate."""
HELD_OUT = 1_000_000
"""Number of the first held-out batch; batches from here on are never trained on."""


class Synthetic:
    """Batches by number; the same number gives the same batch in every process with the same torch."""

    def __init__(self, d_model: int) -> None:
        self._directions = torch.nn.functional.normalize(torch.randn(N_DIRECTIONS, d_model, generator=_generator(0)), dim=1)

    def batch(self, number: int, n_tokens: int) -> Tensor:
        """Make a batch of tokens (n_tokens, d_model), float32."""
        generator, x = _generator(number + 1), torch.zeros(n_tokens, self._directions.shape[1])
        for _ in range(PER_TOKEN):
            chosen = torch.randint(0, N_DIRECTIONS, (n_tokens,), generator=generator)
            x += self._directions[chosen] * torch.rand(n_tokens, 1, generator=generator)
        return x.add_(torch.randn(x.shape, generator=generator), alpha=NOISE)


def first_of(acts: Tensor, bound: int | None) -> Tensor:
    """Set the activations of all but the first `bound` latents to zero; None keeps all."""
    return acts if bound is None else torch.cat([acts[:, :bound], torch.zeros_like(acts[:, bound:])], dim=1)


def fvu(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """FVU of batches and their reconstructions: squared error divided by squared distance from the mean of all batches."""
    mean = torch.cat([x for x, _ in pairs]).double().mean(0)
    error = sum(float((x - x_hat).double().square().sum()) for x, x_hat in pairs)
    return error / sum(float((x.double() - mean).square().sum()) for x, _ in pairs)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
