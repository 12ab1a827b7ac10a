"""Preprocessing: conversion of an image to the pixels that a model sees, and the box in the image from which they come."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Interpolation = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
MAX_PIXELS, MAX_RATIO = 2**22, 16
"""A resized image with more than MAX_PIXELS pixels, and more than MAX_RATIO times as many as the crop, is never made as a whole."""


@dataclass(frozen=True)
class Preprocess:
    """A resize and a centre crop, and the mean and standard deviation with which pixels are normalised later.

    Calling it resizes and crops an image and orders its channels; normalisation takes place on the model's device. All fields are plain
    numbers, so that a manifest can store them: `Preprocess(**preprocess.as_json())` restores it.
    """

    resize: tuple[int, ...]
    """Target of the resize in pixels: (shorter side,), which keeps the aspect ratio, or (height, width), which does not."""
    crop: tuple[int, int]
    """Height and width of the centre crop in pixels, which is the size of the output."""
    interpolation: Interpolation
    """Filter of the resize, as Pillow defines it (with antialiasing)."""
    mean: tuple[float, ...]
    """Mean of each channel, in the order of `channels`, on the scale of pixels from 0 to 255."""
    std: tuple[float, ...]
    """Standard deviation of each channel, in the order of `channels`, on the scale of pixels from 0 to 255."""
    channels: Literal["RGB", "BGR"] = "RGB"
    """Order of the channels in the output."""

    def __post_init__(self) -> None:  # Values from JSON are lists.
        for name in ("resize", "crop", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def __call__(self, image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
        """Convert an image to uint8 pixels `(height, width, 3)` by Pillow's resize and a crop, as the processors of transformers do.

        For long panoramas (see `MAX_PIXELS`), such as 20,000 x 10, only the box that the crop keeps is resampled, so that no huge image is
        made. The pixels are the same except for rounding: fewer than one value in a hundred differs, by one level of 255.
        """
        height, width = self.crop
        rows, cols = self._resized(*image.size)
        filter_ = Image.Resampling[self.interpolation.upper()]
        image = image if image.mode == "RGB" else image.convert("RGB")
        if rows * cols > max(MAX_PIXELS, MAX_RATIO * height * width):
            small = image.resize((width, height), filter_, box=self.box(*image.size))
        else:
            top, left = (rows - height) // 2, (cols - width) // 2
            small = image.resize((cols, rows), filter_).crop((left, top, left + width, top + height))
        pixels = np.array(small)  # A copy, because torch.from_numpy warns about read-only memory.
        return pixels if self.channels == "RGB" else np.ascontiguousarray(pixels[..., ::-1])

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return the part of a `width` x `height` image that the model sees: (left, top, right, bottom) in pixels of the image."""
        rows, cols = self._resized(width, height)
        top, left = (rows - self.crop[0]) // 2, (cols - self.crop[1]) // 2
        x, y = width / cols, height / rows
        return left * x, top * y, min((left + self.crop[1]) * x, width), min((top + self.crop[0]) * y, height)

    def as_json(self) -> Mapping[str, Any]:
        """Return the fields as values that JSON can hold, for a manifest."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if len(self.resize) == 2:
            return self.resize[0], self.resize[1]
        short = self.resize[0]
        longer = int(short * max(width, height) / min(width, height))  # Rounded down, as in transformers.
        return (longer, short) if height >= width else (short, longer)
