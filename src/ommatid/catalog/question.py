"""Questions to a catalogue: SQL whose values are parameters, and the choice of the SAE that a question is about."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import dedent
from typing import Any

from ommatid.catalog.database import quote
from ommatid.catalog.reader import Catalog, QueryResult
from ommatid.errors import QueryError


@dataclass(frozen=True)
class Question:
    """A question to the catalogue."""

    sql: str
    """SQL with parameters such as $sae."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Values of the parameters, texts and numbers."""

    @property
    def text(self) -> str:
        """SQL with the values in place of the parameters, so that a user can run it."""

        def write(found: re.Match[str]) -> str:
            if found[1] not in self.values:
                return found[0]
            value = self.values[found[1]]
            return quote(value) if isinstance(value, str) else str(value)

        return re.sub(r"\$([a-z]\w*)", write, dedent(self.sql).strip())

    def ask(self, catalog: Catalog) -> QueryResult:
        """Return the answer of a catalogue."""
        return catalog.ask(self.sql, dict(self.values))


def choose_sae(catalog: Catalog, name: str | None = None) -> str:
    """Find an SAE by its name.

    Args:
        catalog: The open catalogue.
        name: Name in the catalogue or in the training; None for the SAE with the highest mean MS above its floor.

    Returns:
        The name in the catalogue.

    Raises:
        QueryError: There is no SAE of this name.
    """
    found = catalog.rows(_SAES)
    if not found:
        raise QueryError(f"{catalog.path}: it has no evaluated SAE; build it again with `dvc repro catalog`")
    if name is None:
        return found[0][0]
    for sae, name_in_training in found:
        if name in (sae, name_in_training):
            return sae
    names = [name_in_training or sae for sae, name_in_training in found]
    near = difflib.get_close_matches(name, names, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise QueryError(f"no SAE {name!r}; {guess}the catalogue has {', '.join(names)}")


_SAES = """
    SELECT comparisons.sae, runs.name FROM comparisons LEFT JOIN runs ON runs.sae = comparisons.sae
    WHERE dictionary = 'sae' ORDER BY comparisons.ms - comparisons.ms_floor DESC NULLS LAST, comparisons.sae
"""
