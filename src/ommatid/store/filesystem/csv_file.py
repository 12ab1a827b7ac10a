"""A reader of hand-written CSV files, which reports the line of every problem instead of guessing what was meant."""

import csv
import difflib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DELIMITERS = ",;\t"
"""Delimiters to try. The one that yields the most known columns is used: in many languages, spreadsheets write semicolons."""
_SHOWN = 10
"""Number of problems that an error message lists; the rest are counted."""


@dataclass(frozen=True)
class Row:
    """A row that is not empty."""

    line: int
    """Number of the line on which the row begins, counted from 1."""
    cells: dict[str, str]
    """Text of each cell, by column, without leading and trailing white space."""


class CsvFile:
    """The rows of a CSV file, whose first line must name its columns.

    Args:
        data: The file's bytes, in UTF-8 with or without a byte-order mark.
        known: Names of the columns that are used.
        needed: Names of the known columns that the file must have.

    Raises:
        ValueError: The file is not UTF-8, its first line is missing or wrong, or a quotation mark is not closed.
    """

    def __init__(self, data: bytes, known: Sequence[str], needed: Sequence[str]):
        self._known, self._needed = known, needed
        self._text = _decode(data)
        self._delimiter = max(DELIMITERS, key=lambda delimiter: sum(cell in known for cell in self._header(delimiter)))
        self.columns = self._header(self._delimiter)
        while self.columns and not self.columns[-1]:  # Spreadsheets write empty columns. Text in one is reported as an extra cell.
            self.columns.pop()
        self.unknown_columns = [column for column in self.columns if column not in known]
        """Columns that are not used."""
        self.problems: list[str] = []
        """Problems found so far, with their lines. The list is complete once all rows are read. Callers append their own problems."""
        self._check_columns()

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows below the first line. A row with the wrong number of cells is reported in `problems` instead."""
        reader = self._reader(self._delimiter)
        next(reader)
        last = reader.line_num
        try:
            for cells in reader:
                line, last = last + 1, reader.line_num
                if not any(cell.strip() for cell in cells):
                    continue
                while len(cells) > len(self.columns) and not cells[-1].strip():
                    cells.pop()
                if len(cells) == len(self.columns):
                    yield Row(line, {column: cell.strip() for column, cell in zip(self.columns, cells, strict=True)})
                else:
                    mark = {"\t": "tab", ";": "semicolon", ",": "comma"}[self._delimiter]
                    todo = f"put a value with a {mark} between quotation marks" if len(cells) > len(self.columns) else "fill in the rest"
                    self.problems.append(f"line {line}, {len(cells)} cells and {len(self.columns)} columns; {todo}")
        except csv.Error as error:
            raise ValueError(f"line {last + 1}, not CSV ({error}); look for a quotation mark that is not closed, or not doubled") from None

    def problems_text(self) -> str:
        """Return the problems in one line, which lists the first few and counts the rest."""
        more = f"; and {len(self.problems) - _SHOWN} more" if len(self.problems) > _SHOWN else ""
        return "; ".join(self.problems[:_SHOWN]) + more

    def _reader(self, delimiter: str) -> "csv._reader":  # type: ignore[name-defined]
        return csv.reader(io.StringIO(self._text, newline=""), delimiter=delimiter, strict=True)

    def _header(self, delimiter: str) -> list[str]:
        try:
            return [cell.strip() for cell in next(self._reader(delimiter), [])]
        except csv.Error:
            return []

    def _check_columns(self) -> None:
        """Check the first line. If it names no known column, messages do not quote it, because it may not be a header at all.

        Raises:
            ValueError: A needed column is missing, a column occurs twice, or a name looks like a misspelling of a known one.
        """
        needs = f"it needs {', '.join(self._needed)}"
        if len(self.unknown_columns) == len(self.columns):
            hints = [f"; {hint}" for name in self.columns if (hint := _spelling_hint(name, self._known))]
            raise ValueError(f"line 1 names none of the columns {', '.join(self._known)}; {needs}{''.join(hints[:1])}")
        listed = f"line 1 has the columns {', '.join(name if name.isprintable() else repr(name) for name in self.columns)}"
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"{listed}; {needs}, each once")
        if set(self._needed) - set(self.columns):
            raise ValueError(f"{listed}; {needs}")
        absent = [name for name in self._known if name not in self.columns]
        if hints := [hint for name in self.unknown_columns if (hint := _spelling_hint(name, absent))]:
            raise ValueError(f"{listed}; {hints[0]}")


def _spelling_hint(name: str, known: Sequence[str]) -> str:
    """Return a question that suggests the known column nearest to `name`, or an empty string if none is near."""
    close = difflib.get_close_matches(name.lower().removesuffix("s"), known, 1, 0.65)
    return f"is {name!r} meant to be {close[0]}? Then rename it" if close else ""


def _decode(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("is UTF-16, as spreadsheets write Unicode text; save it as CSV in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}, can't decode byte {error.start}: not UTF-8; save it as CSV in UTF-8") from None
    if not text.strip():
        raise ValueError("is empty")
    return text
