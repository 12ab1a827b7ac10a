"""CSV in and out: what is said now, or the whole history, for spreadsheets, for other tools, and for other logs."""

import csv
import io
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ommatid.errors import ReviewError
from ommatid.reviews.event import ANCHOR, Event, Key, check_identity, clean, clean_who, decode_direction, now
from ommatid.reviews.follow import Followed
from ommatid.reviews.log import Draft, ReviewLog, make_anchor
from ommatid.reviews.state import Feature, State

if TYPE_CHECKING:
    from ommatid.store.filesystem.csv_file import CsvFile, Row

COLUMNS = ("sae", "latent", "name", "rating", "flags", "lists", "comment", "who", "at")
"""Columns of what is said now. A row holds what one person says of one feature, and further comments by that person have further rows."""
HISTORY = ("id", "at", "who", "sae", "latent", "kind", "value", "seen")
"""Columns of the history: the fields of `Event`. Directions are rows of the kind `anchor`."""
_NOTHING = "nothing"
"""What the column `seen` holds if the person had seen that there was no event."""
_LABEL = "label"
"""Another name for the column `name`, as the labeller `human` calls it."""
_FORMULA = "[=+\\-@\t\r＝＋－＠]"
_TO_ESCAPE, _ESCAPED = re.compile(f"'*{_FORMULA}"), re.compile(f"'+{_FORMULA}")
"""Cells that a spreadsheet would compute, and cells that were escaped by an apostrophe so that it does not."""


def to_csv(state: State, followed: Followed | None = None) -> bytes:
    """Export what is said now, in UTF-8 with a byte-order mark and the columns `COLUMNS`.

    Cells that a spreadsheet would take for a formula begin with an apostrophe, which `from_csv` removes.

    Args:
        state: What is said.
        followed: Where the features are in one SAE, whose name and latents are then exported, followed by the orphans; None exports each
            feature under the SAE in which it was reviewed.
    """
    if followed is None:
        features = state.features()
    else:
        features = {(followed.sae, latent): feature for latent, feature in followed.features(state).items()} | followed.orphaned(state)
    return _write(COLUMNS, (row for key, feature in features.items() for row in _iter_rows(key, feature)))


def history_to_csv(state: State) -> bytes:
    """Export all events, also those that were undone, and the directions, so that another log can take them over completely."""
    events = [*state.anchors.values(), *state.events()]
    seen = {None: "", "": _NOTHING}
    fields = ((event.id, event.at, event.who, *event.key, event.kind, event.value, seen.get(event.seen, event.seen)) for event in events)
    return _write(HISTORY, fields)


def _iter_rows(key: Key, feature: Feature) -> Iterator[tuple[object, ...]]:
    """Iterate over the rows of one feature, one person after the other."""
    flags = [event for by in feature.flags.values() for event in by.values()]
    said = [*filter(None, [feature.rename]), *feature.ratings.values(), *flags, *feature.lists.values(), *feature.comments]
    for who in dict.fromkeys(event.who for event in sorted(said, key=lambda event: event.when)):
        own = [event for event in said if event.who == who]
        values = {kind: [event.value for event in own if event.kind == kind] for kind in ("rename", "rate", "flag", "list_add", "comment")}
        first, *more = values["comment"] or [""]
        lists = ["; ".join(map(str, values[kind])) for kind in ("flag", "list_add")]
        at = max(event.at for event in own)
        yield (*key, *(values["rename"] or [""]), *(values["rate"] or [""]), *lists, first, who, at)
        yield from ((*key, "", "", "", "", comment, who, at) for comment in more)


