"""The picture that models are looked at with before they are believed."""

import numpy as np
from PIL import Image

SHAPES = ((301, 207), (207, 301))
"""Width and height of pictures that are neither square nor even."""


def structured_picture(width: int, height: int) -> Image.Image:
    """A picture in which no two places, directions or channels look alike: three gradients, and edges in three colours."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, (1 - x) * (1 - y)], axis=-1)
    row, col = np.indices((height, width))
    for channel, (step, turn) in enumerate(((13, 0), (17, 1), (23, 2))):
        stripe = (row + turn * col) // step % 4
        pixels[..., channel] = np.where(stripe == channel, 1, np.where(stripe == 3, 0, pixels[..., channel]))
    return Image.fromarray((255 * pixels).astype(np.uint8))
