"""What a machine lacks or refuses, told from the errors of whatever library met it: by cause, not by the type of the exception."""

import errno
import os
import re
from collections.abc import Iterator
from enum import Enum

from ommatid.errors import OmmatidError

LONGEST = 200
"""Characters of a library's own message that are passed on."""


class Lack(Enum):
    """What is lacking; its value says it in words, and what to do about it."""

    SPACE = ("the disk is full", "make room")
    QUOTA = ("the disk quota is used up", "make room, or have the quota raised")
    FILE_SIZE = ("a file became larger than is allowed here", "raise the limit (`ulimit -f`), or use another file system")
    READ_ONLY = ("read-only file system", "use a folder that can be written to")
    DENIED = ("permission denied", "give this user the right to it")
    FILES = ("too many files are open", "raise the limit (`ulimit -n`)")
    DISK = ("the disk cannot be read or written (input/output error)", "look at the disk's health (`dmesg`), and use another one")
    MEMORY = ("the memory does not suffice", "use less of it, or a machine with more")
    DEVICE_MEMORY = ("the GPU's memory does not suffice", "use less of it, or a GPU with more")
    THREADS = ("no thread or process can be started", "raise the limits of memory and processes (`ulimit -v`, `ulimit -u`)")


_BY_NUMBER = {
    errno.ENOSPC: Lack.SPACE,
    errno.EDQUOT: Lack.QUOTA,
    errno.EFBIG: Lack.FILE_SIZE,
    errno.EROFS: Lack.READ_ONLY,
    errno.EACCES: Lack.DENIED,
    errno.EPERM: Lack.DENIED,
    errno.EMFILE: Lack.FILES,
    errno.ENFILE: Lack.FILES,
    errno.EIO: Lack.DISK,
    errno.ENOMEM: Lack.MEMORY,
}
_NUMBER = re.compile(r"(?:os error|errno) (\d+)\b", re.IGNORECASE)
"""As Rust's libraries (safetensors, tokenizers) and pyarrow give the system's error number."""
_BY_TEXT = (
    (Lack.DEVICE_MEMORY, ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")),
    # in the words of SQLite, DuckDB, numpy and torch, of which the last two do not say why a write fell short
    (Lack.SPACE, ("database or disk is full", "max_temp_directory_size", " requested and ", ". unexpected pos ")),
    (Lack.DISK, ("disk I/O error",)),
    (Lack.READ_ONLY, ("attempt to write a readonly database",)),
    (Lack.THREADS, ("can't start new thread", "Thread creation failed", "pthread_create")),
    (Lack.MEMORY, ("DefaultCPUAllocator", "std::bad_alloc", "bad allocation", "malloc of size", "realloc of size")),
    (Lack.MEMORY, ("Unable to allocate", "not enough memory", "failed to map segment from shared object")),  # the last at an import
)
_BY_TYPE = {
    "MemoryError": Lack.MEMORY,
    "OutOfMemoryException": Lack.MEMORY,  # DuckDB
    "ArrowMemoryError": Lack.MEMORY,
    "OutOfMemoryError": Lack.DEVICE_MEMORY,  # torch
}


def find_lack(error: BaseException) -> Lack | None:
    """What the machine lacked where it is behind an error; None: it was something else, or has been said already."""
    return next((lack for one in _iter_causes(error) if (lack := _lack_of(one))), None)


def describe(error: BaseException) -> str:
    """The first line of an error, cut, or the name of its type where it says nothing."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def _iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it was raised from, up to one that is told in our words."""
    while error is not None and not isinstance(error, OmmatidError):
        yield error
        if isinstance(error, BaseExceptionGroup):
            for one in error.exceptions:
                yield from _iter_causes(one)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _lack_of(error: BaseException) -> Lack | None:
    text = str(error)
    if by_text := next((lack for lack, words in _BY_TEXT if any(word in text for word in words)), None):
        return by_text
    if isinstance(error, OSError):
        return _BY_NUMBER.get(error.errno or 0) or _by_words(text)
    if by_type := next((_BY_TYPE[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _BY_TYPE), None):
        return by_type
    # what libraries in other languages raise is of types of their own, or a RuntimeError
    return _by_words(text) if type(error).__module__ != "builtins" or isinstance(error, RuntimeError) else None


def _by_words(text: str) -> Lack | None:
    if found := _NUMBER.search(text):
        return _BY_NUMBER.get(int(found[1]))
    return next((lack for number, lack in _BY_NUMBER.items() if os.strerror(number) in text), None)
