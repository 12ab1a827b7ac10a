"""Text from outside (labels of servers, names of files, cells of answers), made safe to print on a terminal."""

import time
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, assert_never

import typer

from ommatid.events import Event, Listener, Measured, Noticed, Progress, Warned

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


SECONDS = 2.0
"""Between two lines of one kind of work."""
SHOWN = ("fvu", "l0", "dead")
"""Numbers beside a bar."""
RECENT = 30.0
"""Seconds over which a bar's rate is averaged."""


@contextmanager
def showing(out: TextIO, has_several_saes: bool = False) -> Iterator[Listener]:
    """A listener that shows what a stage tells, for as long as the block runs.

    Args:
        out: Where: the standard output.
        has_several_saes: Whether a line must say which SAE it is about.
    """
    if not out.isatty():
        yield Lines(has_several_saes)
        return
    with _open_bars(out) as bars:
        yield _Bar(bars)


def say(text: object) -> None:
    """Print a line on the standard output, with what in it could steer a terminal escaped: names and labels come from outside."""
    typer.echo(printable(str(text)))


class Lines:
    """Prints events as lines, at most one every two seconds for each kind of work; what was noticed at once."""

    def __init__(self, has_several_saes: bool = False) -> None:
        self._has_several_saes = has_several_saes
        self._last: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Print the event, or nothing where its kind was printed just now."""
        match event:
            case Progress():
                self._print(event.what, f"{event.what}: {event.done} of {event.total}", is_last=event.done == event.total)
            case Measured():
                values = " ".join(f"{name} {number(value)}" for name, value in event.values.items())
                whose = f"{event.sae}: " if self._has_several_saes else ""
                self._print(f"measured {event.sae}", f"{whose}step {event.step}: {values}", is_last=False)
            case Noticed() | Warned():
                say(notice(event))
            case _:
                assert_never(event)

    def _print(self, what: str, line: str, is_last: bool) -> None:
        now = time.monotonic()
        if is_last or now - self._last.get(what, 0.0) >= SECONDS:
            self._last[what] = now
            say(line)


class _Bar:
    """One bar for each kind of work, with the last numbers of training beside it."""

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
            case Noticed() | Warned():
                self._bars.console.print(notice(event), markup=False, highlight=False)
            case _:
                assert_never(event)

    def _move(self, event: Progress) -> None:
        if event.what not in self._tasks:
            # what an earlier run had done already says nothing about the speed of this one
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
    """The last numbers of training, by SAE: `fvu 0.31 l0 16 dead 0.02`; of several SAEs the range of each."""
    shown = []
    for key in SHOWN:
        values = [of[key] for of in numbers.values() if key in of]
        if values:
            ends = dict.fromkeys(number(value, 3) for value in (min(values), max(values)))
            shown.append(f"{key} {' to '.join(ends)}")
    return "  ".join(shown)


def notice(event: Noticed | Warned) -> str:
    """The line that says what was noticed."""
    whose = f"{event.sae}: step {event.step}: " if isinstance(event, Noticed) else ""
    return printable(f"notice: {whose}{event.what}")


def number(value: float, digits: int = 4) -> str:
    """So many digits, but never an exponent for what is large."""
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


JOINERS = "\u200c\u200d"
"""Between the letters of some scripts and the parts of some emoji; they steer nothing."""


def printable(text: str, kept: str = "\n\t") -> str:
    r"""`text` with what could steer a terminal or turn its reading direction written as an escape, such as \x1b.

    These are control characters (C0 and C1, such as ESC and CSI), marks of direction and other invisible ones, separators of lines and
    halves of surrogate pairs.

    Args:
        text: Any.
        kept: Control characters that stay.
    """
    if text.isprintable():
        return text
    return text.translate(_Escapes(kept + JOINERS))


class _Escapes(dict[int, str]):
    """What stands for each character, as str.translate asks for it."""

    def __init__(self, kept: str) -> None:
        super().__init__((ord(c), c) for c in kept)

    def __missing__(self, code: int) -> str:
        c = chr(code)
        steers = unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
        self[code] = c.encode("unicode_escape").decode() if steers else c
        return self[code]
