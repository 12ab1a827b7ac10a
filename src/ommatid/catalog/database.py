"""Opening DuckDB on a catalogue: settings shared by writer and readers, and why a file cannot be read."""

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
"""Nothing is downloaded, and SQL cannot read the variables of the Python process around it."""
MOST_THREADS = 4


def settings() -> dict[str, str]:
    """SEALED, and a thread for each processor, four at most."""
    # os.process_cpu_count is 3.13's; macOS has no affinity
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {**SEALED, "threads": str(min(MOST_THREADS, processors))}


def memory_mb(most: int) -> int:
    """A quarter of this machine's memory, `most` MB at most and 256 MB at least."""
    return max(256, min(most, physical_mb() // 4))


def physical_mb() -> int:
    """This machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def quote(text: str) -> str:
    """A SQL string literal, for the few statements in which DuckDB takes no parameters (ATTACH, COMMENT)."""
    return "'" + text.replace("'", "''") + "'"


AGAIN = "make it again with `dvc repro catalog`, or name another with --catalog FILE"


def open_file(path: Path) -> int:
    """A descriptor of the file, which stays readable when the file is replaced.

    Raises:
        QueryError: there is no such file, or it may not be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that nobody writes to would be waited for
    except FileNotFoundError:
        where = f"links to {path.readlink()}, which does not exist" if path.is_symlink() else "no catalogue"
        raise QueryError(f"{path}: {where}; make it with `dvc repro` (or `make demo`), or name one with --catalog FILE") from None
    except PermissionError:
        raise QueryError(f"{path}: no permission to read it; `ls -l` shows whose it is") from None
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
        return f"empty: what wrote or copied it did not finish; {AGAIN}"
    return None


def explain(path: Path, text: str) -> str:
    """Why DuckDB did not open the file, from what it says."""
    if lock := re.search(r"Conflicting lock is held in (.*?)(?: \(PID (\d+)\))?(?: by user .*?)?\. See also", text):
        who = f"{lock[1]}, process {lock[2]}" if lock[2] else lock[1]
        return f"{path}: another program has it open for writing ({who}); close it there, or have it open the file read-only"
    if "version number" in text:
        return f"{path}: written by another version of DuckDB ({_short(text)}); read it with that version, or {AGAIN}"
    if "not a valid DuckDB database file" in text:
        return f"{path}: not a catalogue, for it is no DuckDB database; {AGAIN}"
    if "Could not read enough bytes" in text:
        return f"{path}: cut short: what wrote or copied it did not finish; {AGAIN}"
    if "Corrupt database file" in text or "checksum" in text:
        return f"{path}: damaged ({_short(text)}); {AGAIN}"
    if "not a catalogue" in text:
        return f"{path}: {text}; {AGAIN}"
    return f"{path}: cannot be opened ({_short(text)})"


def _short(text: str) -> str:
    """The first line of DuckDB's message, without the kind of error."""
    return re.sub(r"^\w+ Error: ", "", text.strip().splitlines()[0] if text.strip() else "no reason given")
