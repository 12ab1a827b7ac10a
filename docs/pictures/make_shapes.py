"""Draws docs/pictures/shapes.png, a sheet with the first 24 images of the source `shapes`."""

from pathlib import Path

import numpy as np
from PIL import Image

from ommatid.images.figure import draw, make_figure
from ommatid.images.shapes import load_plan

PICTURES = Path(__file__).parent
ROWS, COLUMNS, GAP, ZOOM = 3, 8, 4, 2


def make_sheet() -> np.ndarray:
    """Arrange the images row by row on white, as an array (height, width, 3), uint8."""
    plan = load_plan(PICTURES.parents[1] / "data/shapes.json")
    step = plan.size + GAP
    sheet = np.full((ROWS * step - GAP, COLUMNS * step - GAP, 3), 255, np.uint8)
    for number in range(ROWS * COLUMNS):
        top, left = (place * step for place in divmod(number, COLUMNS))
        sheet[top : top + plan.size, left : left + plan.size] = draw(make_figure(plan.seed, number), plan.size)
    return sheet.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)


if __name__ == "__main__":
    Image.fromarray(make_sheet()).save(PICTURES / "shapes.png", optimize=True)
