"""Capabilities of the hardware."""

import psutil
import torch


def computes_in_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware computes matrix products in bfloat16, rather than emulating them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # These functions are private, but there are no public ones, and pyproject.toml pins torch to 2.13.
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the data type for large matrix products: bfloat16 if the hardware computes in it, and float32 otherwise."""
    return torch.bfloat16 if computes_in_bfloat16(device) else torch.float32


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that can still be used: of the GPU, or of the main memory without swapping."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
