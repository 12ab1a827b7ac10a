"""The tables `matches` and `stability`: which latents of two SAEs of the same activations are the same, by direction and by firing."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from safetensors import safe_open
from torch import Tensor

from ommatid import schemas
from ommatid.compute.nearest import ALIKE
from ommatid.events import Listener, Progress, ignore
from ommatid.metrics import BestMatches, best_matches, chance_cosine, match_one_to_one
from ommatid.sae.model import WEIGHTS
from ommatid.store import Artefact, Draft, part_name

MEMORY = "1GB"
"""Of DuckDB, which spills the rest to scratch."""


@dataclass(frozen=True)
class Evaluated:
    """An SAE and what it does on an evaluation split."""

    sae: Artefact
    """Itself."""
    evaluation: Artefact
    """Its own, with the table `firings`; of the same images for all that are matched."""

    @property
    def name(self) -> str:
        """What the catalogue calls it."""
        return self.sae.summary["sae"]


@dataclass(frozen=True)
class Pair:
    """Two SAEs held against each other, both ways."""

    matches: pa.Table
    """As `schemas.MATCHES`: a row for each latent of either."""
    stability: pa.Table
    """As `schemas.STABILITY`: two rows."""


def write_matches(saes: Mapping[str, Artefact], evaluations: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> None:
    """Match every SAE of a training with every other, into the artefact that holds their evaluations; without others, into empty tables.

    Args:
        saes: By name.
        evaluations: By the same names.
        draft: Of all evaluations.
        on_event: Hears of each pair.
    """
    pairs = list(combinations([Evaluated(sae, evaluations[name]) for name, sae in saes.items()], 2))
    matches, stability = schemas.MATCHES.empty_table(), [schemas.STABILITY.empty_table()]
    draft.write_table(part_name("matches", 0), matches)
    for i, (one, other) in enumerate(pairs):
        pair = match(one, other, draft.scratch)
        draft.write_table(part_name("matches", i), pair.matches, compression="zstd")
        stability.append(pair.stability)
        on_event(Progress("match SAEs", i + 1, len(pairs)))
    draft.write_table("stability.parquet", pa.concat_tables(stability))


def match(one: Evaluated, other: Evaluated, scratch: Path) -> Pair:
    """Best matches of all latents of two SAEs, both ways, and how stable they are.

    Args:
        one: An SAE.
        other: Another, of the same activations.
        scratch: Folder for what does not fit into memory.
    """
    a, b = _directions(one.sae), _directions(other.sae)
    assert a.shape[1] == b.shape[1], f"directions of two SAEs of the same activations differ in width: {a.shape} and {b.shape}"
    there, back = best_matches(a, b)
    cosines = match_one_to_one(a, b)
    matches = pa.concat_tables([_table(one, other, there, scratch), _table(other, one, back, scratch)])
    rows = [_stability(one, other, there, back, cosines, a.shape[1]), _stability(other, one, back, there, cosines, a.shape[1])]
    return Pair(matches, pa.Table.from_pylist(rows, schema=schemas.STABILITY))


def _directions(sae: Artefact) -> Tensor:
    with safe_open(sae.file(WEIGHTS), framework="pt") as file:
        return file.get_tensor("W_dec")


def _stability(one: Evaluated, other: Evaluated, there: BestMatches, back: BestMatches, cosines: Tensor | None, d: int) -> dict[str, Any]:
    n = len(there.other)
    return {
        "sae": one.name,
        "other_sae": other.name,
        "matched": None if cosines is None else int((cosines > ALIKE).sum()) / n,
        "mutual": int((there.mutual(back) & (there.cosine > ALIKE)).sum()) / n,
        "mmcs": there.mmcs,
        "chance": chance_cosine(len(back.other), d),
    }


def _table(one: Evaluated, other: Evaluated, best: BestMatches, scratch: Path) -> pa.Table:
    latents = np.arange(len(best.other), dtype=np.int32)
    columns = {"latent": latents, "other_latent": best.other.numpy().astype(np.int32), "cosine": best.cosine.numpy()}
    with duckdb.connect(config={"memory_limit": MEMORY, "temp_directory": str(scratch), "preserve_insertion_order": "false"}) as connection:
        connection.register("best", pa.table(columns))
        values = {"mine": _files(one.evaluation), "theirs": _files(other.evaluation), "sae": one.name, "other_sae": other.name}
        return connection.execute(_MATCHES, values).to_arrow_table().cast(schemas.MATCHES)


def _files(evaluation: Artefact) -> list[str]:
    return [str(path) for path in evaluation.files("firings")]


_MATCHES = """
    WITH mine AS (SELECT latent, count(*) AS n FROM read_parquet($mine) GROUP BY latent),
    theirs AS (SELECT latent, count(*) AS n FROM read_parquet($theirs) GROUP BY latent),
    both_fire AS (
        SELECT best.latent, count(*) AS n
        FROM best
        JOIN read_parquet($mine) AS m ON m.latent = best.latent
        JOIN read_parquet($theirs) AS t ON t.latent = best.other_latent AND t.image = m.image
        GROUP BY best.latent
    )
    SELECT
        $sae AS sae, best.latent, $other_sae AS other_sae, best.other_latent, best.cosine,
        coalesce(both_fire.n, 0) / nullif(coalesce(mine.n, 0) + coalesce(theirs.n, 0) - coalesce(both_fire.n, 0), 0) AS jaccard
    FROM best
    LEFT JOIN mine ON mine.latent = best.latent
    LEFT JOIN theirs ON theirs.latent = best.other_latent
    LEFT JOIN both_fire ON both_fire.latent = best.latent
    ORDER BY best.latent
"""
