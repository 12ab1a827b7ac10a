"""The SAE that the report is about."""

from collections.abc import Mapping
from typing import Any

from ommatid.catalog.reader import Catalog
from ommatid.show.report import queries
from ommatid.show.report.queries import Question


class About:
    """An SAE, and what several sections need of it."""

    def __init__(self, catalog: Catalog, sae: str) -> None:
        self.catalog = catalog
        self.sae = sae
        (self.run,) = self.ask(queries.RUN, sae=sae)
        self.name: str = self.run["name"]
        """In its training."""
        self.controls = {row["dictionary"]: row for row in self.ask(queries.CONTROLS, sae=sae)}
        """The SAE itself and its controls, by dictionary."""
        self.mine = self.controls["sae"]
        self.floor: float = self.run["ms_floor"]
        self.names: Mapping[str, dict[str, Any]] = {row["sae"]: row for row in self.ask(queries.NAMES)}
        """How names hold against their controls, of every SAE that has some."""

    def ask(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """Rows by column."""
        return Question(sql, values).ask(self.catalog).dicts()

    def question(self, sql: str, **values: Any) -> Question:
        """One about this SAE."""
        return Question(sql, {"sae": self.sae, **values})
