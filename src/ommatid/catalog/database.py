"""Opening a catalogue with DuckDB: the settings that writer and readers share, and the reasons why a file cannot be read."""

import os
import re
import stat
from pathlib import Path

from ommatid.errors import QueryError

SEALED = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",
}
"""DuckDB settings under which nothing is downloaded, and SQL cannot read variables of the Python process."""
MOST_THREADS = 4
"""Maximum number of DuckDB threads."""


MOST_KEYS = 1000
"""Values of a join up to which DuckDB looks each up, in an index or by the ranges of blocks, instead of reading whole columns."""


def settings(threads: int | None = None) -> dict[str, str]:
    """`SEALED`, with a number of threads; None for a thread for each processor, up to `MOST_THREADS`."""
    shared = {**SEALED, "dynamic_or_filter_threshold": str(MOST_KEYS)}
    if threads is not None:
        return {**shared, "threads": str(threads)}
    # os.process_cpu_count is new in Python 3.13, and macOS has no CPU affinity
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {**shared, "threads": str(min(MOST_THREADS, processors))}


def memory_mb(most: int) -> int:
    """A quarter of this machine's memory in MB, at least 256 and at most `most`."""
    return max(256, min(most, physical_mb() // 4))


def physical_mb() -> int:
    """This machine's memory, in MB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def quote(text: str) -> str:
    """Quote text as a SQL string literal, for the few statements that take no parameters in DuckDB (ATTACH, COMMENT)."""
    return "'" + text.replace("'", "''") + "'"


AGAIN = "build it again with `dvc repro catalog`, or name another with --catalog FILE"
"""What to do about a file that is not a readable catalogue."""


def open_file(path: Path) -> int:
    """Open a file for reading.

    Args:
        path: Path of the file.

    Returns:
        A descriptor, through which the file stays readable even if it is replaced.

    Raises:
        QueryError: There is no such file, or it cannot be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without O_NONBLOCK, opening a named pipe waits for a writer
    except FileNotFoundError:
        problem = f"links to {path.readlink()}, which does not exist" if path.is_symlink() else "does not exist"
        raise QueryError(f"{path}: {problem}; build it with `dvc repro` (or `make demo`), or name another with --catalog FILE") from None
    except PermissionError:
        raise QueryError(f"{path}: no permission to read it; `ls -l` shows its owner") from None
    except OSError as error:
        raise QueryError(f"{path}: cannot be read: {error.strerror}") from None
    if problem := _problem(path, os.fstat(file)):
        os.close(file)
        raise QueryError(f"{path}: {problem}")
    return file


def _problem(path: Path, found: os.stat_result) -> str | None:
    if stat.S_ISDIR(found.st_mode):
        return f"a folder; name the file in it, such as --catalog {path / 'catalog.duckdb'}"
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file; name one with --catalog FILE"
    if not found.st_size:
        return f"empty, as it was not completely written or copied; {AGAIN}"
    return None


def explain(path: Path, text: str) -> str:
    """Explain why DuckDB did not open a file.

    Args:
        path: Path of the file.
        text: Message of DuckDB's error.

    Returns:
        The reason, and what to do about it.
    """
    if lock := re.search(r"Conflicting lock is held in (.*?)(?: \(PID (\d+)\))?(?: by user .*?)?\. See also", text):
        who = f"{lock[1]}, process {lock[2]}" if lock[2] else lock[1]
        return f"{path}: another program has it open for writing ({who}); close it there, or have it open the file read-only"
    if "version number" in text:
        return f"{path}: written by another version of DuckDB ({_short(text)}); read it with that version, or {AGAIN}"
    if "not a valid DuckDB database file" in text:
        return f"{path}: not a catalogue, as it is not a DuckDB database; {AGAIN}"
    if "Could not read enough bytes" in text:
        return f"{path}: cut short, as it was not completely written or copied; {AGAIN}"
    if "Corrupt database file" in text or "checksum" in text:
        return f"{path}: damaged ({_short(text)}); {AGAIN}"
    if "not a catalogue" in text:
        return f"{path}: {text}; {AGAIN}"
    return f"{path}: cannot be opened ({_short(text)})"


def _short(text: str) -> str:
    """The first line of DuckDB's message, without the kind of error."""
    return re.sub(r"^\w+ Error: ", "", text.strip().splitlines()[0] if text.strip() else "no reason given")
