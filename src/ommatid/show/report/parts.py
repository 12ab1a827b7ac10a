"""What the report is made of."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from textwrap import dedent
from typing import Any

from ommatid.catalog.database import quote
from ommatid.catalog.reader import Catalog, QueryResult

DASH = "–"
"""Where there is none."""


def fixed(value: float | None) -> str:
    """Three decimals, or a dash."""
    return DASH if value is None else f"{value:.3f}".replace("-", "−")


def percent(value: float | None) -> str:
    """Of a share, one decimal; or a dash."""
    return DASH if value is None else f"{100 * value:.1f} %"


def share(part: int, whole: int) -> str:
    """Whole percent."""
    return f"{100 * part / whole:.0f} %"


def interval(low: float | None, high: float | None, write: Callable[[float], str] = fixed) -> str:
    """From low to high, or a dash."""
    return DASH if low is None or high is None else f"{write(low)} to {write(high)}"


def wilson(part: int, whole: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.959964
    found, spread = part / whole, z * z / whole
    middle = (found + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(found * (1 - found) / whole + spread / (4 * whole))
    return middle - half, middle + half


@dataclass(frozen=True)
class Question:
    """SQL with its values."""

    sql: str
    """With parameters such as $sae."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Of the parameters: texts and numbers."""

    @property
    def text(self) -> str:
        """As a user can ask it: the values in their places."""
        text = dedent(self.sql).strip()
        for name in sorted(self.values, key=len, reverse=True):
            value = self.values[name]
            text = text.replace(f"${name}", quote(value) if isinstance(value, str) else str(value))
        return text

    def ask(self, catalog: Catalog) -> QueryResult:
        """The answer of a catalogue."""
        return catalog.ask(self.sql, dict(self.values))


@dataclass(frozen=True)
class Headline:
    """One of the first numbers."""

    value: str
    """As written."""
    name: str
    """What it is."""
    meaning: str
    """What to hold it against."""


@dataclass(frozen=True)
class Table:
    """Cells as they are written; the first column is text, the others are numbers."""

    head: tuple[str, ...]
    """Names of the columns."""
    rows: tuple[tuple[str, ...], ...]
    """Cells of each row."""
    strong: int | None = None
    """The row that the report is about."""


@dataclass(frozen=True)
class Shown:
    """A feature with its strongest images."""

    label: str | None
    """None: it has none."""
    numbers: tuple[str, ...]
    """Lines below the label."""
    picture: bytes
    """WebP."""


@dataclass(frozen=True)
class Section:
    """One thing that was measured."""

    title: str
    """What."""
    reading: str
    """How to read it; or, where there is nothing, why."""
    question: Question
    """The SQL behind it."""
    picture: bytes | None = None
    """PNG of a plot."""
    is_wide: bool = False
    """Whether it takes the whole width."""
    table: Table | None = None
    """Where it is one."""
    features: tuple[Shown, ...] = ()
    """As pictures."""


@dataclass(frozen=True)
class Report:
    """All of it."""

    title: str
    """The model and where in it."""
    sae: str
    """The SAE that it is about, by its name in the training."""
    headlines: tuple[Headline, ...]
    """What to read first."""
    facts: tuple[tuple[str, str], ...]
    """What was measured: name and value."""
    sections: tuple[Section, ...]
    """In their order."""
    params: str
    """All params that led here, as YAML."""
