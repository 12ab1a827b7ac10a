"""The tensors of an SAE in training, of scaled activations."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

ROWS_PER_CHUNK = 1024
"""Of a matrix, read while it is in the cache."""


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


def align(weights: Weights, share: float) -> None:
    """Take a share of what is across its direction from each row of W_enc; directions are of unit norm."""
    for of_encoder, of_decoder in zip(weights.W_enc.split(ROWS_PER_CHUNK), weights.W_dec.split(ROWS_PER_CHUNK), strict=True):
        along = torch.linalg.vecdot(of_encoder, of_decoder)[:, None]
        of_encoder.mul_(1 - share).addcmul_(along, of_decoder, value=share)
