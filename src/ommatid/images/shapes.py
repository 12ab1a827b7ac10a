"""The source `shapes`: drawn images with known factors, for a first run without any data and for comparison with a ground truth."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ommatid.config import ShapesSource, parse_json
from ommatid.errors import ConfigError, SourceError, gist
from ommatid.images.figure import Figure, draw, encode_png, make_figure
from ommatid.images.source import Item

_NO_PLAN = "not a plan with n_images, size and seed"


class Plan(BaseModel):
    """A plan of the images to draw."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    n_images: Annotated[int, Field(ge=1, le=10_000_000)]
    """Number of images; images.limit uses fewer."""
    size: Annotated[int, Field(ge=24, le=1024)]
    """Side of each image in pixels."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Seed of the images."""


def open_source(params: ShapesSource) -> "Shapes":
    """Open the source that the params describe; see `Shapes`."""
    return Shapes(Path(params.path))


class Shapes:
    """The images of a plan. Each is drawn when it is read, from seed and number alone, and is the same on every machine.

    The label is the shape. See `drawing.Figure` for taxonomy and caption.

    Raises:
        SourceError: The file is missing or is not a plan.
    """

    def __init__(self, plan_path: Path):
        self._plan = load_plan(plan_path)
        self.total = self._plan.n_images
        self.fingerprint = self._plan.model_dump_json()
        self.notices: Sequence[str] = ()

    def names(self) -> None:
        """Return None, as its plan fixes the images."""

    def iter_items(self, positions: Sequence[int]) -> Iterator[Item]:
        """Iterate over the images at these positions, in order, as PNG."""
        for position in positions:
            figure = make_figure(self._plan.seed, position)
            read = partial(encode_figure, figure, self._plan.size)
            yield Item(f"{position:07d}.png", read, figure.shape, (figure.caption,), figure.taxonomy)


def load_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        SourceError: The file is missing or is not a plan.
    """
    try:
        return Plan.model_validate(parse_json(path.read_text(encoding="utf-8"), f"{path}: {_NO_PLAN}"))
    except FileNotFoundError:
        raise SourceError(
            f"{path}: no such file; images.source.path names the plan of the images, data/shapes.json in a checkout"
        ) from None
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, problem['loc'])) or 'the whole'}: {problem['msg']}" for problem in error.errors())
        raise SourceError(f"{path}: {_NO_PLAN}: {found}") from None
    except ConfigError as error:
        raise SourceError(f"{error}") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({gist(error)}); images.source.path names a file with n_images, size and seed") from None
    except ValueError as error:
        raise SourceError(f"{path}: {_NO_PLAN}: {gist(error)}") from None


def encode_figure(figure: Figure, size: int) -> bytes:
    """Draw a figure, `size` pixels a side, as PNG."""
    return encode_png(draw(figure, size).tobytes(), size, size)
