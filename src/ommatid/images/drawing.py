"""From a figure to pixels: every shape is a set of points, and a pixel's edge is smooth because 16 points of it are asked.

Shapes lie in the unit circle, x to the right and y down; everything from points to pixels is whole numbers.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from ommatid.images.figure import BACKGROUNDS, COLOURS, PLACES, Figure

POINTS = 4
"""Points a side of a pixel."""
CELLS = 3
"""Cells a side of the image."""

Points = np.ndarray


def draw(figure: Figure, size: int) -> np.ndarray:
    """Pixels of the image, (size, size, 3) uint8; the figure never leaves its cell of the grid."""
    pixels = np.full((size, size, 3), BACKGROUNDS[figure.background] + figure.shade, np.uint8)
    row, column = divmod(PLACES.index(figure.place), CELLS)
    half = size / CELLS / 2
    radius, room = figure.scale * half, (1 - figure.scale) * half
    across, down = (2 * column + 1) * half + figure.shift[0] * room, (2 * row + 1) * half + figure.shift[1] * room
    columns, rows = (slice(math.floor(at - radius), math.ceil(at + radius)) for at in (across, down))
    x, y = (POINTS * at.start + np.arange(POINTS * (at.stop - at.start)) + 0.5 for at in (columns, rows))
    x, y = x / POINTS, y[:, None] / POINTS
    is_inside = _is_inside(figure, (x - across) / radius, (y - down) / radius)
    is_dark = _is_dark(figure, x / (2 * half), y / (2 * half))
    pixels[rows, columns] = _blend(pixels[0, 0], COLOURS[figure.colour], is_inside, is_dark)
    return pixels


def _is_inside(figure: Figure, x: Points, y: Points) -> np.ndarray:
    """Which points belong to the figure."""
    cos, sin = math.cos(figure.turn), math.sin(figure.turn)
    return SHAPES[figure.shape](cos * x + sin * y, cos * y - sin * x)


def _is_dark(figure: Figure, x: Points, y: Points) -> np.ndarray:
    """Which points of the figure have half its colour; a texture has three periods in a cell, and does not turn with the figure."""
    u, v = 3 * x + figure.phase[0], 3 * y + figure.phase[1]
    match figure.texture:
        case "striped":
            return (u + v) % 1 < 0.5
        case "dotted":
            return (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.3**2
        case "checked":
            return (u % 1 < 0.5) ^ (v % 1 < 0.5)
        case _:
            return np.zeros(np.broadcast_shapes(u.shape, v.shape), bool)


def _blend(background: np.ndarray, colour: tuple[int, int, int], is_inside: np.ndarray, is_dark: np.ndarray) -> np.ndarray:
    """Pixels as means of their points, rounded."""
    light, dark = (
        points.reshape(points.shape[0] // POINTS, POINTS, -1, POINTS).sum((1, 3))[..., None]
        for points in (is_inside & ~is_dark, is_inside & is_dark)
    )
    of_one = POINTS**2
    total = (of_one - light - dark) * background.astype(int) + light * np.array(colour) + dark * (np.array(colour) // 2)
    return (total + of_one // 2) // of_one


def _crescent(x: Points, y: Points) -> np.ndarray:
    return (x**2 + y**2 < 1) & ((x - 0.5) ** 2 + y**2 > 0.75**2)


def _polygon(n: int, first: float) -> Callable[[Points, Points], np.ndarray]:
    """Regular, with corners on the unit circle; its first side looks `first` quarters of a turn from the right, clockwise."""
    return lambda x, y: _sides(x, y, n, first, math.cos(math.pi / n)) == n


def _star(x: Points, y: Points) -> np.ndarray:
    """Within all five sides of a pentagon, or all but one: the pentagram that its sides make when they go on."""
    return _sides(x, y, 5, 1, math.cos(2 * math.pi / 5)) >= 4


def _sides(x: Points, y: Points, n: int, first: float, distance: float) -> np.ndarray:
    """On the inner side of how many of n lines around the centre."""
    angles = [(first / 4 + i / n) * 2 * math.pi for i in range(n)]
    return sum((math.cos(angle) * x + math.sin(angle) * y < distance).astype(int) for angle in angles)  # type: ignore[return-value]


def _cross(x: Points, y: Points) -> np.ndarray:
    return ((abs(x) < 0.3) & (abs(y) < 0.95)) | ((abs(y) < 0.3) & (abs(x) < 0.95))


def _arrow(x: Points, y: Points) -> np.ndarray:
    return ((abs(y) < 0.25) & (x > -0.95) & (x < 0.1)) | ((x >= 0) & (abs(y) < 0.9 * (0.98 - x)))


SHAPES: Mapping[str, Callable[[Points, Points], np.ndarray]] = {
    "circle": lambda x, y: x**2 + y**2 < 0.95**2,
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.5**2),
    "crescent": _crescent,
    "triangle": _polygon(3, 1),
    "square": _polygon(4, 0),
    "hexagon": _polygon(6, 1),
    "star": _star,
    "cross": _cross,
    "arrow": _arrow,
}
"""Whether points lie in a shape: x and y may be of shapes that broadcast."""
