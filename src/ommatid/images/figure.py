"""Drawn images: a figure with known factors, its description in words, and its pixels as PNG.

Shapes lie in the unit circle, with x to the right and y down. Once it is known which points lie inside, pixels are computed in whole
numbers, so that every machine draws the same image.
"""

import math
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

FAMILIES = {
    "round": ("circle", "ring", "crescent"),
    "polygonal": ("triangle", "square", "hexagon"),
    "spiky": ("star", "cross", "arrow"),
}
"""Shapes by family, which are the second and first level of the taxonomy."""
TEMPERATURES = {
    "warm": {"red": (214, 36, 40), "orange": (245, 130, 20), "yellow": (240, 214, 40), "pink": (244, 130, 190)},
    "cool": {"green": (40, 150, 60), "cyan": (50, 200, 214), "blue": (40, 70, 210), "purple": (130, 50, 170)},
}
"""Colours by temperature, as RGB."""
TEXTURES = ("plain", "striped", "dotted", "checked")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
"""Cells of a 3 x 3 grid, row by row."""
BACKGROUNDS = {"white": 240, "grey": 120, "black": 16}
"""Backgrounds, as levels of grey."""

SHAPES = tuple(shape for shapes in FAMILIES.values() for shape in shapes)
COLOURS = {colour: rgb for colours in TEMPERATURES.values() for colour, rgb in colours.items()}

_FAMILY_OF = {shape: family for family, shapes in FAMILIES.items() for shape in shapes}
_TEMPERATURE_OF = {colour: temperature for temperature, colours in TEMPERATURES.items() for colour in colours}


@dataclass(frozen=True)
class Figure:
    """A figure: five factors, each drawn uniformly and independently, and nuisance variables."""

    shape: str
    colour: str
    texture: str
    place: str
    background: str
    scale: float
    """Radius as a share of half a cell, 0.72 to 0.92."""
    turn: float
    """Clockwise rotation in radians, at most 12 degrees either way."""
    shift: tuple[float, float]
    """Offset from the centre of the cell, right and down, as a share of the room around the figure, -1 to 1."""
    phase: tuple[float, float]
    """Phase of the texture, right and down, as a share of its period, 0 to 1."""
    shade: int
    """Levels added to the background, -12 to 12."""

    @property
    def family(self) -> str:
        """Family of the shape."""
        return _FAMILY_OF[self.shape]

    @property
    def temperature(self) -> str:
        """Temperature of the colour."""
        return _TEMPERATURE_OF[self.colour]

    @property
    def factors(self) -> tuple[str, ...]:
        """Words that describe the figure: family, shape, temperature, colour, texture, place and background."""
        return self.family, self.shape, self.temperature, self.colour, self.texture, self.place, self.background

    @property
    def taxonomy(self) -> str:
        """Path of five classes, beginning with the family, each a kind of the one before."""
        shape, colour = self.shape, self.colour
        return f"{self.family}/{shape}/{self.temperature} {shape}/{colour} {shape}/{self.texture} {colour} {shape}"

    @property
    def caption(self) -> str:
        """Caption, such as `a striped red circle at the top left on a white background`."""
        texture = "" if self.texture == "plain" else f"{self.texture} "
        what = f"{texture}{self.colour} {self.shape}"
        article = "an" if what[0] in "aeiou" else "a"
        where = "in the centre" if self.place == "centre" else f"at the {self.place}"
        return f"{article} {what} {where} on a {self.background} background"


def make_figure(seed: int, number: int) -> Figure:
    """Make a figure from the seed and its own number alone.

    The factors come from the raw words of the bit generator, which NumPy promises never to change; it makes no such promise about the
    distributions built on them.
    """
    words = np.random.PCG64([seed, number]).random_raw(12)
    shape, colour, texture, place, background, *rest = (words >> np.uint64(11)).astype(float) * 2.0**-53
    scale, turn, *shift_and_phase, shade = (float(value) for value in rest)
    right, down, phase_right, phase_down = shift_and_phase[:4]
    return Figure(
        _choose(SHAPES, shape),
        _choose(tuple(COLOURS), colour),
        _choose(TEXTURES, texture),
        _choose(PLACES, place),
        _choose(tuple(BACKGROUNDS), background),
        scale=0.72 + 0.2 * scale,
        turn=(2 * turn - 1) * np.pi / 15,
        shift=(2 * right - 1, 2 * down - 1),
        phase=(phase_right, phase_down),
        shade=int(25 * shade) - 12,
    )


def _choose(values: tuple[str, ...], at: float) -> str:
    return values[int(at * len(values))]


def encode_png(pixels: bytes, width: int, height: int) -> bytes:
    """Encode RGB pixels, 3 bytes each and row by row, as PNG.

    The pixels are stored without compression, so that the bytes, and with them the image's id and split, are the same on every machine.
    """
    stride = 3 * width
    assert len(pixels) == stride * height, f"{len(pixels)} bytes are not {width} x {height} RGB pixels"
    lines = b"".join(b"\0" + pixels[start : start + stride] for start in range(0, len(pixels), stride))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


