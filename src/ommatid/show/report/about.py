"""The SAE that the report is about."""

from collections.abc import Mapping
from typing import Any

from ommatid.catalog.reader import Catalog
from ommatid.show.report.parts import Question

RUN = """
    SELECT * FROM runs WHERE sae = $sae
"""
CONTROLS = """
    SELECT
        dictionary, n_latents, l0, fvu, dead, ms - ms_floor AS above_floor, ms_low - ms_floor AS low, ms_high - ms_floor AS high,
        ms_best, purity, ms_left_out
    FROM comparisons WHERE sae = $sae
    ORDER BY dictionary <> 'sae', above_floor DESC NULLS LAST, dictionary
"""
NAMES = """
    SELECT
        sae, count(*) AS scored, count(*) FILTER (label_score > control_score) AS better,
        avg(label_score) AS mean_score, avg(control_score) AS mean_control
    FROM features WHERE label_score IS NOT NULL AND control_score IS NOT NULL GROUP BY sae
"""


class About:
    """An SAE, and what several sections need of it."""

    def __init__(self, catalog: Catalog, sae: str) -> None:
        self.catalog = catalog
        self.sae = sae
        (self.run,) = self.ask(RUN, sae=sae)
        self.name: str = self.run["name"]
        """In its training."""
        self.controls = {row["dictionary"]: row for row in self.ask(CONTROLS, sae=sae)}
        """The SAE itself and its controls, by dictionary."""
        self.mine = self.controls["sae"]
        self.floor: float = self.run["ms_floor"]
        self.names: Mapping[str, dict[str, Any]] = {row["sae"]: row for row in self.ask(NAMES)}
        """How names hold against their controls, of every SAE that has some."""

    def ask(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """Rows by column."""
        return Question(sql, values).ask(self.catalog).dicts()

    def question(self, sql: str, **values: Any) -> Question:
        """One about this SAE."""
        return Question(sql, {"sae": self.sae, **values})
