"""Stage `catalog`: one DuckDB file built from the artefacts, queried in SQL in a sandboxed process."""

import warnings
from pathlib import Path
from typing import Any

from ommatid.stage import Stage

STAGE = Stage(
    "catalog",
    kind="catalog",
    place=Path("data/catalog"),
    inputs=("images", "extract", "train", "evaluate", "label", "intervene"),
    reporter="ommatid.show.report:write_into",
)


def __getattr__(name: str) -> Any:
    """Return `Catalog` under its old name, which works for one more release."""
    if name != "Catalog":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ommatid.catalog.reader import Catalog

    warnings.warn(
        "ommatid.catalog.Catalog is now ommatid.Catalog; the old name goes with the next release", DeprecationWarning, stacklevel=2
    )
    return Catalog
