"""What a model's message means: a name, the numbers of some images, or neither."""

import json
import re
from typing import Any

from ommatid.label.labeller import Answer
from ommatid.label.vlm.question import Said

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
