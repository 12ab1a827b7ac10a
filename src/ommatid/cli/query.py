"""The output of `ommatid query`: the answer to one query as a table, CSV or JSON."""

import base64
import csv
import io
import json
import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from ommatid.catalog.database import physical_mb
from ommatid.catalog.reader import LEAST_MB, LONGEST_TIMEOUT, Catalog, QueryResult
from ommatid.catalog.sandbox_client import Child
from ommatid.cli.terminal import printable
from ommatid.errors import QueryError

FORMATS = ("table", "csv", "json")
WIDEST = 120
"""Maximum width of a column, in characters, if the output is not a terminal."""
LONGEST_CELL = 2000
"""Number of characters of a text that a table considers; more than any terminal is wide."""
NARROWEST = 8
"""Minimum width of a column, in characters, when columns are squeezed to fit a terminal."""
MOST_ROWS = 10**6
"""Maximum number of rows printed."""
ANSWER_MB = 100
"""Maximum memory of an answer, in MB."""


def answer(
    sql: str,
    catalog: Path,
    output: str,
    max_rows: int,
    timeout: float,
    stream: TextIO,
    memory: int | None = None,
    child: Child | None = None,
) -> None:
    """Print the answer to a query; if it has more than `max_rows` rows, say so on stderr.

    Blobs appear as their sizes in a table and as base64 in CSV and JSON; NaN and infinity are null in JSON. Terminal control characters
    are escaped in tables, and on a terminal in every format; CSV and JSON written elsewhere keep every character.

    Args:
        sql: One SQL statement.
        catalog: The catalogue's DuckDB file.
        output: One of `FORMATS`.
        max_rows: Maximum number of rows printed.
        timeout: Time limit of the statement, in seconds.
        stream: Stream to print on.
        memory: Memory limit of the statement, in MB; None: the default of `Catalog`.
        child: Reader process to use; None starts one.

    Raises:
        QueryError: The query cannot be answered, or an option is out of range.
    """
    _check(output, max_rows, timeout, memory)
    with Catalog(catalog, memory, ANSWER_MB, child=child) as opened:
        found = opened.ask(sql, max_rows=max_rows, timeout=timeout)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    try:
        _write(found, output, stream)
        stream.flush()
    except BrokenPipeError:
        # the reader (`| head`) has gone away; the interpreter flushes once more on exit, which must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return
    except RecursionError:
        raise QueryError("its values are nested too deeply to be printed; unnest them in SQL") from None
    if found.more:
        print(f"… {len(found.rows)} rows shown, more exist; raise --max-rows", file=sys.stderr)


def _check(output: str, max_rows: int, timeout: float, memory: int | None) -> None:
    if output not in FORMATS:
        raise QueryError(f"--format {output!r}: expected {', '.join(FORMATS)}")
    if max_rows < 1:
        raise QueryError(f"--max-rows {max_rows}: expected 1 or more")
    if max_rows > MOST_ROWS:
        raise QueryError(f"--max-rows {max_rows}: expected {MOST_ROWS} or fewer; Catalog.arrow in Python gives larger answers")
    if not 0 < timeout <= LONGEST_TIMEOUT:
        raise QueryError(f"--timeout {timeout:g}: expected seconds, more than 0 and {LONGEST_TIMEOUT:.0f} at most")
    if memory is not None and not LEAST_MB <= memory <= physical_mb():
        raise QueryError(f"--memory-limit {memory}: expected MB, {LEAST_MB} to the {physical_mb()} of this machine")


def _write(found: QueryResult, output: str, stream: TextIO) -> None:
    match output:
        case "table":
            width = shutil.get_terminal_size().columns if stream.isatty() else None
            stream.writelines(line + "\n" for line in _table(found, width))
        case "csv":
            writer = csv.writer(stream, lineterminator="\n")
            shown = printable if stream.isatty() else str
            for row in (found.columns, *found.rows):
                cells = map(_plain, row)
                writer.writerow([shown(cell) if isinstance(cell, str) else cell for cell in cells])
        case _:
            stream.writelines(map(_escape_json, _json(found)) if stream.isatty() else _json(found))


