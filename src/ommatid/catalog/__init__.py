"""The catalogue: one DuckDB file built from the artefacts, queried in SQL in a sandboxed process."""

from ommatid.catalog.reader import Catalog

__all__ = ["Catalog"]
