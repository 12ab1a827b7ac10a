"""The process that `ommatid query` asks, started before the command line's own parts are imported: DuckDB loads beside them."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ommatid.catalog.child import Child

child: "Child | None" = None
"""None: another verb was asked for."""
if sys.argv[1:2] == ["query"]:
    from ommatid.catalog.child import Child

    child = Child()


def end() -> None:
    """End the process, if it still runs."""
    if child:
        child.end()
