"""How numbers are written for readers, in the report and on the explorer's pages."""

import math
import re
from collections.abc import Callable

from ommatid.compute.intervals import Z

DASH = "–"
"""Stands for a missing value."""


def fixed(value: float | None) -> str:
    """Write a number with three decimals, or None as a dash."""
    return DASH if value is None else f"{value:.3f}".replace("-", "−")


def percent(value: float | None) -> str:
    """Write a share as a percentage with one decimal, or None as a dash."""
    return DASH if value is None else f"{100 * value:.1f} %"


def share(part: int, whole: int) -> str:
    """Write a part of a whole as a percentage without decimals."""
    return f"{100 * part / whole:.0f} %"


def interval(low: float | None, high: float | None, write: Callable[[float], str] = fixed) -> str:
    """Write an interval, or a dash if an end is missing."""
    return DASH if low is None or high is None else f"{write(low)} to {write(high)}"


def wilson(part: int, whole: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927)."""
    found, spread = part / whole, Z * Z / whole
    middle = (found + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(found * (1 - found) / whole + spread / (4 * whole))
    return middle - half, middle + half


def signed(value: float | None) -> str:
    """Write a difference with three decimals and its sign, or None as a dash."""
    return DASH if value is None else f"{value:+.3f}".replace("-", "−")


def short(value: float | None) -> str:
    """Write a difference of any size with two significant digits and its sign, or None as a dash."""
    return DASH if value is None else f"{float(f'{value:.1e}'):+.12f}".rstrip("0").rstrip(".").replace("-", "−")


def count(value: int | None) -> str:
    """Write a whole number with separated thousands, or None as a dash."""
    return DASH if value is None else f"{value:,}"


def rate(value: float | None) -> str:
    """Write a share that may be tiny as a percentage with two significant digits, or None as a dash."""
    return DASH if value is None else f"{100 * value:.2g} %"


def in_order(name: str) -> list[str | int]:
    """Return the key by which names of hookpoints are sorted, so that blocks.9 comes before blocks.10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
