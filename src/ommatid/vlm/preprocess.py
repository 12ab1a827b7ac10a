"""From an image to the square a model sees, and from that square back to the place in the image."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

Interpolation = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
MAX_PIXELS, MAX_RATIO = 2**22, 16
"""A resized image of more pixels, which are also more than so many times those of the crop, is never made whole: a long panorama."""


@dataclass(frozen=True)
class Preprocess:
    """Resize (one number: the shorter side; two: height and width), crop the centre, and later (pixel - mean) / std.

    Plain numbers, so that a manifest can carry it: `Preprocess(**as_json())`. Calling it does the resize, the crop and the order of the
    channels.
    """

    resize: tuple[int, ...]
    """(shorter side,) in pixels, which keeps the aspect ratio, or (height, width), which does not."""
    crop: tuple[int, int]
    """Height and width of the centre crop, in pixels: the size of what comes out."""
    interpolation: Interpolation
    """The filter of the resize, as Pillow defines it (with antialiasing)."""
    mean: tuple[float, ...]
    """Of the three channels in their order, on the scale of the pixels, 0 to 255."""
    std: tuple[float, ...]
    """Of the three channels in their order, on the scale of the pixels, 0 to 255."""
    channels: Literal["RGB", "BGR"] = "RGB"
    """The order in which the channels leave."""

    def __post_init__(self) -> None:  # lists come back from JSON
        for name in ("resize", "crop", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """An RGB image to uint8 (height, width, 3): Pillow's resize, then the crop, as transformers' image processors do.

        Of long panoramas (see `MAX_PIXELS`) only the box that the crop keeps is resampled. That gives the same pixels but for rounding,
        which differs by one level of 255 in fewer than one value in a hundred, and never makes a huge image of one of 20,000 x 10.
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
        pixels = np.array(small)  # a copy: torch.from_numpy warns about read-only memory
        return pixels if self.channels == "RGB" else np.ascontiguousarray(pixels[..., ::-1])

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part (left, top, right, bottom) of a `width` x `height` image that the model sees, in the image's pixels."""
        rows, cols = self._resized(width, height)
        top, left = (rows - self.crop[0]) // 2, (cols - self.crop[1]) // 2
        x, y = width / cols, height / rows
        return left * x, top * y, min((left + self.crop[1]) * x, width), min((top + self.crop[0]) * y, height)

    def as_json(self) -> Mapping[str, Any]:
        """For a manifest."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if len(self.resize) == 2:
            return self.resize[0], self.resize[1]
        short = self.resize[0]
        longer = int(short * max(width, height) / min(width, height))  # rounds down, as transformers does
        return (longer, short) if height >= width else (short, longer)
