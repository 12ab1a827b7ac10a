"""Data types of a forward pass, and normalisation of its input."""

from typing import assert_never

import torch
from jaxtyping import Float32, UInt8
from torch import nn

from ommatid.compute.hardware import product_dtype
from ommatid.vlm import Dtype
from ommatid.vlm.preprocess import Preprocess


def resolve_dtype(dtype: Dtype, device: str) -> torch.dtype:
    """Return the torch dtype: `auto` is bfloat16 if the hardware computes in it rather than emulating it, and float32 otherwise."""
    match dtype:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "auto":
            return product_dtype(torch.device(device))
        case _:
            assert_never(dtype)


def normalise(
    pixels: UInt8[torch.Tensor, "batch height width 3"], preprocess: Preprocess, device: str
) -> Float32[torch.Tensor, "batch 3 height width"]:
    """Normalise uint8 pixels `(batch, H, W, 3)` to float32 `(batch, 3, H, W)` on a device.

    Channels stay last in memory, which makes convolutions ten times as fast.
    """
    mean = torch.tensor(preprocess.mean, device=device)
    std = torch.tensor(preprocess.std, device=device)
    return pixels.to(device).float().sub_(mean).div_(std).permute(0, 3, 1, 2)


def cast_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of linear layers to `dtype` once. Autocast would convert them in every pass, with the same results.

    All other weights stay in float32, and so does the residual stream. This includes the patch embedding, whose dtype DINOv3 also uses for
    rotary angles.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.to(dtype)
