"""The errors that Ommatid raises for users, and the recognition of machine faults in the errors of other libraries.

A full disk or a lack of memory is recognised by the error number or the text, because libraries wrap it in exceptions of their own.
"""

import errno
import os
import re
from collections.abc import Iterator
from enum import Enum

_USER = re.compile(r"(?<=://)(?:[^\s/@]*@)+|(?<=://)[^\s/@:]+:(?!\d+/)[^\s@]*@")
"""User name and password in a URL, even if the password contains a slash, which makes the URL invalid."""
_QUERY = re.compile(r"(://[^\s?]*)\?[^\s'\"]*")
"""The query of a URL, which may hold keys and signatures."""


def without_credentials(text: str) -> str:
    """Remove the user names, passwords and queries of all URLs in a text."""
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
    """A value in params.yaml or on the command line is invalid."""


class SourceError(OmmatidError):
    """The images or activations named in `images.source` or `extract.path` cannot be found, fetched or used."""


class ModelError(OmmatidError):
    """A model, its weights or a hookpoint cannot be found or used."""


class ArtefactError(OmmatidError):
    """An artefact is missing, damaged, or of another schema version."""


class InputError(OmmatidError, ValueError):
    """An array passed to the Python API is invalid."""


class ExecutorError(OmmatidError):
    """Shards cannot be made: the cluster does not answer, or its workers die repeatedly."""


class GateError(OmmatidError):
    """A quality gate failed; the artefact was not published."""

    WORDS = "quality gate failed"
    """Words in every such message, by which a flow recognises it among the lines of a stage that ran as a process of its own."""


class TrainingError(OmmatidError):
    """Training cannot continue, because it diverged or has too little data."""


class MachineError(OmmatidError):
    """The machine lacks or refuses what a stage needs: memory, disk, permission, files, threads."""


class StoppedError(OmmatidError):
    """A signal ended the process in the middle of a stage; finished work is kept, and the next run of the stage continues from it."""


class QueryError(OmmatidError):
    """A SQL query is refused, too slow or wrong."""


class ReviewError(OmmatidError, ValueError):
    """What a person says of a feature, or a file of such words, is invalid or cannot be recorded; nothing was recorded."""


class RunError(OmmatidError):
    """A flow cannot start or continue, because the checkout, git or DVC is not in the state that it needs."""


def gist(error: Exception) -> str:
    """Return the message of a library's exception as one line, without quotations from files and memory addresses.

    A file may be a link to a private one, and messages are published in the table `rejected`, in logs and in reports.
    """
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    said = re.sub(r" ?<[^>]* at 0x[0-9a-fA-F]+>", "", str(error)).strip().partition("\n")[0]
    unquoted = re.split(r"[\s:(\[{]*(?<!\w)b?['\"`]", said, maxsplit=1)[0]
    return unquoted if re.search("[A-Za-z]", unquoted) else type(error).__name__


LONGEST = 200
"""Largest number of characters of another library's message that are passed on."""


class Lack(Enum):
    """Something that the machine lacks or refuses; the value is a description and what to do about it."""

    SPACE = ("the disk is full", "make room")
    QUOTA = ("the disk quota is used up", "make room, or have the quota raised")
    FILE_SIZE = ("a file became larger than is allowed here", "raise the limit (`ulimit -f`), or use another file system")
    READ_ONLY = ("read-only file system", "use a writable folder")
    DENIED = ("permission denied", "give this user the permission")
    FILES = ("too many files are open", "raise the limit (`ulimit -n`)")
    DISK = ("the disk cannot be read or written (input/output error)", "check the disk's health (`dmesg`), and use another one")
    MEMORY = ("there is not enough memory", "use less of it, or a machine with more")
    DEVICE_MEMORY = ("there is not enough GPU memory", "use less of it, or a GPU with more")
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
"""The system's error number in messages of Rust libraries (safetensors, tokenizers) and of pyarrow."""
_BY_TEXT = (
    (Lack.DEVICE_MEMORY, ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")),
    # words of SQLite, DuckDB, NumPy and torch, of which the last two do not say why a write was incomplete
    (Lack.SPACE, ("database or disk is full", "max_temp_directory_size", " requested and ", ". unexpected pos ")),
    (Lack.DISK, ("disk I/O error",)),
    (Lack.READ_ONLY, ("attempt to write a readonly database",)),
    (Lack.THREADS, ("can't start new thread", "Thread creation failed", "pthread_create")),
    (Lack.MEMORY, ("DefaultCPUAllocator", "std::bad_alloc", "bad allocation", "malloc of size", "realloc of size")),
    (Lack.MEMORY, ("Unable to allocate", "not enough memory", "failed to map segment from shared object")),  # the last when importing
)
_BY_TYPE = {
    "MemoryError": Lack.MEMORY,
    "OutOfMemoryException": Lack.MEMORY,  # DuckDB
    "ArrowMemoryError": Lack.MEMORY,
    "OutOfMemoryError": Lack.DEVICE_MEMORY,  # torch
}


def find_lack(error: BaseException) -> Lack | None:
    """Return what the machine lacked if that caused an error; None for any other cause, or if an `OmmatidError` names it already."""
    return next((lack for one in _iter_causes(error) if (lack := _lack_of(one))), None)


def describe(error: BaseException) -> str:
    """Return the first line of an error's message, shortened if necessary, or the name of its type if the message is empty."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def _iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an error and its causes, up to the first `OmmatidError`, whose message already names the cause."""
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
    # libraries in other languages raise types of their own, or RuntimeError
    return _by_words(text) if type(error).__module__ != "builtins" or isinstance(error, RuntimeError) else None


def _by_words(text: str) -> Lack | None:
    if found := _NUMBER.search(text):
        return _BY_NUMBER.get(int(found[1]))
    return next((lack for number, lack in _BY_NUMBER.items() if os.strerror(number) in text), None)
