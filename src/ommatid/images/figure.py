"""A figure: one image of the source `shapes` before it is drawn, all that can be said of it, and what is said."""

from dataclasses import dataclass

import numpy as np

FAMILIES = {
    "round": ("circle", "ring", "crescent"),
    "polygonal": ("triangle", "square", "hexagon"),
    "spiky": ("star", "cross", "arrow"),
}
"""Shapes by family: the first level of the taxonomy, and the second."""
TEMPERATURES = {
    "warm": {"red": (214, 36, 40), "orange": (245, 130, 20), "yellow": (240, 214, 40), "pink": (244, 130, 190)},
    "cool": {"green": (40, 150, 60), "cyan": (50, 200, 214), "blue": (40, 70, 210), "purple": (130, 50, 170)},
}
"""Colours by temperature."""
TEXTURES = ("plain", "striped", "dotted", "checked")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
"""Cells of a grid of 3 x 3, row by row."""
BACKGROUNDS = {"white": 240, "grey": 120, "black": 16}
"""Levels of grey."""

SHAPES = tuple(shape for shapes in FAMILIES.values() for shape in shapes)
COLOURS = {colour: rgb for colours in TEMPERATURES.values() for colour, rgb in colours.items()}

_FAMILY_OF = {shape: family for family, shapes in FAMILIES.items() for shape in shapes}
_TEMPERATURE_OF = {colour: temperature for temperature, colours in TEMPERATURES.items() for colour in colours}


@dataclass(frozen=True)
class Figure:
    """Five factors, drawn independently and all values of one as often, and what varies besides."""

    shape: str
    colour: str
    texture: str
    place: str
    background: str
    scale: float
    """Radius as a share of half a cell, 0.72 to 0.92."""
    turn: float
    """Clockwise, in radians: at most 12 degrees either way."""
    shift: tuple[float, float]
    """Of the centre from that of the cell, right and down, as a share of the room that is left, -1 to 1."""
    phase: tuple[float, float]
    """Of the texture, right and down, as a share of its period, 0 to 1."""
    shade: int
    """Added to the background, -12 to 12."""

    @property
    def family(self) -> str:
        """Of its shape."""
        return _FAMILY_OF[self.shape]

    @property
    def temperature(self) -> str:
        """Of its colour."""
        return _TEMPERATURE_OF[self.colour]

    @property
    def factors(self) -> tuple[str, ...]:
        """All that is true of it, in words: family, shape, temperature, colour, texture, place, background."""
        return self.family, self.shape, self.temperature, self.colour, self.texture, self.place, self.background

    @property
    def taxonomy(self) -> str:
        """Five classes, from the family on: each is a kind of the one before."""
        shape, colour = self.shape, self.colour
        return f"{self.family}/{shape}/{self.temperature} {shape}/{colour} {shape}/{self.texture} {colour} {shape}"

    @property
    def caption(self) -> str:
        """Such as: a striped red circle at the top left on a white background."""
        texture = "" if self.texture == "plain" else f"{self.texture} "
        what = f"{texture}{self.colour} {self.shape}"
        article = "an" if what[0] in "aeiou" else "a"
        where = "in the centre" if self.place == "centre" else f"at the {self.place}"
        return f"{article} {what} {where} on a {self.background} background"


def make_figure(seed: int, number: int) -> Figure:
    """The figure of that number: the same whatever others are made.

    Taken from the generator's raw words, which numpy promises never to change; of the numbers made from them it does not.
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
