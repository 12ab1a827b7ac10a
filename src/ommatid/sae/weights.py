"""The weights of an SAE in training, which apply to scaled activations."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

ROWS_PER_CHUNK = 1024
"""Number of rows of a matrix processed at a time, so that they stay in the cache."""


@dataclass
class Weights:
    """Weights of encoder and decoder. W_enc is stored transposed, so that a latent's weights are contiguous in both matrices."""

    W_enc: Float[Tensor, "d_sae d_model"]
    """Transposed encoder, `(d_sae, d_model)`."""
    b_enc: Float[Tensor, " d_sae"]
    """Bias of the encoder, `(d_sae,)`."""
    W_dec: Float[Tensor, "d_sae d_out"]
    """Decoder directions, `(d_sae, d_out)`, unit norm."""
    b_dec: Float[Tensor, " d_out"]
    """Bias of the decoder, `(d_out,)`."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Additional trained tensors of one variant, by name."""
    fixed: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that the optimiser does not update, by name."""
    derives_W_dec: bool = False
    """Whether W_dec is computed from `extra` and `fixed`. It then has a gradient, but the optimiser does not update it."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.b_enc)

    def trained(self) -> dict[str, Tensor]:
        """Return the tensors that the optimiser updates, by name."""
        of_all = {"W_enc": self.W_enc, "b_enc": self.b_enc, "b_dec": self.b_dec}
        return of_all | ({} if self.derives_W_dec else {"W_dec": self.W_dec}) | self.extra

    def grads(self) -> dict[str, Tensor]:
        """Return the gradients of the trained tensors, by name. They keep their memory from step to step."""
        return {name: grad_of(tensor) for name, tensor in self.trained().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, as a checkpoint holds them."""
        parts = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return parts | {f"extra.{k}": v for k, v in self.extra.items()} | {f"fixed.{k}": v for k, v in self.fixed.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], derives_W_dec: bool) -> "Weights":
        """Make weights from the tensors of a checkpoint, as `tensors` returned them."""
        parts = {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        extra, fixed = ({k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("extra.", "fixed."))
        return cls(**parts, extra=extra, fixed=fixed, derives_W_dec=derives_W_dec)


def grad_of(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return a tensor's gradient, allocating it on first use."""
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad


def align(weights: Weights, share: float) -> None:
    """Remove a share of each W_enc row's component orthogonal to the latent's direction. Directions have unit norm."""
    for rows, directions in zip(weights.W_enc.split(ROWS_PER_CHUNK), weights.W_dec.split(ROWS_PER_CHUNK), strict=True):
        along = torch.linalg.vecdot(rows, directions)[:, None]
        rows.mul_(1 - share).addcmul_(along, directions, value=share)
