"""The tensors of an SAE in training, of scaled activations, and how they begin."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

DATAPOINT_BLEND = 0.8
"""Share of a data point in the initial direction, the rest random (saev)."""
TOKENS_OF_SCALE = 2048
"""On which the encoder's first length is fitted."""


@dataclass
class Weights:
    """Encoder and decoder; W_enc is kept transposed, so that a latent's weights are contiguous in both matrices."""

    W_enc: Tensor
    """(d_sae, d_model): transposed."""
    b_enc: Tensor
    """(d_sae,)"""
    W_dec: Tensor
    """(d_sae, d_out), rows of unit norm."""
    b_dec: Tensor
    """(d_out,)"""
    own: dict[str, Tensor] = field(default_factory=dict)
    """What a variant trains besides."""
    fixed: dict[str, Tensor] = field(default_factory=dict)
    """What a variant needs and does not train."""
    derives_W_dec: bool = False
    """W_dec follows from `own`: it has a gradient, and the optimiser leaves it alone."""

    @property
    def d_sae(self) -> int:
        """Latents."""
        return len(self.b_enc)

    def trained(self) -> dict[str, Tensor]:
        """What the optimiser changes, by name."""
        of_all = {"W_enc": self.W_enc, "b_enc": self.b_enc, "b_dec": self.b_dec}
        return of_all | ({} if self.derives_W_dec else {"W_dec": self.W_dec}) | self.own

    def grads(self) -> dict[str, Tensor]:
        """Gradients of `trained`, by name; kept from step to step."""
        return {name: grad_of(tensor) for name, tensor in self.trained().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name, as a checkpoint holds it."""
        parts = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return parts | {f"own.{k}": v for k, v in self.own.items()} | {f"fixed.{k}": v for k, v in self.fixed.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], derives_W_dec: bool) -> "Weights":
        """What `tensors` gave."""
        parts = {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        own, fixed = ({k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("own.", "fixed."))
        return cls(**parts, own=own, fixed=fixed, derives_W_dec=derives_W_dec)


def grad_of(tensor: Tensor) -> Tensor:
    """The gradient's memory, made when first asked for."""
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad


def make_weights(d_sae: int, x_nd: Tensor, target_nd: Tensor | None, seed: int) -> Weights:
    """Datapoint init (saev): directions are a blend of centred data points and noise, W_enc their clone, b_dec the mean.

    Args:
        d_sae: Latents.
        x_nd: Scaled activations to draw from.
        target_nd: What is to be reconstructed of the same tokens, where that is another (a transcoder): W_dec is made of it.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(x_nd), (d_sae,), generator=generator)
    noise = torch.randn(d_sae, x_nd.shape[1], generator=generator)
    W_enc = _directions(x_nd, chosen, noise)
    if target_nd is None:
        # .clone(): a view of W_dec would tie encoder and decoder together
        return Weights(W_enc.clone(), torch.zeros(d_sae), W_enc, x_nd.mean(0))
    noise = torch.randn(d_sae, target_nd.shape[1], generator=generator)
    W_dec = _directions(target_nd, chosen, noise)
    return Weights(W_enc, torch.zeros(d_sae), W_dec, target_nd.mean(0), fixed={"b_pre": x_nd.mean(0)})


def fit_scale(weights: Weights, x_nd: Tensor, k: int, target_nd: Tensor | None = None) -> None:
    """Scale the encoder so that x̂ of the k largest entries a token has the right length: by Σ x·x̂ / Σ ‖x̂‖² over some tokens.

    Directions that overlap add up: with encoder rows of unit length x̂ is several times too long, and FVU begins far above 1.

    Args:
        weights: W_enc is changed.
        x_nd: Scaled, centred activations.
        k: Latents that fire a token.
        target_nd: What is to be reconstructed of them, centred, where it is another.
    """
    x = x_nd[:TOKENS_OF_SCALE]
    target = x if target_nd is None else target_nd[:TOKENS_OF_SCALE]
    top = (x @ weights.W_enc.T).topk(min(k, weights.d_sae), dim=1)
    x_hat = embedding_bag(top.indices, weights.W_dec, mode="sum", per_sample_weights=top.values.relu())
    squares = float(x_hat.square().sum())
    along = float((target * x_hat).sum())
    if along > 0:
        weights.W_enc.mul_(along / squares)


def _directions(x_nd: Tensor, chosen: Tensor, noise: Tensor) -> Tensor:
    points = normalize(x_nd[chosen] - x_nd.mean(0), dim=1)
    return normalize(DATAPOINT_BLEND * points + (1 - DATAPOINT_BLEND) * normalize(noise, dim=1), dim=1)
