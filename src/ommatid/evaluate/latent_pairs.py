"""Relations between latents, within one SAE and between two SAEs whose directions are in the same space.

Within one SAE these are the tables `cofiring`, `densities` and `levels`, and near duplicates; between two, `matches` and `stability`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float64, Int64
from safetensors import safe_open
from torch import Tensor

from ommatid import schemas
from ommatid.compute.checkpoint import Accumulator
from ommatid.compute.nearest import ALIKE, largest, nearest
from ommatid.compute.undefined import none_for_nan
from ommatid.events import Listener, Progress, ignore
from ommatid.metrics import (
    BestMatches,
    CoFiring,
    Fidelity,
    Firing,
    best_matches,
    chance_cosine,
    density_histogram,
    match_one_to_one,
    nan_mean,
    unit,
)
from ommatid.sae.model import SAE, WEIGHTS
from ommatid.store import Artefact, Draft, part_name, read_part
from ommatid.store.per_sae import read_config

N_PARTNERS = 8
"""Maximum number of co-firing partners kept for a latent."""
MIN_BOTH = 8
"""Number of images on which two partners must both fire. The 95 % interval of a count of 8 is 3.5 to 15.8, so the lift is known to a
factor of about two."""
DUPLICATE_JACCARD = 0.5
"""Minimum Jaccard index of two latents' sets of images for the latents to be duplicates, if their directions are also alike."""
PAIRS = 2**26
"""Number of pairs of latents that are counted in one pass over the firings; the counts take 256 MB."""
VALUES = 2**24
"""Number of values (images x latents) in a dense batch of firings, which takes 64 MB."""
PAIRS_AT_ONCE = 2**22
"""Number of pairs whose lift and Jaccard are held in memory at once, in 32 MB each."""


@dataclass(frozen=True)
class Structure:
    """Relations between the latents of one SAE."""

    cofiring: pa.Table
    """The table `cofiring`."""
    duplicate_of: Int64[Tensor, " d_sae"]
    """Near duplicate of each latent, (d_sae,) int64; -1 if it has none."""


