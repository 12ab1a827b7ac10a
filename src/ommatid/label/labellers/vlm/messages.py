"""Questions to a vision-language model, and how its replies are read."""

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
    """Load the sections of `prompts/<name>.md` by heading, as templates with variables such as `$n`."""
    text = (files("ommatid.label") / "prompts" / f"{name}.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^# (\w+)$", text, flags=re.MULTILINE)
    return {heading: Template(body.strip()) for heading, body in zip(parts[::2], parts[1::2], strict=True)}


def prompt_text(prompt: dict[str, Template]) -> str:
    """Return the whole text of a prompt before its variables are filled in, which is part of the key of a cached answer."""
    return "\n".join(f"# {heading}\n{body.template}" for heading, body in prompt.items())


@dataclass(frozen=True)
class Question:
    """A question to the server."""

    key: str
    """sha256 of the images, the prompt, the model and the schema; questions with the same key share their answer."""
    schema: dict[str, Any]
    """JSON schema that the answer must have."""
    parts: Callable[[], Sequence[str | bytes]]
    """Makes the message, texts and JPEGs in order. Called only if the question is sent, because drawing takes time."""


@dataclass(frozen=True)
class Completion:
    """A completion as the server sent it, usable or not."""

    text: str
    """Text of the message; empty if there is none."""
    refusal: str | None
    """Content of the protocol's field `refusal`; None if it is empty."""
    finish: str
    """Content of the protocol's field `finish_reason`, such as stop, length or content_filter."""
    n_tokens: int
    """Number of tokens in prompt and answer as counted by the server, or an estimate if it does not count them."""


@dataclass(frozen=True)
class NoAnswer:
    """The reason why a question got no answer."""

    status: Literal["failed", "over_budget"]
    """Status of the labeller's answer."""
    detail: str
    """The reason in words."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of one question, including all its tries."""

    reply: Completion | NoAnswer
    """The completion, or why there is none."""
    n_requests: int
    """Number of requests sent; 0 if the answer was cached or the question was not asked."""
    n_tokens: int
    """Number of tokens in those requests."""


def make_key(*what: bytes | str, model: str, schema: dict[str, Any]) -> str:
    """Return the key of a question, a sha256. Each part is hashed by itself, so that no two lists of parts give the same bytes."""
    everything = [*what, model, json.dumps(schema, sort_keys=True)]
    return digest(digest(part).encode() for part in everything)


def digest(parts: bytes | str | Iterable[bytes]) -> str:
    """Return the sha256 of a text or of bytes, in hex."""
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
DETECT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"sure": _NUMBERS, "maybe": _NUMBERS},
    "required": ["sure", "maybe"],
    "additionalProperties": False,
}

LONGEST_NAME = 80
"""Largest number of characters in a label; longer ones are sentences."""
NO_NAMES = frozenset(
    ("", "none", "n/a", "na", "null", "nothing", "unknown", "unclear", "no common feature", "no label", "no pattern", "...")
)
"""What models write instead of a label when they find none."""
_REFUSES = re.compile(
    r"(i'?m|i am) (so |very |really )?(sorry|unable|not able)|sorry\b|i (can'?t|cannot|can not|won'?t|will not|must decline)|"
    r"as an ai\b|(i'?m|i am) not (allowed|comfortable)|unable to (help|assist|comply|identify)",
    re.IGNORECASE,
)
_REASONING = re.compile(r"^.*</think(?:ing)?>", re.DOTALL)
"""The reasoning before an answer, which some servers leave in the message."""
_QUOTED = 200
"""Largest number of characters quoted from a message in a detail."""


def read_name(completion: Completion) -> Answer:
    """Read a label from a completion; the detail says what the model saw, or why there is no label."""
    if refused := _refusal(completion):
        return Answer("refused", detail=refused)
    values = _json_in(completion.text)
    label, seen = (values.get(key) for key in ("label", "seen")) if values else (None, None)
    if not isinstance(label, str):
        return Answer("unparsed", detail=_unparsed(completion))
    label, seen = _tidy(label), " ".join(seen.split()) if isinstance(seen, str) else ""
    if _REFUSES.match(label):
        return Answer("refused", detail=_shortened(label))
    if label.lower().rstrip(".") in NO_NAMES:
        return Answer("refused", detail=_shortened(f"saw nothing that the images share: {seen}".rstrip(": ")))
    if len(label) > LONGEST_NAME:
        return Answer("unparsed", detail=_shortened(f"too long for a label, {len(label)} characters: {label}"))
    return Answer("ok", label, _shortened(seen) or None)


def read_detections(completion: Completion, n: int) -> tuple[float, ...] | None:
    """Read which of n images show what a label says: 1 for sure, 0.5 for maybe, 0 for the rest; None if the answer is unusable."""
    values = None if _refusal(completion) else _json_in(completion.text)
    if values is None:
        return None
    sure, maybe = _numbers(values.get("sure"), n), _numbers(values.get("maybe", []), n)
    if sure is None or maybe is None:
        return None
    return tuple(1.0 if i in sure else 0.5 if i in maybe else 0.0 for i in range(1, n + 1))


def _numbers(value: Any, n: int) -> frozenset[int] | None:
    """Return a list of image numbers between 1 and n as a set; None if the value is anything else."""
    is_valid = isinstance(value, list) and all(isinstance(i, int) and 1 <= i <= n for i in value)
    return frozenset(value) if is_valid else None


def _refusal(completion: Completion) -> str | None:
    """Return why the model or its server declined to answer; None if it did not decline."""
    if completion.refusal:
        return _shortened(completion.refusal)
    if completion.finish == "content_filter":
        return "the server's content filter"
    text = _without_reasoning(completion.text)
    return _shortened(text) if _REFUSES.match(text) and _json_in(text) is None else None


def _unparsed(completion: Completion) -> str:
    text = _without_reasoning(completion.text)
    what = f"not the JSON asked for: {_shortened(text)}" if text else "an empty answer"
    return f"cut off: {what}" if completion.finish == "length" else what


def _json_in(text: str) -> dict[str, Any] | None:
    """Return the first JSON object in a message, ignoring any text around it; None if there is none."""
    answer = _without_reasoning(text)
    for start in (found.start() for found in re.finditer(r"\{", answer)):
        try:
            values, _ = json.JSONDecoder().raw_decode(answer, start)
        except (ValueError, RecursionError):
            continue
        return values
    return None


def _without_reasoning(text: str) -> str:
    """Return a message without the reasoning before it."""
    return _REASONING.sub("", text).strip()


def _tidy(label: str) -> str:
    """Return a label on one line, without quotation marks and the full stop at its end."""
    return " ".join(label.split()).strip("\"'`*").removesuffix(".").strip()


def _shortened(text: str) -> str:
    """Return a text on one line, cut to `_QUOTED` characters."""
    line = " ".join(text.split())
    return line if len(line) <= _QUOTED else line[: _QUOTED - 3] + "..."
