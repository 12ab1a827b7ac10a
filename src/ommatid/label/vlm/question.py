"""A question to a server and what can come of it."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Question:
    """What a server is asked."""

    key: str
    """sha256 of what it is about, in what words, and whom it goes to: equal questions have equal answers."""
    schema: dict[str, Any]
    """JSON schema of the answer."""
    parts: Callable[[], Sequence[str | bytes]]
    """Makes the message: texts and JPEGs in order. Called only when the question is asked: drawing costs time."""


@dataclass(frozen=True)
class Said:
    """What a server answered, whatever it is worth."""

    text: str
    """The message; empty where there is none."""
    refusal: str | None
    """What the protocol's field of that name says."""
    finish: str
    """stop, length, content_filter or another of the protocol's reasons."""
    n_tokens: int
    """Asked and answered, as the server counts them; where it does not, an estimate."""


@dataclass(frozen=True)
class Silence:
    """Why there is no answer."""

    status: Literal["failed", "over_budget"]
    detail: str


@dataclass(frozen=True)
class Outcome:
    """Of asking once, with all its tries."""

    reply: Said | Silence
    n_requests: int
    """Requests that were sent; 0: the answer was remembered, or nothing was asked."""
    n_tokens: int
    """Of these requests."""


def make_key(*what: bytes | str, model: str, schema: dict[str, Any]) -> str:
    """sha256 that tells questions apart; parts cannot run into one another, for each is hashed by itself."""
    everything = [*what, model, json.dumps(schema, sort_keys=True)]
    return digest(digest(part).encode() for part in everything)


def digest(parts: bytes | str | Iterable[bytes]) -> str:
    """sha256 in hex of a text or of bytes."""
    match parts:
        case str():
            parts = [parts.encode()]
        case bytes():
            parts = [parts]
    return hashlib.sha256(b"".join(parts)).hexdigest()
