"""Which arithmetic a forward pass runs in."""

from typing import assert_never

import torch
from torch import nn

from ommatid.compute.hardware import product_dtype
from ommatid.vlm import Dtype
from ommatid.vlm.preprocess import Preprocess


def resolve_dtype(dtype: Dtype, device: str) -> torch.dtype:
    """`auto` is bfloat16 where the hardware computes in it, not where it merely emulates it."""
    match dtype:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "auto":
            return product_dtype(torch.device(device))
        case _:
            assert_never(dtype)


def normalise(pixels: torch.Tensor, preprocess: Preprocess, device: str) -> torch.Tensor:
    """From uint8 (batch, H, W, 3) to float32 (batch, 3, H, W) on `device`, channels last in memory.

    channels_last matters tenfold for the convolutions, and is how the bytes lie already.
    """
    mean = torch.tensor(preprocess.mean, device=device)
    std = torch.tensor(preprocess.std, device=device)
    return pixels.to(device).float().sub_(mean).div_(std).permute(0, 3, 1, 2)


def halve_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of linear layers in `dtype`: autocast, which would cast frozen ones anew in every pass, gives the same bits.

    Everything else stays in float32, and with it the residual stream; the patch embedding too, as DINOv3 takes the dtype of its rotary
    angles from there.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.to(dtype)
