"""Cases to label: small images of known colours, with heat in a known place."""

import io

import numpy as np
from PIL import Image

from ommatid.label.labellers.base import Case, Example


def encode(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def two_halves(image: int) -> bytes:
    """Encode an image that is red on the left and blue on the right; one corner pixel makes it unique."""
    pixels = np.zeros((48, 48, 3))
    pixels[:, :24, 0] = pixels[:, 24:, 2] = 220
    pixels[0, 0] = image // 256, image % 256, 0
    return encode(pixels)


def green(image: int) -> bytes:
    pixels = np.zeros((48, 48, 3))
    pixels[:, :, 1] = 160
    pixels[0, 0] = image // 256, image % 256, 0
    return encode(pixels)


LEFT = np.array([[1.0, 0, 0, 0]] * 4, np.float32)
"""Heat of a latent that fires at the left edge."""


def make_case(latent: int, n_firing: int = 5, n_silent: int = 4, heat: np.ndarray | None = LEFT) -> Case:
    """Make a case of a latent; different latents have different images."""
    first = 10 * latent
    firing = tuple(Example(first + i, two_halves(first + i), 2.0 - 0.1 * i, heat) for i in range(n_firing))
    return Case(latent, firing, tuple(Example(first + i, green(first + i), 0.0, None) for i in range(n_silent)))
