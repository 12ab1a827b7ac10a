"""Messages about invalid params, which say the key, what came and what is allowed."""

import difflib
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from ommatid.errors import without_credentials


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Describe all problems that pydantic found, in one line.

    Args:
        error: Error of validating values against `root`.
        root: Model whose keys the paths begin with.

    Returns:
        The problems, separated by semicolons and without credentials.
    """
    problems = error.errors(include_url=False)
    inside = {problem["loc"][:n] for problem in problems for n in range(len(problem["loc"]))}
    # pydantic also reports a list with a bad entry as too short, as it counts only the good entries
    sentences = (_explain_one(problem, root) for problem in problems if problem["type"] != "too_short" or problem["loc"] not in inside)
    return without_credentials("; ".join(sentences))


def _explain_one(problem: Any, root: type[BaseModel]) -> str:
    # pydantic puts the tag of a discriminated union into the path: images.source.folder.path -> images.source.path
    path = [str(part) for i, part in enumerate(problem["loc"]) if not (i and part in _tags(root))]
    key = ".".join(path) or "params"
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key; {_known_keys(problem['loc'], root)}"
        case "missing":
            return f"{key}: missing; add it"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"{key}.{problem['ctx']['discriminator'].strip(chr(39))}: {problem['msg']}"
        case "json_invalid":
            return f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
        case "tuple_type" | "list_type":
            return f"{key}: got {problem['input']!r}; input should be a list, such as [1, 2]"
        case "too_short":
            return f"{key}: got {problem['input']!r}; the list should have at least {problem['ctx']['min_length']} entry"
        case "model_type" | "model_attributes_type":
            return f"{key}: got {problem['input']!r}; input should be keys with values, such as {{kind: ...}}"
        case _:
            return f"{key}: got {problem['input']!r}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


@cache
def _tags(root: type[BaseModel]) -> frozenset[str]:
    """Collect the tags of all discriminated unions in the fields of `root`, at any depth."""
    return frozenset(_iter_tags(TypeAdapter(root).core_schema))


def _iter_tags(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if schema.get("type") == "tagged-union":
            yield from schema["choices"]
        for part in schema.values():
            yield from _iter_tags(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            yield from _iter_tags(part)


def _known_keys(loc: tuple[str | int, ...], root: type[BaseModel]) -> str:
    """Return a sentence with the keys allowed in place of an unknown one, the nearest in spelling first."""
    known = _fields_at(loc[:-1], root)
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known here: {', '.join(known)}"


def _fields_at(loc: tuple[str | int, ...], root: type[BaseModel]) -> list[str]:
    models: list[type[BaseModel]] = [root]
    for part in (part for part in loc if isinstance(part, str)):  # indices are skipped, as an entry of a list has the list's types
        if inside := [sub for model in models if part in model.model_fields for sub in _models_in(model.model_fields[part].annotation)]:
            models = inside
        else:  # a tag, which selects the models of a union that have it; the tags "one" and "several" select none
            tagged = [model for model in models if any(part in get_args(field.annotation) for field in model.model_fields.values())]
            models = tagged or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in getattr(annotation, "__args__", ()) for model in _models_in(arg)]
