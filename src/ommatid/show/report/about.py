"""The subject of the report: one SAE of a catalogue."""

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
LABEL_SCORES = """
    SELECT
        sae, count(*) AS scored, count(*) FILTER (label_score > control_score) AS better,
        avg(label_score) AS mean_score, avg(control_score) AS mean_control
    FROM features WHERE label_score IS NOT NULL AND control_score IS NOT NULL GROUP BY sae
"""


class About:
    """An SAE, and what several sections of the report need to know about it.

    Args:
        catalog: The open catalogue.
        sae: Name of the SAE in the catalogue.
    """

    def __init__(self, catalog: Catalog, sae: str) -> None:
        self.catalog = catalog
        self.sae = sae
        (self.run,) = self.ask(RUN, sae=sae)
        self.name: str = self.run["name"]
        """Name of the SAE in its training."""
        self.controls = {row["dictionary"]: row for row in self.ask(CONTROLS, sae=sae)}
        """Rows of `comparisons` for the SAE and its controls, by dictionary."""
        self.numbers = self.controls["sae"]
        """The row of the SAE itself."""
        self.floor: float = self.run["ms_floor"]
        """Floor of the monosemanticity score."""
        self.label_scores: Mapping[str, dict[str, Any]] = {row["sae"]: row for row in self.ask(LABEL_SCORES)}
        """Number of scored labels, how many beat their control, and mean scores, by SAE; an SAE without scored labels is missing."""

    def ask(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """Return the rows of an answer, by column."""
        return Question(sql, values).ask(self.catalog).dicts()

    def question(self, sql: str, **values: Any) -> Question:
        """Return a question about this SAE, with `$sae` among its values."""
        return Question(sql, {"sae": self.sae, **values})
