"""DuckDB's settings, shared by the writer and the readers of a catalogue."""

import os

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
