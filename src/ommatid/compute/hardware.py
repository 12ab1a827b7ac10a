"""What this machine computes in hardware."""

import torch


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are computed by the hardware, not merely emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private in torch 2.13, and there is no public way to ask; torch is pinned to 2.13 in pyproject.
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def product_dtype(device: torch.device) -> torch.dtype:
    """The arithmetic of large matrix products: bfloat16 where the hardware computes in it, else float32."""
    return torch.bfloat16 if computes_in_bfloat16(device) else torch.float32
