"""Which SAE of a catalogue is meant, where it holds several."""

import difflib

from ommatid.catalog import Catalog
from ommatid.errors import QueryError


def choose_sae(catalog: Catalog, name: str | None = None) -> str:
    """The SAE of this name, the catalogue's or its training's; None: the one with the highest mean MS above its floor.

    Raises:
        QueryError: there is none of this name.
    """
    found = catalog.rows(_SAES)
    if not found:
        raise QueryError(f"{catalog.path}: no SAE in it was evaluated; make it again with `dvc repro catalog`")
    if name is None:
        return found[0][0]
    for sae, own in found:
        if name in (sae, own):
            return sae
    names = [own or sae for sae, own in found]
    near = difflib.get_close_matches(name, names, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise QueryError(f"no SAE {name!r}; {guess}the catalogue has {', '.join(names)}")


_SAES = """
    SELECT comparisons.sae, runs.name FROM comparisons LEFT JOIN runs ON runs.sae = comparisons.sae
    WHERE dictionary = 'sae' ORDER BY comparisons.ms - comparisons.ms_floor DESC NULLS LAST, comparisons.sae
"""
