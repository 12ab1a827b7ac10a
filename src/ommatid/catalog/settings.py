"""DuckDB's settings, shared by the writer and the readers of a catalogue."""

import os

SEALED = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",
}
"""Nothing is downloaded, and SQL cannot read the variables of the Python process around it."""


def memory_limit(most: int) -> str:
    """A quarter of this machine's memory, `most` MB at most and 256 MB at least, as DuckDB writes it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    return f"{max(256, min(most, physical // 4))}MB"


def quote(text: str) -> str:
    """A SQL string literal, for the few statements in which DuckDB takes no parameters (ATTACH, COMMENT)."""
    return "'" + text.replace("'", "''") + "'"
