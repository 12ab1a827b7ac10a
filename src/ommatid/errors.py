"""What a machine lacks or refuses, told from the errors of whatever library met it: by cause, not by the type of the exception."""

import errno
import os
import re
from collections.abc import Iterator
from enum import Enum

_USER = re.compile(r"(?<=://)(?:[^\s/@]*@)+|(?<=://)[^\s/@:]+:(?!\d+/)[^\s@]*@")
"""User name and password in a URL; also where a slash in the password keeps it from being read as one."""
_QUERY = re.compile(r"(://[^\s?]*)\?[^\s'\"]*")
"""What follows the path of a URL: keys and signatures stand there."""


def without_credentials(text: str) -> str:
    """The text without the user names, passwords and queries of URLs in it."""
    return _QUERY.sub(r"\1", _USER.sub("", text))


class OmmatidError(Exception):
    """Base of every error whose message is meant for the user; the CLI prints it without a traceback.

    >>> import ommatid
    >>> try:
    ...     ommatid.open_run("nowhere")
    ... except ommatid.OmmatidError as error:
    ...     print(error)
    nowhere holds no finished study: nowhere/sae: does not exist; make it with ...
    """


class ConfigError(OmmatidError):
    """A value in params.yaml or on the command line that cannot be used."""


class SourceError(OmmatidError):
    """Images or activations cannot be found, fetched or used at the place named in `images.source` or `extract.path`."""


class ModelError(OmmatidError):
    """A model, its weights or a hookpoint cannot be found or used."""


class ArtefactError(OmmatidError):
    """An artefact is missing, damaged, or of another schema version."""


class InputError(OmmatidError, ValueError):
    """Arrays given to a call of the library that cannot be used."""


class ExecutorError(OmmatidError):
    """Shards cannot be run: no cluster answers, or the workers of one die again and again."""


class GateError(OmmatidError):
    """A quality gate failed; the artefact was not published."""


class TrainingError(OmmatidError):
    """Training cannot go on (divergence, too little data)."""


class MachineError(OmmatidError):
    """The machine lacks or refuses what a stage needs: memory, disk, permission, files, threads."""


class StoppedError(OmmatidError):
    """The process was asked to end in the middle of a stage; what was done is kept, and the stage goes on when it is run again."""


class QueryError(OmmatidError):
    """SQL that cannot be answered: refused, too slow, or wrong."""


class RunError(OmmatidError):
    """A flow cannot start or go on: the checkout, git or DVC is not in the state it needs."""


def gist(error: Exception) -> str:
    """What a library's exception says, in one line and without what it quotes of a file, or addresses in memory.

    A file may be a link to another that is nobody's business, and messages are published: in the table `rejected`, in logs, in reports.
    """
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    said = re.sub(r" ?<[^>]* at 0x[0-9a-fA-F]+>", "", str(error)).strip().partition("\n")[0]
    unquoted = re.split(r"[\s:(\[{]*(?<!\w)b?['\"`]", said, maxsplit=1)[0]
    return unquoted if re.search("[A-Za-z]", unquoted) else type(error).__name__


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
