"""The process that answers `ommatid query`, started before anything else is imported, so that DuckDB loads in parallel."""

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ommatid.catalog.sandbox_client import Child

# If a standard stream is closed, the next file opened would get its descriptor, and output meant for the stream would go into it
for number, mode in enumerate("rww"):
    try:
        os.fstat(number)
    except OSError:
        opened = open(os.devnull, mode)  # noqa: SIM115
        setattr(sys, ("stdin", "stdout", "stderr")[number], opened)

child: "Child | None" = None
"""The process, or None if the verb is not `query` or the process failed to start; the query then reports why."""
if sys.argv[1:2] == ["query"]:
    from ommatid.catalog.sandbox_client import Child
    from ommatid.errors import QueryError

    with suppress(QueryError):
        child = Child()


def end() -> None:
    """End the process if it is still running."""
    if child:
        child.end()
