"""CSV files that people write: one reader, which names the line of whatever is wrong and guesses nothing."""

import csv
import difflib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DELIMITERS = ",;\t"
"""Of them the one that finds most known columns in the first line; spreadsheets write the second in many languages."""
_SHOWN = 10
"""Problems of a file that its error names; the rest are counted."""


@dataclass(frozen=True)
class Row:
    """A line that is not empty."""

    line: int
    """Number of the line where it begins, from 1."""
    cells: dict[str, str]
    """Text by column, without blanks around it."""


class CsvFile:
    """The rows of a CSV file whose first line names its columns.

    Args:
        data: The file's bytes: UTF-8, with or without a mark at the begin.
        known: Columns that mean something.
        needed: Those of them without which the file is none.

    Raises:
        ValueError: not text in UTF-8, no or a wrong first line, quotation marks that do not match; says what, and what is needed.
    """

    def __init__(self, data: bytes, known: Sequence[str], needed: Sequence[str]):
        self._known, self._needed = known, needed
        self._text = _decode(data)
        self._delimiter = max(DELIMITERS, key=lambda delimiter: sum(cell in known for cell in self._header(delimiter)))
        self.columns = self._header(self._delimiter)
        while self.columns and not self.columns[-1]:  # spreadsheets write empty columns; text below such a one is a cell too many
            self.columns.pop()
        self.others = [column for column in self.columns if column not in known]
        """Columns that mean nothing here."""
        self.problems: list[str] = []
        """What is wrong, line by line: complete once all rows are read, and added to by whoever reads them."""
        self._check_columns()

    def __iter__(self) -> Iterator[Row]:
        """The rows below the first line; of one that has another number of cells there is only a problem."""
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
                    mark = {"\t": "tabulator", ";": "semicolon", ",": "comma"}[self._delimiter]
                    todo = f"put a value with a {mark} between quotation marks" if len(cells) > len(self.columns) else "fill in the rest"
                    self.problems.append(f"line {line}, {len(cells)} cells and {len(self.columns)} columns; {todo}")
        except csv.Error as error:
            raise ValueError(f"line {last + 1}, not CSV ({error}); look for a quotation mark that is not closed, or not doubled") from None

    def told(self) -> str:
        """All problems in one line; the first ones of very many."""
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
        """Raises ValueError; the text of a file that names no column of ours is none of a message's business."""
        needs = f"it needs {', '.join(self._needed)}"
        if len(self.others) == len(self.columns):
            meant = [f"; {_meant(name, self._known)}" for name in self.columns if _meant(name, self._known)]
            raise ValueError(f"line 1 names none of the columns {', '.join(self._known)}; {needs}{''.join(meant[:1])}")
        listed = f"line 1 has the columns {', '.join(name if name.isprintable() else repr(name) for name in self.columns)}"
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"{listed}; {needs}, each once")
        if set(self._needed) - set(self.columns):
            raise ValueError(f"{listed}; {needs}")
        absent = [name for name in self._known if name not in self.columns]
        if meant := [found for name in self.others if (found := _meant(name, absent))]:
            raise ValueError(f"{listed}; {meant[0]}")


def _meant(name: str, known: Sequence[str]) -> str:
    """What a column was meant to be called, if it can be told; else nothing."""
    close = difflib.get_close_matches(name.lower().removesuffix("s"), known, 1, 0.65)
    return f"is {close[0]} meant by {name!r}? Write it so" if close else ""


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
