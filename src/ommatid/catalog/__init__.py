"""Stage `catalog`: one DuckDB file built from the artefacts, queried in SQL in a sandboxed process."""

from pathlib import Path

from ommatid.stage import Stage

STAGE = Stage(
    "catalog",
    kind="catalog",
    place=Path("data/catalog"),
    inputs=("images", "extract", "train", "evaluate", "label"),
    reporter="ommatid.show.report:write_into",
)
