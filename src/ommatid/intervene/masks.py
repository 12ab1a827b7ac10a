"""Masks of images: the class of every pixel, read from PNG files or drawn like the figures of the source `shapes`, and reduced to patches.

The value of a pixel is the index of its class; 0 is the background, so a mask of one object has two values. A file `classes.txt` beside
the masks may name the classes, one a line, the background first; pixels of the value 255 then have no class and count for nothing.

Suffixes: n images, p patches.
"""

import hashlib
import io
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from PIL import Image
from torch import Tensor

from ommatid.errors import ConfigError, SourceError
from ommatid.images.decode import MAX_BYTES
from ommatid.images.figure import SHAPES, Figure, draw_mask, make_figure
from ommatid.images.shapes import encode_figure, load_plan
from ommatid.store import Artefact
from ommatid.store.filesystem.listing import CLASSES, Listed, list_masks, some_of
from ommatid.vlm.preprocess import Preprocess

NO_CLASS = 255
"""Value of pixels without a class, if the classes are named."""
MODES = ("1", "L", "P")
"""Modes of PNG files that are masks: one channel of at most 8 bits."""


@dataclass(frozen=True)
class PatchMasks:
    """Masks of images, reduced to the patches that a model sees."""

    numbers: Int64[Tensor, " images"]
    """Number of each image, `(n,)`. Images without a mask are left out."""
    classes: Int64[Tensor, "images patches"]
    """Class of most pixels of each patch, `(n, p)`, the lowest of classes that equally many have; -1 if most pixels have no class. Patches
    are in the order of the model: row by row, from the top left."""
    objects: Float32[Tensor, "images patches"]
    """Share of the pixels of each patch that have a class and are not background, `(n, p)`."""


@dataclass(frozen=True)
class _Sized:
    """An image of the study."""

    path: str
    """Its path in the source."""
    size: tuple[int, int]
    """Its width and height."""
    image_id: str
    """The sha256 of its file."""


