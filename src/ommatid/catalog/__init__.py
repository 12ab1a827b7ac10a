"""Catalogue: one DuckDB file built from the artefacts, and SQL over it in a process that cannot do harm."""

from ommatid.catalog.reader import Catalog

__all__ = ["Catalog"]
