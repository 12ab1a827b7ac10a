"""Capabilities of the hardware."""

from collections.abc import Iterator
from pathlib import Path

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
    """Return the bytes of memory that can still be used: of the GPU, or of the main memory without swapping, as far as a container may."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_iter_free_in_cgroups()])


def _iter_free_in_cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Iterate over the free bytes of the control groups of this process that have a limit, such as that of a container.

    Args:
        root: Where control groups are mounted.
        own: File that names those of this process, in a line `number:controllers:path` each; `0::path` in version 2.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        place = base / path.lstrip("/")
        # The limits of all groups around it hold, too. Inside a container the path may be that outside, of which only the root is seen.
        for group in (place, *(parent for parent in place.parents if parent.is_relative_to(base))):
            try:
                free = int((group / limit).read_text()) - int((group / used).read_text())
                pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group, or no limit, which reads "max"
                continue
            yield max(0, free + int(pages.get("total_inactive_file", pages.get("inactive_file", 0))))  # the kernel drops these pages first