def _json(found: QueryResult) -> list[str]:
    """Format an answer as a list of objects, one per line; a column name that repeats gets a number."""
    names = _unique(found.columns)
    kinds = found.types
    objects = [{n: _value(v, kind) for n, v, kind in zip(names, row, kinds, strict=True)} for row in found.rows]
    lines = [json.dumps(o, ensure_ascii=False, allow_nan=False) for o in objects]
    return ["[\n", ",\n".join(lines), "\n]\n"] if lines else ["[]\n"]


def _escape_json(text: str) -> str:
    """Return equivalent JSON in which terminal control characters are escaped."""
    return "".join(c if printable(c) == c else json.dumps(c)[1:-1] for c in text) if printable(text) != text else text


def _unique(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        n, unique = 1, name
        while unique in found:
            n, unique = n + 1, f"{name}_{n + 1}"
        found.append(unique)
    return found


def _value(value: Any, kind: str = "") -> Any:
    """Convert a value to one that JSON can hold."""
    match value:
        case None | bool() | int():
            return value
        case str():
            return _parsed(value) if kind == "JSON" else value
        case float():
            return value if math.isfinite(value) else None
        case Decimal():
            return float(value)
        case bytes():
            return base64.b64encode(value).decode()
        case list() | tuple():
            return [_value(item) for item in value]
        case dict():
            return {str(key): _value(item) for key, item in value.items()}
        case _:
            return str(value)


def _parsed(text: str) -> Any:
    """Parse JSON text; return the text itself if Python cannot parse it, as with integers of thousands of digits."""
    try:
        return _value(json.loads(text))
    except ValueError:
        return text


def _plain(value: Any) -> Any:
    """Convert a value to one that CSV can hold: nothing for NULL, JSON for lists and structs."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple() | dict():
            return json.dumps(_value(value), ensure_ascii=False)
        case bytes():
            return base64.b64encode(value).decode()
        case _:
            return str(value)


def _table(found: QueryResult, width: int | None) -> list[str]:
    """Format an answer as aligned lines: a header, a rule and the rows, with numbers aligned to the right."""
    cells = [[_cell(value) for value in row] for row in found.rows]
    head = [_line_of(name) for name in found.columns]
    widths = [max(map(_width, column)) for column in zip(head, *cells, strict=True)]
    widths = _fit(widths, width)
    right = [_is_number(kind) for kind in found.types]
    lines = [_line(row, widths, right) for row in (head, ["─" * w for w in widths], *cells)]
    return lines if cells else [*lines, "(no rows)"]


def _is_number(kind: str) -> bool:
    return (not kind.endswith("]") and kind.startswith(("DECIMAL", "DOUBLE", "FLOAT"))) or kind.endswith(("INT", "INTEGER"))


def _cell(value: Any) -> str:
    match value:
        case None:
            return "NULL"
        case bool():
            return str(value).lower()
        case float():
            return _number(value)
        case str():
            return _line_of(value)
        case bytes():
            return f"<{len(value)} bytes>"
        case list() | tuple():
            return "[" + ", ".join(map(_cell, value[:LONGEST_CELL])) + "]"
        case dict():
            return "{" + ", ".join(f"{_cell(key)}: {_cell(item)}" for key, item in islice(value.items(), LONGEST_CELL)) + "}"
        case _:
            return _line_of(str(value))


def _line_of(text: str) -> str:
    """The first LONGEST_CELL characters of a text, on one line."""
    return printable(text[:LONGEST_CELL], kept="")


def _number(value: float) -> str:
    """Format a number with four decimals, or in scientific notation if it is too small or too large for them."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4f}"
    return f"{value:.3e}" if math.isfinite(value) else str(value)


def _width(text: str) -> int:
    """Number of terminal columns that a text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _fit(widths: list[int], total: int | None) -> list[int]:
    """Narrow the widest columns until the table fits in `total` characters."""
    if total is None:
        return [min(width, WIDEST) for width in widths]
    room = total - 2 * (len(widths) - 1)
    if sum(widths) <= room:
        return widths
    limit = max(widths)
    while sum(min(width, limit) for width in widths) > room and limit > NARROWEST:
        limit -= 1
    return [min(width, limit) for width in widths]


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    fitted = [_pad(_cut(cell, width), width, is_right) for cell, width, is_right in zip(cells, widths, right, strict=True)]
    return "  ".join(fitted).rstrip()


def _pad(text: str, width: int, is_right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if is_right else text + space


def _cut(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    kept = text[: width - 1]
    while _width(kept) > width - 1:
        kept = kept[:-1]
    return kept + "…"