POINTS = 4
"""Number of sampled points along each side of a pixel."""
CELLS = 3
"""Number of cells along each side of the image."""

Points = np.ndarray
"""Coordinates of points, of any shape."""


def draw(figure: Figure, size: int) -> np.ndarray:
    """Draw an image of `size` pixels a side, (size, size, 3) uint8; the figure never leaves its cell of the grid."""
    pixels = np.full((size, size, 3), BACKGROUNDS[figure.background] + figure.shade, np.uint8)
    place, x, y, is_inside = _sample(figure, size)
    is_dark = _is_dark(figure, x / (size / CELLS), y / (size / CELLS))
    pixels[place] = _blend(pixels[0, 0], COLOURS[figure.colour], is_inside, is_dark)
    return pixels


def draw_mask(figure: Figure, size: int) -> np.ndarray:
    """Return which pixels of the image the figure covers at least half of, (size, size) bool."""
    mask = np.zeros((size, size), bool)
    place, *_, is_inside = _sample(figure, size)
    mask[place] = 2 * _count(is_inside) >= POINTS**2
    return mask


def _sample(figure: Figure, size: int) -> tuple[tuple[slice, slice], Points, Points, np.ndarray]:
    """Sample the box around a figure: its rows and columns, x and y of the points in pixels, and whether each lies in the figure."""
    row, column = divmod(PLACES.index(figure.place), CELLS)
    half = size / CELLS / 2
    radius, room = figure.scale * half, (1 - figure.scale) * half
    across, down = (2 * column + 1) * half + figure.shift[0] * room, (2 * row + 1) * half + figure.shift[1] * room
    columns, rows = (slice(math.floor(at - radius), math.ceil(at + radius)) for at in (across, down))
    x, y = (POINTS * at.start + np.arange(POINTS * (at.stop - at.start)) + 0.5 for at in (columns, rows))
    x, y = x / POINTS, y[:, None] / POINTS
    return (rows, columns), x, y, _is_inside(figure, (x - across) / radius, (y - down) / radius)


def _is_inside(figure: Figure, x: Points, y: Points) -> np.ndarray:
    """Whether each point lies in the figure; x and y are relative to its centre, in units of its radius."""
    cos, sin = math.cos(figure.turn), math.sin(figure.turn)
    return _OUTLINES[figure.shape](cos * x + sin * y, cos * y - sin * x)


def _is_dark(figure: Figure, x: Points, y: Points) -> np.ndarray:
    """Whether each point is drawn at half the brightness. The texture has three periods per cell and does not turn with the figure."""
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
    """Average the points of each pixel, rounded to whole levels."""
    light, dark = _count(is_inside & ~is_dark)[..., None], _count(is_inside & is_dark)[..., None]
    of_one = POINTS**2
    total = (of_one - light - dark) * background.astype(int) + light * np.array(colour) + dark * (np.array(colour) // 2)
    return (total + of_one // 2) // of_one


def _count(points: np.ndarray) -> np.ndarray:
    """Count the true points of each pixel."""
    return points.reshape(points.shape[0] // POINTS, POINTS, -1, POINTS).sum((1, 3))


def _crescent(x: Points, y: Points) -> np.ndarray:
    return (x**2 + y**2 < 1) & ((x - 0.5) ** 2 + y**2 > 0.75**2)


def _polygon(n: int, first: float) -> Callable[[Points, Points], np.ndarray]:
    """Return the test of a regular polygon with corners on the unit circle, whose first side faces `first` quarter turns from right."""
    return lambda x, y: _sides(x, y, n, first, math.cos(math.pi / n)) == n


def _star(x: Points, y: Points) -> np.ndarray:
    """Test of a pentagram, which is where a point is inside at least four of the five extended sides of a pentagon."""
    return _sides(x, y, 5, 1, math.cos(2 * math.pi / 5)) >= 4


def _sides(x: Points, y: Points, n: int, first: float, distance: float) -> np.ndarray:
    """Count, for each point, of how many of n lines around the centre it is on the inner side."""
    angles = [(first / 4 + i / n) * 2 * math.pi for i in range(n)]
    return sum((math.cos(angle) * x + math.sin(angle) * y < distance).astype(int) for angle in angles)  # type: ignore[return-value]


def _cross(x: Points, y: Points) -> np.ndarray:
    return ((abs(x) < 0.3) & (abs(y) < 0.95)) | ((abs(y) < 0.3) & (abs(x) < 0.95))


def _arrow(x: Points, y: Points) -> np.ndarray:
    return ((abs(y) < 0.25) & (x > -0.95) & (x < 0.1)) | ((x >= 0) & (abs(y) < 0.9 * (0.98 - x)))


_OUTLINES: Mapping[str, Callable[[Points, Points], np.ndarray]] = {
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
"""Tests of whether points lie in a shape; x and y may have any shapes that broadcast."""