class _MaskSource(Protocol):
    """A source of masks."""

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the classes; None if they have none."""
        ...

    def has(self, image: _Sized) -> bool:
        """Whether an image has a mask."""
        ...

    def read(self, image: _Sized) -> UInt8[np.ndarray, "height width"]:
        """Read the mask of an image."""
        ...


class Masks:
    """The masks of a study's images.

    Args:
        place: Folder or URL of the masks; or, of drawn images, their plan: the class of a figure is then its shape.
        images: The images artefact.

    Raises:
        ConfigError: There is no such folder, or no image has a mask in it; or the plan is not that of the images.
    """

    def __init__(self, place: str, images: Artefact) -> None:
        table = images.read("images", ["image", "path", "width", "height", "image_id"]).to_pylist()
        every = {row["image"]: _Sized(row["path"], (row["width"], row["height"]), row["image_id"]) for row in table}
        is_drawn = images.manifest.params["source"]["kind"] == "shapes" and place.endswith(".json")
        self._source: _MaskSource = _Drawn(place, every) if is_drawn else _Files(place, every)
        self.names = self._source.names
        """Names of the classes by index; None if they have none."""
        self._images = {number: image for number, image in every.items() if self._source.has(image)}
        self.n_missing = len(every) - len(self._images)
        """Number of images without a mask."""

    def __contains__(self, number: object) -> bool:
        """Return whether the image of this number has a mask."""
        return number in self._images

    def name(self, index: int) -> str:
        """Return the name of a class, or its index if the classes have no names."""
        return self.names[index] if self.names else str(index)

    def load(self, numbers: Sequence[int], preprocess: Preprocess, grid: tuple[int, int]) -> PatchMasks:
        """Load the masks of images, resized and cropped like the images for the model, but without mixing the values of pixels.

        Args:
            numbers: Numbers of the images; those without a mask are left out.
            preprocess: Preprocessing of the model.
            grid: Rows and columns of the model's patches.

        Returns:
            The masks, in the order of the numbers.

        Raises:
            ConfigError: A mask cannot be read, is not as large as its image, has several channels, or has a value that is not a class.
        """
        nearest, held = replace(preprocess, interpolation="nearest"), [number for number in numbers if number in self._images]
        classes = torch.empty(len(held), grid[0] * grid[1], dtype=torch.int64)
        objects = torch.empty(classes.shape)
        for row, number in enumerate(held):
            seen = nearest(Image.fromarray(self._source.read(self._images[number])))[..., 0]
            counts = _count(seen, grid, 256)
            of_none = counts[:, NO_CLASS:] if self.names else counts[:, :0]
            classes[row] = counts.argmax(1)
            if self.names:
                classes[row][classes[row] == NO_CLASS] = -1
            objects[row] = 1 - (counts[:, 0] + of_none.sum(1)) / counts.sum(1)
        return PatchMasks(torch.tensor(held, dtype=torch.int64), classes, objects)


def _count(mask: UInt8[np.ndarray, "height width"], grid: tuple[int, int], n: int) -> Int64[Tensor, "patches values"]:
    """Count the pixels of each value in each patch, `(p, n)`."""
    row, col = (np.arange(side) * n_patches // side for side, n_patches in zip(mask.shape, grid, strict=True))
    patch = row[:, None] * grid[1] + col
    return torch.from_numpy(np.bincount((patch * n + mask).ravel(), minlength=grid[0] * grid[1] * n).reshape(-1, n))


class _Files:
    """PNG files.

    The mask of an image is the file whose path is the image's own (`images.path`) followed by `.png` or, if there is no such file, the
    image's own with its ending replaced by `.png`: `dog/x.jpg.png` or else `dog/x.png` for `dog/x.jpg`, and `train.parquet#7.png` for the
    image in row 7 of `train.parquet`. It is as large as the upright image.
    """

    def __init__(self, place: str, images: Mapping[int, _Sized]) -> None:
        try:
            files = {file.name: file for file in list_masks(place).files}
        except SourceError as error:
            raise ConfigError(f"intervene.masks: {error}") from None
        self._place = place
        self._of: dict[str, Listed] = {}
        owners: dict[str, str] = {}
        for image in images.values():
            name = next((name for name in _names(image.path) if name in files), None)
            if name is None:
                continue
            if name in owners:
                twice = f"{owners[name]} and {image.path} share the mask {name}"
                raise ConfigError(f"intervene.masks: {place}: {twice}; name their masks {owners[name]}.png and {image.path}.png")
            owners[name], self._of[image.path] = image.path, files[name]
        if not self._of:
            first = next(iter(images.values())).path
            names = " or ".join(dict.fromkeys(_names(first)))
            raise ConfigError(
                f"intervene.masks: {place} has no mask of any image; that of {first} would be {names}, but there are {some_of([*files])}"
            )
        self.names = _read_names(files[CLASSES]) if CLASSES in files else None

    def has(self, image: _Sized) -> bool:
        return image.path in self._of

    def read(self, image: _Sized) -> UInt8[np.ndarray, "height width"]:
        file = self._of[image.path]
        try:
            mask = Image.open(io.BytesIO(file.read(MAX_BYTES)), formats=["PNG"])
            mask.load()
        except Exception as error:  # damaged bytes make decoders raise exceptions of nearly every type
            raise ConfigError(f"intervene.masks: {file} cannot be read as PNG ({type(error).__name__}); save it again") from None
        if mask.mode not in MODES:
            need = "a mask has one channel of at most 8 bits, whose values are the indices of classes"
            raise ConfigError(f"intervene.masks: {file} has the mode {mask.mode}; {need}: save it with the mode L or P")
        if mask.size != image.size:
            sizes = "{} x {} pixels, but {} is {} x {}".format(*mask.size, image.path, *image.size)
            raise ConfigError(f"intervene.masks: {file} is {sizes}; make the mask as large as the upright image")
        values = np.asarray(mask).astype(np.uint8)
        if self.names and len(unknown := np.setdiff1d(values, [*range(len(self.names)), NO_CLASS])):
            known = f"{CLASSES} names the classes 0 to {len(self.names) - 1}, and {NO_CLASS} stands for no class"
            raise ConfigError(f"intervene.masks: {file} has the value {unknown[0]}, but {known}; correct the mask, or name its class")
        return values


class _Drawn:
    """Masks of the figures of a plan, whose classes are the background and the shapes."""

    def __init__(self, place: str, images: Mapping[int, _Sized]) -> None:
        try:
            self._plan = load_plan(Path(place))
        except SourceError as error:
            raise ConfigError(f"intervene.masks: {error}") from None
        self.names = ("background", *SHAPES)
        first = next(iter(images.values()))
        if hashlib.sha256(encode_figure(self._figure(first), self._plan.size)).hexdigest() != first.image_id:
            raise ConfigError(f"intervene.masks: {place} is not the plan of the images; set it to images.source.path, or to null")

    def _figure(self, image: _Sized) -> Figure:
        return make_figure(self._plan.seed, int(Path(image.path).stem))

    def has(self, image: _Sized) -> bool:
        return True

    def read(self, image: _Sized) -> UInt8[np.ndarray, "height width"]:
        figure = self._figure(image)
        return draw_mask(figure, self._plan.size).astype(np.uint8) * (1 + SHAPES.index(figure.shape))


def _names(path: str) -> tuple[str, str]:
    return f"{path}.png", f"{posixpath.splitext(path)[0]}.png"


def _read_names(file: Listed) -> tuple[str, ...]:
    """Read the names of classes.

    Raises:
        ConfigError: The file is not text, has an empty line or one name twice, or has fewer than two or more than 255 names.
    """
    try:
        names = tuple(line.strip() for line in file.read(MAX_BYTES).decode().rstrip().splitlines())
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"intervene.masks: {file} is not text in UTF-8; write one name of a class a line") from None
    if not 2 <= len(names) <= NO_CLASS or "" in names or len(set(names)) < len(names):
        need = f"2 to {NO_CLASS} different names, one a line, the background first"
        raise ConfigError(
            f"intervene.masks: {file} has {len(names)} lines, of which {len(set(names) - {''})} are different names; write {need}"
        )
    return names
