"""Events: what one person says of one feature at one time, and the line of JSON that the log keeps of it."""

import base64
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Float16

from ommatid.errors import ReviewError

Kind = Literal["rename", "rate", "flag", "unflag", "list_add", "list_remove", "comment", "undo"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What a person can say. An undo names the event that it takes back, and may itself be undone."""
ANCHOR = "anchor"
"""Kind of the event that precedes all others of a feature. Its value is the feature's direction, by which later SAEs are searched."""
FLAGS = {
    "wrong_name": "the name is wrong",
    "polysemantic": "its images show several different things",
    "uninteresting": "it is not worth a look",
    "artefact": "it is an artefact of the images or of the model",
    "offensive": "the name or the images offend",
    "other": "something else, which a comment says",
}
"""Reasons to flag a feature, with their meaning."""
RATINGS = range(1, 6)
"""Ratings, from bad to good."""
LIMITS = {"who": 80, "list": 80, "name": 500, "comment": 10_000}
"""Largest number of characters of each text."""

Key = tuple[str, int]
"""A feature: the SAE's name in the tables, which includes a checksum of its weights, and the latent."""


@dataclass(frozen=True, slots=True)
class Event:
    """What one person says of one feature at one time."""

    id: str
    """32 hexadecimal digits, which no other event has."""
    at: str
    """Time in UTC, ISO 8601 with milliseconds. It never decreases from one event written to a log to the next."""
    who: str
    """Name that the person gave; empty for an anchor."""
    sae: str
    """Name of the SAE in the tables."""
    latent: int
    """Index of the latent."""
    kind: str
    """One of `KINDS`, or `ANCHOR`."""
    value: str | int
    """Name (empty to take the name away), rating, reason of a flag, name of a list, comment, or id of the event that is undone."""
    seen: str | None = None
    """Id of the last event about the feature that the person had seen; empty if there was none, None if it is not known."""
    place: int = -1
    """Position in the log; it decides between events of the same millisecond."""
    seen_until: tuple[str, int] | None = None
    """`when` of the event `seen`; None if it is not known."""

    @property
    def key(self) -> Key:
        """The feature that the event is about."""
        return self.sae, self.latent

    @property
    def when(self) -> tuple[str, int]:
        """The event's rank among all events of the log."""
        return self.at, self.place

    def line(self) -> bytes:
        """Return the event as a line of the log."""
        more: dict[str, Any] = {} if self.seen is None else {"seen": self.seen}
        if self.kind == ANCHOR:
            more["d_model"] = len(decode_direction(self.value))
        values = {"id": self.id, "at": self.at, "who": self.who, "sae": self.sae, "latent": self.latent, "kind": self.kind}
        return json.dumps(values | {"value": self.value} | more, ensure_ascii=False).encode() + b"\n"


def parse_line(line: bytes) -> Event:
    """Return the event of a line of the log.

    Raises:
        ValueError: The line is not an event. It may be torn, or written by a newer version.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON; half a line is what a killed process leaves") from None
    if not isinstance(values, dict):
        raise ValueError("not an event")
    event = Event(**{name: values.get(name) for name in ("id", "at", "who", "sae", "latent", "kind", "value", "seen")})  # type: ignore[arg-type]
    check_identity(event)
    if event.kind != ANCHOR:
        return replace(event, value=clean(event.kind, event.value))
    if (n := len(decode_direction(event.value))) != values.get("d_model"):
        raise ValueError(f"value: a direction of {n} numbers, and d_model is {_shown(values.get('d_model'))}")
    return event


_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_ID = re.compile("[0-9a-f]{32}")


def check_identity(event: Event) -> None:
    """Check everything in an event but its value.

    Raises:
        ValueError: A field is missing or wrong; the message names it.
    """
    if not isinstance(event.id, str) or not _ID.fullmatch(event.id):
        raise ValueError(f"id: got {_shown(event.id)}; 32 hexadecimal digits are expected")
    if not isinstance(event.at, str) or not _TIME.fullmatch(event.at) or not _is_time(event.at):
        raise ValueError(f"at: got {_shown(event.at)}; a time such as 2026-01-31T12:00:00.000Z is expected")
    if not isinstance(event.latent, int) or isinstance(event.latent, bool) or event.latent < 0:
        raise ValueError(f"latent: got {_shown(event.latent)}; a whole number from 0 on is expected")
    if not isinstance(event.sae, str) or not event.sae or has_control(event.sae):
        raise ValueError(f"sae: got {_shown(event.sae)}; the name of an SAE is expected")
    if event.kind not in (*KINDS, ANCHOR):
        raise ValueError(f"kind: got {_shown(event.kind)}; allowed are {', '.join(KINDS)}")
    if event.kind != ANCHOR:
        clean_who(event.who)
    if event.seen is not None and not (isinstance(event.seen, str) and (not event.seen or _ID.fullmatch(event.seen))):
        raise ValueError(f"seen: got {_shown(event.seen)}; the id of an event is expected, or nothing")


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def now() -> str:
    """Return the time as events hold it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def clean(kind: str, value: Any) -> str | int:
    """Return the value of an event as it is kept: texts without white space around them, and names on one line.

    Raises:
        ReviewError: The value is not allowed for events of this kind; the message says what is.
    """
    match kind:
        case "rename":
            return _clean_line("name", value)
        case "rate":
            if isinstance(value, bool) or value not in RATINGS:
                raise ReviewError(f"rating: got {_shown(value)}; allowed are {RATINGS[0]} to {RATINGS[-1]}")
            return int(value)
        case "flag" | "unflag":
            if not isinstance(value, str) or value not in FLAGS:
                raise ReviewError(f"flag: got {_shown(value)}; allowed are {', '.join(FLAGS)}")
            return value
        case "list_add" | "list_remove":
            if not (name := _clean_line("list", value)) or ";" in name:
                raise ReviewError(f"list: got {_shown(value)}; give a name without a semicolon")
            return name
        case "comment":
            if not (text := _clean_text("comment", value)):
                raise ReviewError("comment: is empty; write something, or undo a comment to take it back")
            return text
        case "undo":
            if not isinstance(value, str) or not _ID.fullmatch(value):
                raise ReviewError(f"undo: got {_shown(value)}; the id of an event is expected")
            return value
        case _:
            raise ReviewError(f"kind: got {_shown(kind)}; allowed are {', '.join(KINDS)}")


def clean_who(who: Any) -> str:
    """Return the name of a person as it is kept.

    Raises:
        ReviewError: The name is empty, too long, or contains control characters.
    """
    if not (name := _clean_line("who", who)):
        raise ReviewError("who: is empty; give a name, so that others know who said it")
    return name


def _clean_line(what: str, value: Any) -> str:
    """Return a text on one line, with single blanks between its words."""
    return _clean_text(what, value, is_line=True)


def _clean_text(what: str, value: Any, is_line: bool = False) -> str:
    """Return a text without white space around it, and with a line feed at the end of each line."""
    if not isinstance(value, str):
        raise ReviewError(f"{what}: got {_shown(value)}; a text is expected")
    text = " ".join(value.split()) if is_line else value.replace("\r\n", "\n").replace("\r", "\n").strip()
    if len(text) > LIMITS[what]:
        raise ReviewError(f"{what}: has {len(text):,} characters; at most {LIMITS[what]:,} are allowed")
    if has_control(text if is_line else text.replace("\n", "").replace("\t", "")):
        raise ReviewError(f"{what}: contains a control character, or half of a surrogate pair; remove it")
    return text


def has_control(text: str) -> bool:
    """Return whether a text has control characters, or halves of surrogate pairs, which cannot be written as UTF-8."""
    return not text.isprintable() and any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def _shown(value: Any) -> str:
    """Return a value as an error message quotes it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def encode_direction(direction: Float[np.ndarray, " d_model"]) -> str:
    """Return a direction as text: base64 of `d_model` little-endian float16 numbers, scaled to unit norm. Zeros stay zeros."""
    values = np.asarray(direction, dtype=np.float32)
    assert values.ndim == 1 and len(values) and np.isfinite(values).all(), f"not a direction: {values.shape} {values.dtype}"
    norm = np.linalg.norm(values.astype(np.float64))
    return base64.b64encode((values / (norm or 1.0)).astype("<f2").tobytes()).decode("ascii")


def decode_direction(text: Any) -> Float16[np.ndarray, " d_model"]:
    """Return the direction of an anchor, `(d_model,)` float16.

    Raises:
        ValueError: The text is not a direction.
    """
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2")
    except (ValueError, TypeError):
        raise ValueError("value: not a direction in base64") from None
    if not len(values) or not np.isfinite(values).all():
        raise ValueError("value: not a direction, but empty or not finite")
    return values


def placed(event: Event, place: int, known: Mapping[str, Event]) -> Event:
    """Return the event with its position in the log, and with the rank of the event that its author had seen.

    Args:
        event: The event.
        place: Its position.
        known: Earlier events by id.
    """
    seen = known.get(event.seen) if event.seen else None
    until = ("", -1) if event.seen == "" else seen and seen.when
    return replace(event, place=place, seen_until=until)
