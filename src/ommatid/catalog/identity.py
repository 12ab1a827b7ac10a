"""What becomes of the features of one SAE in another: kept, split, changed, lost or new, by the cosines of their directions.

The words and the SQL are used by the page *Compare*, and by the decision on a challenger.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import duckdb

if TYPE_CHECKING:
    import pyarrow as pa

SAME = 0.9
"""Cosine from which two directions are the same, as in `stability`."""
ALIKE = 0.6
"""Cosine from which two directions are alike; it is far above what chance gives in the widths of usual models."""
KINDS = {
    "kept": f"cosine of at least {SAME}, and each is the other's nearest",
    "split": f"not kept, and two or more latents of the second are nearest to it with at least {ALIKE}",
    "changed": f"neither, but the nearest of the second has a cosine of at least {ALIKE}",
    "lost": f"nothing in the second has a cosine of {ALIKE}",
    "new": f"of the second: nothing in the first has a cosine of {ALIKE}",
}
"""What each kind of feature is. The first four are of the first SAE, and each of its features that fires is of one kind."""

FOUND = f"""
    WITH there AS (
        SELECT m.latent, m.other_latent, m.cosine, m.jaccard, f.ms
        FROM matches AS m LEFT JOIN features AS f ON f.sae = $a AND f.latent = m.latent
        WHERE m.sae = $a AND m.other_sae = $b AND f.is_dead IS NOT true
    ), back AS (
        SELECT m.latent, m.other_latent, m.cosine, m.jaccard, f.ms
        FROM matches AS m LEFT JOIN features AS f ON f.sae = $b AND f.latent = m.latent
        WHERE m.sae = $b AND m.other_sae = $a AND f.is_dead IS NOT true
    ), parts AS (
        SELECT other_latent AS latent, count(*) AS n_parts FROM back WHERE cosine >= {ALIKE} GROUP BY ALL
    ), found AS (
        SELECT
            CASE
                WHEN there.cosine >= {SAME} AND back.other_latent = there.latent THEN 'kept'
                WHEN n_parts >= 2 THEN 'split'
                WHEN there.cosine >= {ALIKE} THEN 'changed'
                ELSE 'lost'
            END AS kind,
            there.latent, there.other_latent, there.cosine::DOUBLE AS cosine, there.jaccard, coalesce(n_parts, 0) AS n_parts,
            coalesce(there.ms, back.ms) AS ms
        FROM there LEFT JOIN back ON back.latent = there.other_latent LEFT JOIN parts ON parts.latent = there.latent
        UNION ALL
        SELECT 'new', back.latent, back.other_latent, back.cosine::DOUBLE, back.jaccard, 0, coalesce(back.ms, there.ms)
        FROM back LEFT JOIN there ON there.latent = back.other_latent WHERE back.cosine < {ALIKE}
    )
"""
"""Beginning of a statement: its table `found` has the kind of each feature that fires of SAE $a, and the new ones of SAE $b."""
COUNTS = f"{FOUND} SELECT kind, count(*) AS n FROM found GROUP BY kind"


def count_kinds(matches: "pa.Table", latents: "Sequence[pa.Table]", a: str, b: str) -> dict[str, int]:
    """Count the features of two SAEs by kind, from their evaluations.

    Args:
        matches: Rows of the relation `matches`, in both directions.
        latents: Rows of each SAE with the columns sae, latent, is_dead and ms.
        a: Name of the first SAE.
        b: Name of the second SAE.

    Returns:
        The number of each of `KINDS`.
    """
    import pyarrow as pa

    with duckdb.connect() as connection:
        connection.register("matches", matches)
        connection.register("features", pa.concat_tables([table.select(["sae", "latent", "is_dead", "ms"]) for table in latents]))
        return dict.fromkeys(KINDS, 0) | dict(connection.execute(COUNTS, {"a": a, "b": b}).fetchall())
