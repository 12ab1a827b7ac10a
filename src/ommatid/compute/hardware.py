"""Capabilities of the hardware, and what its results depend on."""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

_ARITHMETIC = re.compile("ATEN|CUBLAS|CUDNN|DNNL|FBGEMM|KMP_DETERMINISTIC|MKL|NVIDIA_TF32|ONEDNN|TORCH")
"""Prefixes of environment variables that may change the last bits of what is computed."""


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


@cache
def arithmetic(device: str) -> list[Any]:
    """Describe what decides the last bits of a result on this machine, besides the code and data: libraries, processors and settings."""
    libraries = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "numpy")]
    settings = {name: value for name, value in os.environ.items() if _ARITHMETIC.match(name) and "NUM_THREADS" not in name}
    facts: list[Any] = [libraries, torch.__config__.show(), sorted(settings.items()), platform.machine(), _processor()]
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts += [properties.name, properties.major, properties.minor, properties.multi_processor_count, torch.backends.cudnn.version()]
        facts += [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    return facts


def _processor() -> list[str]:
    """Return vendor, family, model and instruction sets of the processor."""
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        wanted = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part", "cache size")
        return [line for line in first.splitlines() if line.partition(":")[0].strip() in wanted]
    return [platform.processor()]
