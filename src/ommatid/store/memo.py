"""The cache of text embeddings: arrays that other processes would compute again from the same texts."""

import hashlib
import io
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ommatid.store.caches import TEXTS
from ommatid.store.code import digest_of
from ommatid.store.filesystem import replace_bytes

_SUM = hashlib.sha256().digest_size


def remember(module: str, facts: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array that a function made for the same facts before, in any process, or else let it make the array and keep it.

    A cache that cannot be read or written is no reason to fail, and a damaged file is computed again.

    Args:
        module: Module that computes the array, whose code is one of the facts.
        facts: Everything else that the array depends on to the last bit, in a form that JSON can hold.
        make: Function that computes the array.
    """
    path = TEXTS.folder(Path()) / hashlib.sha256(json.dumps([module, digest_of(module), facts]).encode()).hexdigest()
    with suppress(OSError, ValueError):
        content = path.read_bytes()
        if hashlib.sha256(content[:-_SUM]).digest() == content[-_SUM:]:
            found = np.load(io.BytesIO(content))
            with suppress(OSError):  # it may have been removed since, or belong to somebody else
                os.utime(path)  # by which `ommatid gc` knows that it is used
            return found
    made = make()
    if made.nbytes > TEXTS.bound():
        return made
    file = io.BytesIO()
    np.save(file, made)
    with suppress(OSError):
        replace_bytes(path, file.getvalue() + hashlib.sha256(file.getvalue()).digest())
        for entry in TEXTS.superfluous(TEXTS.by_use(Path())):
            entry.remove()
    return made
