"""The parts of a report, and the formats of its numbers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from textwrap import dedent
from typing import Any

from ommatid.catalog.database import quote
from ommatid.catalog.reader import Catalog, QueryResult

DASH = "–"
"""Stands for a missing value."""


def fixed(value: float | None) -> str:
    """Write a number with three decimals, or None as a dash."""
    return DASH if value is None else f"{value:.3f}".replace("-", "−")


def percent(value: float | None) -> str:
    """Write a share as a percentage with one decimal, or None as a dash."""
    return DASH if value is None else f"{100 * value:.1f} %"


def share(part: int, whole: int) -> str:
    """Write a part of a whole as a percentage without decimals."""
    return f"{100 * part / whole:.0f} %"


def interval(low: float | None, high: float | None, write: Callable[[float], str] = fixed) -> str:
    """Write an interval, or a dash if an end is missing."""
    return DASH if low is None or high is None else f"{write(low)} to {write(high)}"


def wilson(part: int, whole: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927)."""
    z = 1.959964
    found, spread = part / whole, z * z / whole
    middle = (found + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(found * (1 - found) / whole + spread / (4 * whole))
    return middle - half, middle + half


@dataclass(frozen=True)
class Question:
    """A question to the catalogue."""

    sql: str
    """SQL with parameters such as $sae."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Values of the parameters, texts and numbers."""

    @property
    def text(self) -> str:
        """SQL with the values in place of the parameters, so that a user can run it."""
        text = dedent(self.sql).strip()
        for name in sorted(self.values, key=len, reverse=True):
            value = self.values[name]
            text = text.replace(f"${name}", quote(value) if isinstance(value, str) else str(value))
        return text

    def ask(self, catalog: Catalog) -> QueryResult:
        """Return the answer of a catalogue."""
        return catalog.ask(self.sql, dict(self.values))


@dataclass(frozen=True)
class Headline:
    """One of the numbers at the top of the report."""

    value: str
    """The number as it is written."""
    name: str
    """Name of the number, a few words."""
    meaning: str
    """What to compare it with."""


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