def measure_structure(name: str, files: Sequence[str], directions_sd: Float[Tensor, "d_sae d_out"], n_images: int) -> Structure:
    """Compare all pairs of latents of one SAE.

    Memory is bounded by PAIRS, VALUES and PAIRS_AT_ONCE, whatever the numbers of images and latents. Time grows as images · latents²,
    because the products are dense.

    Args:
        name: Name of the SAE.
        files: Parts of its table `firings`.
        directions_sd: Decoder directions, (d_sae, d_model).
        n_images: Number of evaluation images.

    Returns:
        The co-firing partners and the near duplicate of each latent.
    """
    d_sae = len(directions_sd)
    directions = unit(directions_sd).float()
    tables, duplicates = [], []
    step = max(1, PAIRS // d_sae)
    for start in range(0, d_sae, step):
        tile = range(start, min(start + step, d_sae))
        counted = CoFiring(tile, d_sae)
        for fires in iter_fires(files, d_sae):
            counted.add(fires)
        for rows in _slices(len(tile), max(1, PAIRS_AT_ONCE // d_sae)):
            latents = torch.arange(start + rows.start, start + rows.stop)
            tables.append(_partners(name, latents, counted, rows, n_images))
            duplicates.append(_duplicates(latents, directions, counted.jaccard(rows)))
    return Structure(pa.concat_tables(tables), torch.cat(duplicates))


def iter_fires(files: Sequence[str], d_sae: int) -> Iterator[Tensor]:
    """Iterate over a table `firings` in dense batches of images.

    Args:
        files: Parts of the table. Rows of one image must follow one another, also from one part to the next, as stage `evaluate`
            writes them.
        d_sae: Number of latents.

    Yields:
        1 where the latent fires on the image and 0 elsewhere, (images, d_sae) float32; images without any firing are left out.
    """
    per_step = max(1, VALUES // d_sae)
    rest = np.empty((0, 2), np.int64)
    for file in files:
        part = read_part(Path(file), ["image", "latent"])
        rows = np.concatenate([rest, np.stack([part[column].to_numpy().astype(np.int64) for column in ("image", "latent")], axis=1)])
        starts = np.flatnonzero(np.diff(rows[:, 0], prepend=-1))
        whole, rest = (rows[: starts[-1]], rows[starts[-1] :]) if len(starts) else (rows, rows)
        yield from _dense(whole, starts[:-1], d_sae, per_step)
    if len(rest):
        yield from _dense(rest, np.zeros(1, np.int64), d_sae, per_step)


def _dense(rows: Int64[np.ndarray, "rows 2"], starts: Int64[np.ndarray, " images"], d_sae: int, per_step: int) -> Iterator[Tensor]:
    """Yield dense batches of up to `per_step` images, given the rows (image, latent) of images and where each image's rows start."""
    for first in range(0, len(starts), per_step):
        bounds = np.append(starts, len(rows))[first : first + per_step + 1]
        places = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        fires = torch.zeros(len(bounds) - 1, d_sae)
        fires[torch.from_numpy(places), torch.from_numpy(rows[bounds[0] : bounds[-1], 1])] = 1
        yield fires


def _partners(name: str, latents: Int64[Tensor, " rows"], counted: CoFiring, rows: slice, n_images: int) -> pa.Table:
    """Return rows of the table `cofiring`: each latent's partners of highest lift; of equal ones, the lower latent comes first."""
    lift, jaccard, both = counted.lift(rows, n_images), counted.jaccard(rows), counted.counts[rows]
    lift[(both < MIN_BOTH) | (lift.nan_to_num() <= 1)] = 0
    lift[torch.arange(len(latents)), latents] = 0
    partners = torch.from_numpy(largest(lift.numpy(), N_PARTNERS))
    row, place = (lift.gather(1, partners) > 0).nonzero(as_tuple=True)
    partner = partners[row, place]
    columns = {
        "sae": pa.array([name] * len(row), pa.string()),
        "latent": latents[row].int().numpy(),
        "rank": (place + 1).int().numpy(),
        "other": partner.int().numpy(),
        "lift": lift[row, partner].numpy(),
        "jaccard": jaccard[row, partner].numpy(),
        "n_both": both[row, partner].int().numpy(),
    }
    return pa.table(columns, schema=schemas.COFIRING)


def _duplicates(
    latents: Int64[Tensor, " rows"], directions: Float[Tensor, "d_sae d_out"], jaccard: Float64[Tensor, "rows d_sae"]
) -> Int64[Tensor, " rows"]:
    """Return the latent of the nearest direction among each latent's near duplicates, or -1 if it has none, (latents,)."""
    found = nearest(directions[latents], directions, 1, latents.numpy(), (jaccard >= DUPLICATE_JACCARD).numpy())
    return torch.from_numpy(np.where(found.cosines >= ALIKE, found.others, -1)[:, 0])


def _slices(n: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def make_densities(name: str, firings: Mapping[str, Firing]) -> pa.Table:
    """Make the table `densities` from the firings of each dictionary, by the dictionary's name."""
    rows = [
        {"sae": name, "dictionary": dictionary, "low": decade.low, "high": decade.high, "n_latents": decade.n_latents}
        for dictionary, firing in firings.items()
        for decade in density_histogram(firing.density, firing.n_tokens)
    ]
    return pa.Table.from_pylist(rows, schema=schemas.DENSITIES)


class LevelFidelity(Accumulator):
    """Fidelity of the levels of a Matryoshka SAE; that of the last level is the whole SAE's, and is measured elsewhere.

    An SAE without levels counts as one level, so that nothing is measured here.
    """

    STATE = ("inner",)

    def __init__(self, sae: SAE) -> None:
        bounds = [bound for bound in sae.config.prefixes or () if bound < sae.n_latents]
        self.inner = [Fidelity() for _ in bounds]
        self.bounds = (*bounds, sae.n_latents)
        """Number of latents of each level, counted from the first latent, so that each level includes the ones before it."""
        self._sae = sae

    def add(self, target_bd: Float[Tensor, "tokens d_out"], acts_bs: Float[Tensor, "tokens d_sae"]) -> None:
        """Add a batch of tokens.

        Args:
            target_bd: Reconstruction target, (tokens, d_out).
            acts_bs: Activations of the latents, (tokens, d_sae).
        """
        x_hat, start = self._sae.b_dec.expand(len(acts_bs), -1), 0
        for bound, fidelity in zip(self.bounds, self.inner, strict=False):
            x_hat = torch.addmm(x_hat, acts_bs[:, start:bound], self._sae.W_dec[start:bound])
            fidelity.add(target_bd, x_hat, int((acts_bs[:, :bound] > 0).sum()))
            start = bound

    def table(self, name: str, whole: Fidelity, ms: Float64[Tensor, " d_sae"], lca_depth: Float64[Tensor, " d_sae"]) -> pa.Table:
        """Make the table `levels`.

        Args:
            name: Name of the SAE.
            whole: Fidelity of the whole SAE, which is the last level.
            ms: MonoSemanticity score of each latent, (d_sae,); NaN where undefined.
            lca_depth: Depth of each latent in the taxonomy, (d_sae,); NaN where undefined.

        Returns:
            The table, one row for each level.
        """
        firsts = (0, *self.bounds)
        rows = []
        for i, (bound, fidelity) in enumerate(zip(self.bounds, (*self.inner, whole), strict=True)):
            mine, depths = ms[firsts[i] : bound], lca_depth[firsts[i] : bound]
            values = {"fvu": fidelity.fvu, "ms": nan_mean(mine), "lca_depth": nan_mean(depths)}
            counts = {"n_ms": int((~mine.isnan()).sum()), "n_lca": int((~depths.isnan()).sum())}
            rows.append({"sae": name, "level": i + 1, "first": firsts[i], "last": bound - 1, **none_for_nan(values), **counts})
        return pa.Table.from_pylist(rows, schema=schemas.LEVELS)


MEMORY = "1GB"
"""Memory limit of DuckDB, which spills the rest to the scratch folder."""


@dataclass(frozen=True)
class EvaluatedSAE:
    """An SAE with its evaluation."""

    sae: Artefact
    """Artefact of the SAE."""
    evaluation: Artefact
    """Artefact of its evaluation. SAEs can be matched only if they were evaluated on the same images."""

    @property
    def name(self) -> str:
        """Name of the SAE in the catalogue."""
        return self.sae.summary["sae"]


@dataclass(frozen=True)
class Pair:
    """Comparison of two SAEs, in both directions."""

    matches: pa.Table
    """Rows of the table `matches`: one for each latent of either SAE."""
    stability: pa.Table
    """Rows of the table `stability`: one for each SAE."""


def write_matches(saes: Mapping[str, Artefact], evaluations: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> None:
    """Match every SAE of a training with every other, and write the tables `matches` and `stability`; empty if there is only one SAE.

    SAEs that decode different hookpoints are not matched: a cosine of directions in two spaces means nothing.

    Args:
        saes: Artefact of each SAE, by folder name.
        evaluations: Artefact of each SAE's evaluation, by the same names.
        draft: Draft of the artefact that holds all evaluations.
        on_event: Called with each progress event and warning.
    """
    spaces: dict[str, list[EvaluatedSAE]] = {}
    for name, sae in saes.items():
        config = read_config(sae)
        spaces.setdefault(config.get("target") or config["hookpoint"], []).append(EvaluatedSAE(sae, evaluations[name]))
    pairs = [pair for alike in spaces.values() for pair in combinations(alike, 2)]
    matches, stability = schemas.MATCHES.empty_table(), [schemas.STABILITY.empty_table()]
    draft.write_table(part_name("matches", 0), matches)
    for i, (one, other) in enumerate(pairs):
        pair = match(one, other, draft.scratch)
        draft.write_table(part_name("matches", i), pair.matches, compression="zstd")
        stability.append(pair.stability)
        on_event(Progress("match SAEs", i + 1, len(pairs)))
    draft.write_table("stability.parquet", pa.concat_tables(stability))


def match(one: EvaluatedSAE, other: EvaluatedSAE, scratch: Path) -> Pair:
    """Match all latents of two SAEs that decode the same hookpoint, in both directions.

    Args:
        one: The first SAE.
        other: The second SAE.
        scratch: Folder into which DuckDB spills what does not fit into memory.

    Returns:
        The best match of each latent, and the stability of each SAE.
    """
    a, b = _directions(one.sae), _directions(other.sae)
    assert a.shape[1] == b.shape[1], f"directions of two SAEs of the same activations differ in width: {a.shape} and {b.shape}"
    there, back = best_matches(a, b)
    cosines = match_one_to_one(a, b)
    matches = pa.concat_tables([_table(one, other, there, scratch), _table(other, one, back, scratch)])
    rows = [_stability(one, other, there, back, cosines, a.shape[1]), _stability(other, one, back, there, cosines, a.shape[1])]
    return Pair(matches, pa.Table.from_pylist(rows, schema=schemas.STABILITY))


def _directions(sae: Artefact) -> Float[Tensor, "d_sae d_out"]:
    with safe_open(sae.file(WEIGHTS), framework="pt") as file:
        return file.get_tensor("W_dec")


def _stability(
    one: EvaluatedSAE, other: EvaluatedSAE, there: BestMatches, back: BestMatches, cosines: Float[Tensor, " pairs"] | None, d: int
) -> dict[str, Any]:
    n = len(there.other)
    return {
        "sae": one.name,
        "other_sae": other.name,
        "matched": None if cosines is None else int((cosines > ALIKE).sum()) / n,
        "mutual": int((there.mutual(back) & (there.cosine > ALIKE)).sum()) / n,
        "mmcs": there.mmcs,
        "chance": chance_cosine(len(back.other), d),
    }


def _table(one: EvaluatedSAE, other: EvaluatedSAE, best: BestMatches, scratch: Path) -> pa.Table:
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