def _write(columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([_escape(str(cell)) for cell in row] for row in rows)
    return text.getvalue().encode("utf-8-sig")


def _escape(cell: str) -> str:
    return f"'{cell}" if _TO_ESCAPE.match(cell) else cell


def _unescape(cell: str) -> str:
    return cell[1:] if _ESCAPED.match(cell) else cell


@dataclass(frozen=True)
class Imported:
    """Result of an import."""

    n_events: int
    """Number of events that were recorded."""
    n_known: int
    """Number of events or statements of the file that were known already, and so were not recorded again."""


def from_csv(
    log: ReviewLog,
    data: bytes,
    who: str,
    saes: Mapping[str, int],
    direction: Callable[[str, int], np.ndarray],
    followed: Followed | None = None,
) -> Imported:
    """Import what `to_csv` or `history_to_csv` wrote, or a file by hand such as one with the columns latent and label.

    Of what is said now, statements that the log has already are not recorded again. Empty cells say nothing, so a file may be filled in bit
    by bit. Of a history, events that the log has already are not recorded again, and new ones keep their time and author.

    Args:
        log: The log to add to.
        data: The file's bytes.
        who: Person who is recorded for rows without one.
        saes: Number of latents of each SAE that there is, by its name in the tables. What is said now may leave out the checksum at the end
            of a name and, if there is one SAE, the column `sae`. Other features are accepted if the log has their directions.
        direction: Returns the direction of a latent of these SAEs, `(d_model,)`.
        followed: Where features are in one of the SAEs, so that what is said of its latents under other SAEs is known; None to ignore.

    Returns:
        How much was recorded.

    Raises:
        ReviewError: The file is not such a CSV file, which names line and column of every problem; nothing is recorded.
    """
    from ommatid.store.filesystem.csv_file import CsvFile  # here, as its package imports pyarrow, which the explorer need not hold

    who = clean_who(who)
    try:
        file = CsvFile(data, (*dict.fromkeys((*COLUMNS, _LABEL, *HISTORY)),), ("latent",))
        if file.unknown_columns:
            raise ValueError(
                f"line 1 has the columns {', '.join(file.columns)}; columns {', '.join(COLUMNS)} are known, or {_LABEL} for name"
            )
        if "kind" in file.columns:
            return _import_history(log, file, saes, direction)
        return _import_state(log, file, who, saes, direction, followed)
    except ReviewError:
        raise
    except ValueError as error:
        raise ReviewError(f"the CSV file was not imported: {error}") from None


def parse_key(row: "Row", saes: Mapping[str, int], known: Collection[Key] = ()) -> Key:
    """Return the feature that a row is about.

    Args:
        row: A row with a column `latent` and, unless there is one SAE, a column `sae`.
        saes: Number of latents of each SAE, by its name in the tables.
        known: Features of other SAEs that are accepted.

    Raises:
        ValueError: There is no such feature; the message names the column.
    """
    latent = row.cells["latent"]
    if latent.isdecimal() and latent.isascii() and (row.cells.get("sae"), int(latent)) in known:
        return row.cells["sae"], int(latent)
    sae = _find(row.cells["sae"], saes) if "sae" in row.cells or len(saes) != 1 else next(iter(saes))
    if not latent.isdecimal() or not latent.isascii() or int(latent) >= saes[sae]:
        raise ValueError(f"column latent: got {latent!r}; {sae} has latents 0 to {saes[sae] - 1}")
    return sae, int(latent)


def _find(given: str, saes: Mapping[str, int]) -> str:
    """Return the SAE's name in the tables, given that name or the part before its checksum."""
    names = {alias: name for name in saes for alias in (name.rpartition("-")[0], name)}
    if not given or given not in names:
        raise ValueError(f"column sae: got {given!r}; this training has {', '.join(saes)}")
    return names[given]


Statement = tuple[str, str | int]
"""A kind of event and its value."""


def _import_state(
    log: ReviewLog,
    file: "CsvFile",
    who: str,
    saes: Mapping[str, int],
    direction: Callable[[str, int], np.ndarray],
    followed: Followed | None,
) -> Imported:
    if not {*COLUMNS[2:7], _LABEL} & {*file.columns}:
        raise ValueError(f"line 1 has the columns {', '.join(file.columns)}; add one of {', '.join(COLUMNS[2:7])}")
    if {"name", _LABEL} <= {*file.columns}:
        raise ValueError("line 1 has the columns name and label, which are the same; keep one")
    if len(saes) != 1 and "sae" not in file.columns:
        raise ValueError(f"line 1 has the columns {', '.join(file.columns)}; it needs sae, for there are {', '.join(saes) or 'no SAEs'}")
    state = log.state()
    drafts: list[Draft] = []
    n_known = 0
    lines: dict[tuple[object, ...], tuple[int, str | int]] = {}
    for row in file:
        row = replace(row, cells={column: _unescape(cell) for column, cell in row.cells.items()})
        with _Problems(file, row):
            key = parse_key(row, saes, state.anchors)
            author = _in_column("who", clean_who, row.cells["who"]) if row.cells.get("who") else who
            feature = followed.feature(state, key[1]) if followed and key[0] == followed.sae else state.feature(key)
            for kind, value in _statements(row.cells):
                one = (key, kind) if kind == "rename" else (key, kind, author) if kind == "rate" else (key, kind, author, value)
                line, first = lines.setdefault(one, (row.line, value))
                if first != value:
                    raise ValueError(f"column latent: latent {key[1]} has another {_NOUNS[kind]} on line {line} already; keep one")
                if line != row.line or _is_said(feature, author, kind, value):
                    n_known += 1
                else:
                    drafts.append(Draft(author, *key, kind, value, direction=lambda key=key: direction(*key)))
    if file.problems:
        raise ValueError(file.problems_text())
    return Imported(len(log.extend(drafts)), n_known)


_NOUNS = {"rename": "name", "rate": "rating"}


class _Problems:
    """Adds the `ValueError` of a block to the problems of a file, with the row's line."""

    def __init__(self, file: "CsvFile", row: "Row") -> None:
        self._file, self._row = file, row

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, ValueError):
            self._file.problems.append(f"line {self._row.line}, {error}")
            return True
        return False


