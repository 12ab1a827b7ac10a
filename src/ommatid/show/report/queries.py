"""The SQL behind the report, as it is asked and as it is shown."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import dedent
from typing import Any

from ommatid.catalog.database import quote
from ommatid.catalog.reader import Catalog, QueryResult


@dataclass(frozen=True)
class Question:
    """SQL with its values."""

    sql: str
    """With parameters such as $sae."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Of the parameters: texts and numbers."""

    @property
    def text(self) -> str:
        """As a user can ask it: the values in their places."""
        text = dedent(self.sql).strip()
        for name in sorted(self.values, key=len, reverse=True):
            value = self.values[name]
            text = text.replace(f"${name}", quote(value) if isinstance(value, str) else str(value))
        return text

    def ask(self, catalog: Catalog) -> QueryResult:
        """The answer of a catalogue."""
        return catalog.ask(self.sql, dict(self.values))


RUN = """
    SELECT * FROM runs WHERE sae = $sae
"""
IMAGES = """
    SELECT count(*) FILTER (split = 'train') AS training, count(*) FILTER (split = 'eval') AS evaluation, count(DISTINCT label) AS classes
    FROM images
"""
SAES = """
    SELECT
        r.name, r.variant, c.n_latents AS d_sae, r.k, c.l0, c.fvu, c.dead, c.ms - c.ms_floor AS above_floor,
        c.ms_low - c.ms_floor AS low, c.ms_high - c.ms_floor AS high, u.ms - u.ms_floor AS untrained, n.ms - n.ms_floor AS neurons,
        r.n_labelled, r.sae
    FROM comparisons AS c JOIN runs AS r USING (sae)
    LEFT JOIN comparisons AS u ON u.sae = c.sae AND u.dictionary = 'untrained'
    LEFT JOIN comparisons AS n ON n.sae = c.sae AND n.dictionary = 'neurons'
    WHERE c.dictionary = 'sae' ORDER BY above_floor DESC NULLS LAST, r.sae
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
FIDELITY = """
    SELECT r.name, r.variant, r.k, c.n_latents AS d_sae, c.dictionary, c.l0, c.fvu, c.ms - c.ms_floor AS above_floor
    FROM comparisons AS c JOIN runs AS r USING (sae) ORDER BY r.name, c.dictionary
"""
JUDGED = """
    SELECT dictionary, ms FROM judged WHERE sae = $sae AND judge = $judge AND ms IS NOT NULL
"""
DENSITIES = """
    SELECT density, ms, n_images FROM latents WHERE sae = $sae
"""
SCORES = """
    SELECT label_score, control_score FROM features WHERE sae = $sae AND label_score IS NOT NULL AND control_score IS NOT NULL
"""
WORST = """
    SELECT * FROM features
    WHERE sae = $sae AND ms IS NOT NULL AND n_images >= $least
    ORDER BY ms, latent LIMIT $n
"""
MISNAMED = """
    SELECT * FROM features
    WHERE sae = $sae AND label_score <= control_score AND ms IS NOT NULL AND n_images >= $least
    ORDER BY ms DESC, latent LIMIT $n
"""
STABILITY = """
    SELECT coalesce(r.name, s.other_sae) AS other, s.matched, s.mutual, s.mmcs, s.chance
    FROM stability AS s LEFT JOIN runs AS r ON r.sae = s.other_sae
    WHERE s.sae = $sae ORDER BY s.mmcs DESC, other
"""
