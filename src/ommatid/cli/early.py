"""The process that `ommatid query` asks, started before the command line's own parts are imported: DuckDB loads beside them."""

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ommatid.catalog.client import Child

for number, mode in enumerate("rww"):  # what is opened next would take the place of one that is closed, and be written to
    try:
        os.fstat(number)
    except OSError:
        opened = open(os.devnull, mode)  # noqa: SIM115
        setattr(sys, ("stdin", "stdout", "stderr")[number], opened)

child: "Child | None" = None
"""None: another verb was asked for, or none could be started, which is said where it is asked for."""
if sys.argv[1:2] == ["query"]:
    from ommatid.catalog.client import Child
    from ommatid.errors import QueryError

    with suppress(QueryError):
        child = Child()


def end() -> None:
    """End the process, if it still runs."""
    if child:
        child.end()
