"""The strongest images shown are the strongest there are: planted firings with ties, compared with a sort of all of them."""

from collections.abc import Mapping
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ommatid import schemas
from ommatid.catalog.reader import Catalog
from ommatid.config import EvaluateParams
from ommatid.evaluate.firings import choose_examples
from ommatid.show.pictures.page import N_ACROSS, N_STRONGEST, load_examples
from support import catalog as catalog_artefacts

SIZES = (1, 2, 9, 15, 16, 17, 20, 41, 79, 80, 159, 160, 161, 400)
"""Number of images that fire each latent: fewer than, as many as, and more than give a decile of 16."""
Planted = Mapping[int, dict[int, float]]


class Written:
    """Firings in one file, as written by the evaluation, and the scratch folder of its draft."""

    def __init__(self, folder: Path, planted: Planted) -> None:
        rows = [("s", image, latent, act) for latent, acts in planted.items() for image, act in acts.items()]
        rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
        columns = {name: [row[i] for row in rows] for i, name in enumerate(("sae", "image", "latent", "act"))}
        pq.write_table(pa.table(columns, schema=schemas.FIRINGS), folder / "firings.parquet")
        self.scratch = folder

    def files(self) -> list[str]:
        return [str(self.scratch / "firings.parquet")]


@pytest.fixture(scope="module")
def planted() -> Planted:
    random = np.random.default_rng(0)
    return {
        latent: {int(image): float(act) for image, act in zip(random.permutation(400)[:n], random.integers(1, 60, n) / 8, strict=True)}
        for latent, n in enumerate(SIZES)
    }


@pytest.fixture(scope="module", params=[16, 40])
def opened(request: pytest.FixtureRequest, planted: Planted, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("examples")
    written = Written(folder, planted)
    params = EvaluateParams(image_activation="max", n_top=request.param, n_per_decile=4, baselines=(), max_dead=0.9)
    chosen = choose_examples(written, written, params)  # type: ignore[arg-type]
    with duckdb.connect(str(folder / "c.duckdb")) as connection:
        connection.register("chosen", chosen)
        connection.execute("CREATE TABLE examples AS SELECT 's' AS sae, *, NULL::FLOAT[] AS heat, 0 AS rows, 0 AS cols FROM chosen")
        connection.execute("CREATE TABLE images (image INTEGER, thumbnail BLOB, seen_width FLOAT, seen_height FLOAT)")
        connection.executemany("INSERT INTO images VALUES (?, ?, 1, 1)", [(i, catalog_artefacts.thumbnail(i)) for i in range(400)])
        connection.execute("CREATE TABLE features AS SELECT 1 AS x")
    with Catalog(folder / "c.duckdb") as catalog:
        yield catalog, request.param


def strongest(acts: dict[int, float], n: int) -> list[tuple[int, float]]:
    return sorted(acts.items(), key=lambda of: (-of[1], of[0]))[:n]


def test_all_of_the_strongest_images_are_kept_in_order(opened: tuple[Catalog, int], planted: Planted) -> None:
    catalog, n_top = opened
    for latent, acts in planted.items():
        kept = catalog.rows("SELECT image, act FROM examples WHERE latent = ? ORDER BY decile DESC, rank", [latent])
        assert kept[:n_top] == strongest(acts, n_top)
        rest = catalog.rows("SELECT decile, count(*) FROM examples WHERE latent = ? GROUP BY ALL", [latent])
        assert sum(n for _, n in rest) == len(kept) <= n_top + 9 * 4
        assert len(kept) >= min(len(acts), n_top + 4)


def test_deciles_are_computed_over_all_firing_images(opened: tuple[Catalog, int], planted: Planted) -> None:
    catalog, _ = opened
    for latent, acts in planted.items():
        place = {image: i for i, (image, _) in enumerate(strongest(acts, len(acts)))}
        for decile, image in catalog.rows("SELECT decile, image FROM examples WHERE latent = ?", [latent]):
            assert decile == 10 - 10 * place[image] // len(acts)


def test_the_sixteen_strongest_images_are_shown_first_and_then_weaker_ones(opened: tuple[Catalog, int], planted: Planted) -> None:
    catalog, _ = opened
    for latent, acts in planted.items():
        top, others = load_examples(catalog, {"sae": "s", "latent": latent})
        assert [example.act for example in top] == [act for _, act in strongest(acts, N_STRONGEST)]
        assert all(example.act <= top[-1].act and example.decile < 10 for example in others)
        assert all(sum(e.decile == decile for e in others) <= N_ACROSS for decile in range(1, 10))
