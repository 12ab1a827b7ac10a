"""Questions to a vision-language model, and what its replies mean."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any, Literal

from ommatid.label.labellers.base import Answer


@cache
def load_prompt(name: str) -> dict[str, Template]:
    """The sections of `prompts/<name>.md` by heading; `$n` and the like are to be filled in."""
    text = (files("ommatid.label") / "prompts" / f"{name}.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^# (\w+)$", text, flags=re.MULTILINE)
    return {heading: Template(body.strip()) for heading, body in zip(parts[::2], parts[1::2], strict=True)}


def words_of(prompt: dict[str, Template]) -> str:
    """All of a prompt, before anything is filled in: what a remembered answer is an answer to."""
    return "\n".join(f"# {heading}\n{body.template}" for heading, body in prompt.items())


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


NAME_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"seen": {"type": "string"}, "label": {"type": "string"}},
    "required": ["seen", "label"],
    "additionalProperties": False,
}
_NUMBERS = {"type": "array", "items": {"type": "integer"}}
SHOWN_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"sure": _NUMBERS, "maybe": _NUMBERS},
    "required": ["sure", "maybe"],
    "additionalProperties": False,
}

LONGEST_NAME = 80
"""Characters: what is longer is a sentence."""
NO_NAMES = frozenset(
    ("", "none", "n/a", "na", "null", "nothing", "unknown", "unclear", "no common feature", "no label", "no pattern", "...")
)
"""What models write where there is no name."""
_REFUSES = re.compile(
    r"(i'?m|i am) (so |very |really )?(sorry|unable|not able)|sorry\b|i (can'?t|cannot|can not|won'?t|will not|must decline)|"
    r"as an ai\b|(i'?m|i am) not (allowed|comfortable)|unable to (help|assist|comply|identify)",
    re.IGNORECASE,
)
_THOUGHT = re.compile(r"^.*</think(?:ing)?>", re.DOTALL)
"""Some servers leave in the message what a model thinks before it speaks."""
_SHOWN = 200
"""Characters of a message that a detail repeats."""


def read_name(said: Said) -> Answer:
    """The name that was given. Its detail says what the model saw, or why there is no name."""
    if refused := _refusal(said):
        return Answer("refused", detail=refused)
    values = _json_in(said.text)
    label, seen = (values.get(key) for key in ("label", "seen")) if values else (None, None)
    if not isinstance(label, str):
        return Answer("unparsed", detail=_unparsed(said))
    label, seen = _tidy(label), " ".join(seen.split()) if isinstance(seen, str) else ""
    if _REFUSES.match(label):
        return Answer("refused", detail=_shortened(label))
    if label.lower().rstrip(".") in NO_NAMES:
        return Answer("refused", detail=_shortened(f"saw nothing that the images share: {seen}".rstrip(": ")))
    if len(label) > LONGEST_NAME:
        return Answer("unparsed", detail=_shortened(f"not a name but {len(label)} characters: {label}"))
    return Answer("ok", label, _shortened(seen) or None)


def read_shown(said: Said, n: int) -> tuple[float, ...] | None:
    """How far each of n images shows something: 1 for sure, 0.5 for maybe, 0 for the rest; None: no usable answer."""
    values = None if _refusal(said) else _json_in(said.text)
    if values is None:
        return None
    sure, maybe = _numbers(values.get("sure"), n), _numbers(values.get("maybe", []), n)
    if sure is None or maybe is None:
        return None
    return tuple(1.0 if i in sure else 0.5 if i in maybe else 0.0 for i in range(1, n + 1))


def _numbers(found: Any, n: int) -> frozenset[int] | None:
    """Numbers of some of n images; None: it is something else, or about images that were not shown."""
    is_fit = isinstance(found, list) and all(isinstance(i, int) and 1 <= i <= n for i in found)
    return frozenset(found) if is_fit else None


def _refusal(said: Said) -> str | None:
    """Why the model or its server would not answer; None: it did, well or badly."""
    if said.refusal:
        return _shortened(said.refusal)
    if said.finish == "content_filter":
        return "the server's content filter"
    text = _spoken(said.text)
    return _shortened(text) if _REFUSES.match(text) and _json_in(text) is None else None


def _unparsed(said: Said) -> str:
    text = _spoken(said.text)
    what = f"not the JSON asked for: {_shortened(text)}" if text else "an empty answer"
    return f"cut off: {what}" if said.finish == "length" else what


def _json_in(text: str) -> dict[str, Any] | None:
    """The object in a message, whatever stands around it."""
    spoken = _spoken(text)
    for start in (found.start() for found in re.finditer(r"\{", spoken)):
        try:
            values, _ = json.JSONDecoder().raw_decode(spoken, start)
        except (ValueError, RecursionError):
            continue
        return values
    return None


def _spoken(text: str) -> str:
    return _THOUGHT.sub("", text).strip()


def _tidy(label: str) -> str:
    return " ".join(label.split()).strip("\"'`*").removesuffix(".").strip()


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."
