"""JSON of other programs with one value changed at a time: another type, missing, negative, huge."""

import json
from collections.abc import Iterator
from itertools import islice, product
from typing import Any

MISSING = object()
VALUES = ("x", -1, 0, 10**12, 2**23, [], {}, True, 1.5, [1, 2, 3, 4], None, float("nan"), MISSING)


def iter_mutated(values: dict[str, Any], step: int = 1) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a description of each change and the changed object: every `step`-th combination of a key at any depth and a value."""
    for place, new in islice(product(_places(values), VALUES), 0, None, step):
        changed = json.loads(json.dumps(values))
        inside = changed
        for name in place[:-1]:
            inside = inside[name]
        if new is MISSING:
            del inside[place[-1]]
        else:
            inside[place[-1]] = new
        yield f"{'.'.join(place)}: {'missing' if new is MISSING else new!r}", changed


def _places(values: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        yield (*before, name)
        if isinstance(value, dict):
            yield from _places(value, (*before, name))
