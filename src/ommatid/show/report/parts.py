"""The parts of a report."""

from dataclasses import dataclass

from ommatid.catalog.question import Question
from ommatid.show.about import Headline
from ommatid.show.svg import Plot


@dataclass(frozen=True)
class Table:
    """A table, with its cells as they are written. The first column is text, and the others are numbers."""

    head: tuple[str, ...]
    """Names of the columns."""
    rows: tuple[tuple[str, ...], ...]
    """Cells of each row."""
    strong: int | None = None
    """Index of the row to emphasise, which is the SAE that the report is about; None for none."""


@dataclass(frozen=True)
class ShownFeature:
    """A feature with its strongest images."""

    label: str | None
    """Label of the feature; None if it has none."""
    numbers: tuple[str, ...]
    """Lines of text below the label."""
    picture: bytes
    """The strongest images, as WebP."""
    plot: Plot | None = None
    """A plot beside the images; None for none."""


@dataclass(frozen=True)
class Section:
    """A section of the report, about one thing that was measured."""

    title: str
    """Title of the section."""
    reading: str
    """How to read the section, or why there is nothing to show."""
    question: Question
    """Question whose answer the section shows."""
    picture: bytes | None = None
    """A plot, as PNG; None if there is none."""
    is_wide: bool = False
    """Whether the section takes the whole width of the page."""
    table: Table | None = None
    """A table; None if there is none."""
    features: tuple[ShownFeature, ...] = ()
    """Features with their strongest images."""


@dataclass(frozen=True)
class Report:
    """The report about one SAE."""

    title: str
    """Model and hookpoint."""
    sae: str
    """Name of the SAE in its training."""
    headlines: tuple[Headline, ...]
    """The numbers to read first."""
    facts: tuple[tuple[str, str], ...]
    """Name and value of each fact about the SAE, its data and its code."""
    sections: tuple[Section, ...]
    """The sections, in order."""
    params: str
    """Params of all stages, as YAML."""
