"""The `examples` table: which images show a latent, strong and weak ones, and where in them it fires."""

import math
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ommatid import schemas
from ommatid.config import EvaluateParams
from ommatid.evaluate.firings import Firings
from ommatid.store import Draft

_EXAMPLES_SQL = """
WITH placed AS (
  SELECT latent, image, act,
         row_number() OVER (PARTITION BY latent ORDER BY act DESC, image) AS place,
         count(*) OVER (PARTITION BY latent) AS n
  FROM read_parquet($files)
), tenths AS (
  SELECT *, CAST(10 - floor(10 * (place - 1) / n) AS TINYINT) AS decile FROM placed
), drawn AS (
  -- the strongest are kept whatever their decile; of the others a draw from each decile that has nothing to do with the activation
  SELECT *, row_number() OVER (PARTITION BY latent, decile, place <= $n_top ORDER BY hash(image, latent)) AS draw
  FROM tenths
)
SELECT latent, decile, CAST(row_number() OVER (PARTITION BY latent, decile ORDER BY place) AS INTEGER) AS rank, image, act
FROM drawn
WHERE place <= $n_top OR (decile < 10 AND draw <= $n_per_decile)
ORDER BY latent, decile DESC, rank
"""


def choose_examples(draft: Draft, firings: Firings, params: EvaluateParams) -> pa.Table:
    """Examples of every latent: its `n_top` strongest images, of equals those of lower number, and some of each lower decile beside them.

    DuckDB sorts outside memory where it must.
    """
    settings: dict[str, Any] = {"memory_limit": "1GB", "temp_directory": str(draft.scratch), "preserve_insertion_order": "false"}
    with duckdb.connect(config=settings) as connection:
        values = {"files": firings.files(), "n_top": params.n_top, "n_per_decile": params.n_per_decile}
        return connection.execute(_EXAMPLES_SQL, values).to_arrow_table()


class Heat:
    """Collects the token activations of the chosen examples."""

    def __init__(self, examples: pa.Table, grid: list[int] | None) -> None:
        self._examples = examples
        self._grid = grid
        images = torch.from_numpy(examples["image"].to_numpy().astype(np.int64))
        self._by_image = images.argsort(stable=True)
        self._images = images[self._by_image]
        self._latents = torch.from_numpy(examples["latent"].to_numpy().astype(np.int64))[self._by_image]
        self.heat = torch.zeros(len(examples), math.prod(grid or [0]))
        """Activations of the patches of each example, in order of the images, (examples, patches)."""

    def add(self, numbers: Tensor, acts: Tensor) -> None:
        """Token activations (images, tokens, latents) of some images, in order; the patches come last."""
        if not self._grid:
            return
        first = int(torch.searchsorted(self._images, numbers[0]))
        last = int(torch.searchsorted(self._images, numbers[-1], right=True))
        place = torch.searchsorted(numbers, self._images[first:last])
        shown = numbers[place] == self._images[first:last]  # images of other shards lie between these
        self.heat[first:last][shown] = acts[place[shown], -self.heat.shape[1] :, self._latents[first:last][shown]]

    def table(self, sae: str) -> pa.Table:
        """The `examples` table."""
        n = len(self._examples)
        rows, cols = self._grid or (0, 0)
        heat: Any = pa.nulls(n, pa.list_(pa.float32()))
        if self._grid:
            offsets = pa.array(np.arange(n + 1) * rows * cols, pa.int32())
            heat = pa.ListArray.from_arrays(offsets, pa.array(self.heat[self._by_image.argsort()].flatten().numpy(), pa.float32()))
        columns = {name: self._examples[name] for name in ("latent", "decile", "rank", "image", "act")}
        columns |= {"sae": pa.array([sae] * n, pa.string()), "heat": heat}
        columns |= {"rows": pa.array([rows] * n, pa.int16()), "cols": pa.array([cols] * n, pa.int16())}
        return pa.table({name: columns[name] for name in schemas.EXAMPLES.names}).cast(schemas.EXAMPLES)
