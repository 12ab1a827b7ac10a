"""Output on a terminal: the progress of a stage, and text from outside with its control characters escaped."""

import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, assert_never

import typer

from ommatid.events import Event, Listener, Measured, Noticed, Progress, Reused, Warned

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

SECONDS = 2.0
"""Minimum number of seconds between two lines about the same kind of work."""
SHOWN = ("fvu", "l0", "dead")
"""Measurements shown beside a progress bar."""
RECENT = 30.0
"""Number of seconds over which a progress bar averages its rate."""


@contextmanager
def showing(out: TextIO, has_several_saes: bool = False) -> Iterator[Listener]:
    """Provide a listener that prints events: as progress bars on a terminal, as lines elsewhere.

    Args:
        out: The standard output.
        has_several_saes: Whether to print the name of the SAE with its measurements.
    """
    if not out.isatty():
        yield Lines(has_several_saes)
        return
    with _open_bars(out) as bars:
        yield _Bar(bars)


def say(text: object) -> None:
    """Print a line on the standard output with terminal control characters escaped, as it may quote names and labels from outside."""
    typer.echo(printable(str(text)))


def align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Format rows of text as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class Lines:
    """Listener that prints events as lines: notices at once, and each kind of work every two seconds at most."""

    def __init__(self, has_several_saes: bool = False) -> None:
        self._has_several_saes = has_several_saes
        self._last: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Print the event, unless one of the same kind was printed within the last two seconds."""
        match event:
            case Progress():
                self._print(event.what, f"{event.what}: {event.done} of {event.total}", is_last=event.done == event.total)
            case Measured():
                values = " ".join(f"{name} {number(value)}" for name, value in event.values.items())
                whose = f"{event.sae}: " if self._has_several_saes else ""
                self._print(f"measured {event.sae}", f"{whose}step {event.step}: {values}", is_last=False)
            case Noticed() | Warned() | Reused():
                say(notice(event))
            case _:
                assert_never(event)

    def _print(self, what: str, line: str, is_last: bool) -> None:
        now = time.monotonic()
        if is_last or now - self._last.get(what, 0.0) >= SECONDS:
            self._last[what] = now
            say(line)


class _Bar:
    """Listener that shows a progress bar for each kind of work, with the latest measurements of training beside it."""

    def __init__(self, bars: "Bars") -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, int] = {}
        self._numbers: dict[str, Mapping[str, float]] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case Progress():
                self._move(event)
            case Measured():
                self._numbers[event.sae] = event.values
            case Noticed() | Warned() | Reused():
                self._bars.console.print(notice(event), markup=False, highlight=False)
            case _:
                assert_never(event)

    def _move(self, event: Progress) -> None:
        if event.what not in self._tasks:
            # a resumed stage starts part-way; work done by the earlier run must not count towards this run's rate
            self._begun[event.what] = event.done
            self._tasks[event.what] = self._bars.add_task(event.what, total=event.total, completed=event.done, numbers="", rate="")
        task = self._bars.tasks[self._tasks[event.what]]
        elapsed = task.elapsed or 0.0
        rate = f"{number((event.done - self._begun[event.what]) / elapsed)}/s" if elapsed > 0 else ""
        self._bars.update(task.id, total=event.total, completed=event.done, numbers=summarise(self._numbers), rate=rate)


def _open_bars(out: TextIO) -> "Bars":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[numbers]}", markup=False),
    )
    return Bars(*columns, console=Console(file=out), refresh_per_second=4, speed_estimate_period=RECENT, expand=True)


def summarise(numbers: Mapping[str, Mapping[str, float]]) -> str:
    """Summarise the latest measurements of each SAE, such as `fvu 0.31 l0 16 dead 0.02`; for several SAEs, as ranges."""
    shown = []
    for key in SHOWN:
        values = [of[key] for of in numbers.values() if key in of]
        if values:
            ends = dict.fromkeys(number(value, 3) for value in (min(values), max(values)))
            shown.append(f"{key} {' to '.join(ends)}")
    return "  ".join(shown)


def notice(event: Noticed | Warned | Reused) -> str:
    """Format a notice, a warning or a count of what was reused as a line."""
    if isinstance(event, Reused):
        return f"{event.found:,} of {event.found + event.computed:,} {event.what} found in the cache, {event.computed:,} computed"
    whose = f"{event.sae}: step {event.step}: " if isinstance(event, Noticed) else ""
    return printable(f"notice: {whose}{event.what}")


def number(value: float, digits: int = 4) -> str:
    """Format a number with `digits` significant digits, but never with an exponent if it is large."""
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


JOINERS = "\u200c\u200d"
"""Zero-width joiners, which some scripts and emoji need and which do not control a terminal."""


def printable(text: str, kept: str = "\n\t") -> str:
    r"""Escape the characters of a text that could control a terminal or change its reading direction, such as \x1b.

    Escaped are control characters (C0 and C1, such as ESC and CSI), direction marks and other invisible format characters, line and
    paragraph separators, and unpaired surrogates.

    Args:
        text: Any text.
        kept: Control characters to leave as they are.

    Returns:
        The text with escapes such as \x1b in place of those characters.
    """
    if text.isprintable():
        return text
    return text.translate(_Escapes(kept + JOINERS))


class _Escapes(dict[int, str]):
    """Lazy translation table for `str.translate`, which maps each character to itself or to its escape."""

    def __init__(self, kept: str) -> None:
        super().__init__((ord(c), c) for c in kept)

    def __missing__(self, code: int) -> str:
        c = chr(code)
        is_control = unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
        self[code] = c.encode("unicode_escape").decode() if is_control else c
        return self[code]
