"""Opening the file of a catalogue, and saying why it cannot be read."""

import os
import re
import stat
from pathlib import Path

from ommatid.errors import QueryError

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
