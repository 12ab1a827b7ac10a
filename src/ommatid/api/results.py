"""Results about given images: what they have in common, and the files that they are written to."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ommatid.errors import InputError

if TYPE_CHECKING:
    import pandas
    import torch

    from ommatid.api.pictures import Photograph
    from ommatid.vlm.preprocess import Preprocess

Boxes = tuple[tuple[float, float, float, float], ...]
"""Part of each image that the model sees: (left, top, right, bottom) in pixels of the upright image."""
SUFFIXES = (".png", ".csv", ".json")
"""Endings of the files that results are written to."""
TABLES = (".csv", ".json")
"""Endings of those that answers are written to."""


@dataclass(frozen=True, eq=False)
class Photographs:
    """Images that were given, as the model sees them."""

    names: tuple[str, ...]
    """Name of each image: its path, or its index as text if it had no path."""
    opened: tuple[Image.Image, ...]
    """The images, upright and RGB."""

    def pixels(self, preprocess: "Preprocess") -> "torch.Tensor":
        """Return the model's pixels, uint8 (images, height, width, 3)."""
        import torch

        return torch.from_numpy(np.stack([preprocess(image) for image in self.opened]))

    def boxes(self, preprocess: "Preprocess") -> Boxes:
        """Return the part of each image that the model sees."""
        return tuple(preprocess.box(*image.size) for image in self.opened)

    def drawn(self, boxes: Boxes) -> "list[Photograph]":
        """Return the images for a page, given the part of each that the model sees."""
        from ommatid.api.pictures import Photograph

        return [Photograph(*one) for one in zip(self.names, self.opened, boxes, strict=True)]


@dataclass(frozen=True, eq=False)
class Results(ABC):
    """What was found out about some images: a table, and for most kinds of results a picture."""

    photographs: Photographs
    """The images."""
    sae: str
    """Name of the SAE."""

    @property
    def images(self) -> tuple[str, ...]:
        """Name of each image: its path, or its index as text if it had no path.

        >>> import ommatid
        >>> ommatid.open_run("data").attribute("cat.jpg", ["red"]).images
        ('cat.jpg',)
        """
        return self.photographs.names

    @property
    @abstractmethod
    def warnings(self) -> tuple[str, ...]:
        """What makes the results less sure than they look, a sentence each."""

    @abstractmethod
    def table(self) -> "pandas.DataFrame":
        """List the results."""

    @abstractmethod
    def _about(self) -> dict[str, Any]:
        """Return what a table does not say, as plain values."""

    def save(self, path: str | Path) -> None:
        """Write the table (.csv, or .json with what it is about and the warnings), or the picture (.png), which answers do not have.

        Raises:
            InputError: The path has another ending.
            QueryError: The file cannot be written there.

        >>> import ommatid
        >>> run = ommatid.open_run("data")
        >>> run.attribute("cat.jpg", ["red"]).save("red.csv")
        >>> latent = int(run.encode("cat.jpg").acts[0].argmax())
        >>> run.intervene("cat.jpg", latent, draws=3).save("steered.png")
        """
        from ommatid.show.pictures.page import write_whole

        draw = getattr(self, "draw", None)
        path = check_path(path, SUFFIXES if draw else TABLES)
        match path.suffix.lower():
            case ".csv":
                content = self.table().to_csv(index=False).encode()
            case ".json":
                rows = json.loads(str(self.table().to_json(orient="records")))
                found = {"sae": self.sae, **self._about(), "warnings": list(self.warnings), "rows": rows}
                content = (json.dumps(found, ensure_ascii=False, indent=1) + "\n").encode()
            case _:
                assert draw, path
                content = draw().png()
        write_whole(path, content, "--out")


def check_path(path: str | Path, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """Return a path that results can be written to.

    Raises:
        InputError: Its ending is not one of those given, or a folder is there.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file that ends in {', '.join(suffixes)}")
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{path}: results are written as {', '.join(suffixes)}; give the file one of these endings")
    return path


def listed(values: Any) -> str:
    """List values as words, such as `0, 1 and 2`; at most eight."""
    words = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    if len(words) > 8:
        return f"{', '.join(words[:8])} and {len(words) - 8} more"
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def check_texts(texts: Sequence[str] | None) -> None:
    """Check that texts, if there are any, are a list of them.

    Raises:
        InputError: They are not.
    """
    if texts is not None and (isinstance(texts, str) or not all(isinstance(text, str) for text in texts)):
        raise InputError(f"texts are {texts!r}; give a list of texts, such as ['a truck', 'a ship']")
