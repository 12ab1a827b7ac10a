"""How numbers are written in the report, and the interval of a share."""

import math
from collections.abc import Callable

DASH = "–"
"""Where there is none."""


def fixed(value: float | None) -> str:
    """Three decimals, or a dash."""
    return DASH if value is None else f"{value:.3f}".replace("-", "−")


def percent(value: float | None) -> str:
    """Of a share, one decimal; or a dash."""
    return DASH if value is None else f"{100 * value:.1f} %"


def share(part: int, whole: int) -> str:
    """Whole percent."""
    return f"{100 * part / whole:.0f} %"


def interval(low: float | None, high: float | None, write: Callable[[float], str] = fixed) -> str:
    """From low to high, or a dash."""
    return DASH if low is None or high is None else f"{write(low)} to {write(high)}"


def wilson(part: int, whole: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.959964
    found, spread = part / whole, z * z / whole
    middle = (found + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(found * (1 - found) / whole + spread / (4 * whole))
    return middle - half, middle + half
