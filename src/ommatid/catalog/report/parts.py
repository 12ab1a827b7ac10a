"""What the report is made of."""

from dataclasses import dataclass

from ommatid.catalog.report.questions import Question


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