def _in_column(column: str, check: Callable[..., str | int], *values: object) -> str:
    """Return `check(*values)` as text; what it objects to is in a column.

    Raises:
        ValueError: The values are not allowed; the message names the column.
    """
    try:
        return str(check(*values))
    except ReviewError as error:
        raise ValueError(f"column {column}: {str(error).partition(': ')[2]}") from None


def _statements(cells: Mapping[str, str]) -> list[Statement]:
    """Return what the cells of a row say. Empty cells say nothing.

    Raises:
        ValueError: A cell is not allowed; the message names the column.
    """
    found: list[Statement] = []
    for column, kind in (("name", "rename"), (_LABEL, "rename"), ("rating", "rate"), ("comment", "comment")):
        if cell := cells.get(column, ""):
            value = int(cell) if kind == "rate" and re.fullmatch("[0-9]", cell) else cell
            text = _in_column(column, clean, kind, value)
            found.append((kind, int(text) if kind == "rate" else text))
    for column, kind in (("flags", "flag"), ("lists", "list_add")):
        found += [(kind, _in_column(column, clean, kind, item)) for cell in cells.get(column, "").split(";") if (item := cell.strip())]
    return found


def _is_said(feature: Feature, who: str, kind: str, value: str | int) -> bool:
    """Return whether a statement is known already: a name or a list by anyone, anything else by this person."""
    match kind:
        case "rename":
            return feature.name == value
        case "rate":
            return who in feature.ratings and feature.ratings[who].value == value
        case "flag":
            return who in feature.flags.get(str(value), ())
        case "list_add":
            return value in feature.lists
        case _:
            return any((event.who, event.value) == (who, value) for event in feature.comments)


def _import_history(log: ReviewLog, file: "CsvFile", saes: Mapping[str, int], direction: Callable[[str, int], np.ndarray]) -> Imported:
    if missing := [column for column in HISTORY[:-1] if column not in file.columns]:
        raise ValueError(f"line 1 has no column {', '.join(missing)}; a history has {', '.join(HISTORY)}")
    state = log.state()
    events: list[Event] = []
    anchored: dict[Key, Event] = {}
    of_id: dict[str, Event] = {}
    for row in file:
        row = replace(row, cells={column: _unescape(cell) for column, cell in row.cells.items()})
        with _Problems(file, row):
            event = _parse_event(row)
            if event.id in of_id:
                raise ValueError(f"column id: {event.id} is on an earlier line already; keep one")
            of_id[event.id] = event
            if event.kind == ANCHOR:
                anchored.setdefault(event.key, event)
                continue
            undone = state.event(str(event.value)) or of_id.get(str(event.value))
            if event.kind == "undo" and (undone is None or undone.key != event.key):
                raise ValueError(f"column value: there is no event {event.value!r} of this feature above this line, or in the log")
            if event.key not in state.anchors and event.key not in anchored:
                if event.sae not in saes:
                    raise ValueError(f"column sae: the direction of {event.sae} {event.latent} is not known; keep the rows of kind anchor")
                parse_key(row, saes)
                anchored[event.key] = replace(make_anchor(event.key, direction(*event.key)), at=event.at)
            events.append(event)
    if file.problems:
        raise ValueError(file.problems_text())
    n_new = 0

    def make(state: State) -> list[Event]:
        nonlocal n_new
        new = [event for event in events if state.event(event.id) is None]
        n_new = len(new)
        needed = dict.fromkeys(event.key for event in new if event.key not in state.anchors)
        return [*(anchored[key] for key in needed), *new]

    log.record(make)
    return Imported(n_new, len(events) - n_new)


def _parse_event(row: "Row") -> Event:
    """Return the event of a row of a history.

    Raises:
        ValueError: The row is not an event; the message names the column.
    """
    cells = row.cells
    latent = int(cells["latent"]) if re.fullmatch("[0-9]{1,9}", cells["latent"]) else cells["latent"]
    seen = {"": None, _NOTHING: ""}.get(cells.get("seen", ""), cells.get("seen"))
    event = Event(cells["id"], cells["at"], cells["who"], cells["sae"], latent, cells["kind"], cells["value"], seen)  # type: ignore[arg-type]
    try:
        check_identity(event)
    except ValueError as error:
        raise ValueError(f"column {error}") from None
    if event.at > now():
        raise ValueError(f"column at: {event.at} has not come yet; look at the clock of the machine that wrote it")
    if event.kind == ANCHOR:
        decode_direction(event.value)
        return event
    value = int(cells["value"]) if event.kind == "rate" and re.fullmatch("[0-9]", cells["value"]) else cells["value"]
    text = _in_column("value", clean, event.kind, value)
    return replace(event, who=clean_who(event.who), value=int(text) if event.kind == "rate" else text)
