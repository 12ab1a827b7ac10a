"""The tables `firings`, `examples` and `near_misses`: images on which each latent fires, how strongly and where, or nearly fires."""

import math
from collections.abc import Callable
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from ommatid import schemas
from ommatid.compute.checkpoint import Accumulator
from ommatid.compute.nonzero import positive, true_at
from ommatid.compute.undefined import nullable
from ommatid.config import EvaluateParams
from ommatid.metrics import TopImages
from ommatid.sae.model import SAE
from ommatid.store import Draft, part_name

FIRINGS_PER_PART = 2**20
"""Number of rows of a part of the table `firings`."""


class Firings(Accumulator):
    """Writer of the table `firings`, which collects image-level firings and writes a part whenever enough have come together.

    Firings are collected in arrays that are allocated once. Small arrays that outlive the large temporary ones of each step fragment the
    heap: with them, memory grew by 2 GB over 18,000 images.
    """

    STATE = ("_waiting", "_n_waiting", "_n_parts")

    def __init__(self, draft: Draft, sae: str) -> None:
        self._draft = draft
        self._sae = sae
        self._waiting = {name: np.empty(FIRINGS_PER_PART, type_) for name, type_ in (("image", "i4"), ("latent", "i4"), ("act", "f4"))}
        self._n_waiting = 0
        self._n_parts = 0

    def add(self, numbers: Int64[Tensor, " images"], acts: Float32[Tensor, "images d_sae"]) -> None:
        """Add the firings of a batch of images.

        Args:
            numbers: Number of each image, (images,).
            acts: Image-level activations, (images, d_sae).
        """
        at = true_at(positive(acts).bool())
        rows, latents = at // acts.shape[1], at % acts.shape[1]
        new = {"image": numbers[rows].numpy(), "latent": latents.numpy(), "act": acts[rows, latents].numpy()}
        start = 0
        while start < len(rows):
            n = min(len(rows) - start, FIRINGS_PER_PART - self._n_waiting)
            for name, column in self._waiting.items():
                column[self._n_waiting : self._n_waiting + n] = new[name][start : start + n]
            start, self._n_waiting = start + n, self._n_waiting + n
            if self._n_waiting == FIRINGS_PER_PART:
                self._flush()

    def close(self) -> None:
        """Write the last part; a table without firings has one empty part."""
        if self._n_waiting or not self._n_parts:
            self._flush()

    def files(self) -> list[str]:
        """Return the paths of the parts written so far."""
        return [str(self._draft.local(part_name("firings", i))) for i in range(self._n_parts)]

    def _flush(self) -> None:
        n = self._n_waiting
        names = pa.array(np.full(n, self._sae, dtype=object), pa.string())
        table = pa.table({"sae": names, **{name: column[:n] for name, column in self._waiting.items()}}, schema=schemas.FIRINGS)
        self._draft.write_table(part_name("firings", self._n_parts), table, compression="zstd")
        self._n_waiting, self._n_parts = 0, self._n_parts + 1


_EXAMPLES_SQL = """
WITH placed AS (
  SELECT latent, image, act,
         row_number() OVER (PARTITION BY latent ORDER BY act DESC, image) AS place,
         count(*) OVER (PARTITION BY latent) AS n
  FROM read_parquet($files)
), tenths AS (
  SELECT *, CAST(10 - floor(10 * (place - 1) / n) AS TINYINT) AS decile FROM placed
), drawn AS (
  -- the strongest images are all kept; from each lower decile images are drawn by a hash, which is independent of the activation
  SELECT *, row_number() OVER (PARTITION BY latent, decile, place <= $n_top ORDER BY hash(image, latent)) AS draw
  FROM tenths
)
SELECT latent, decile, CAST(row_number() OVER (PARTITION BY latent, decile ORDER BY place) AS INTEGER) AS rank, image, act
FROM drawn
WHERE place <= $n_top OR (decile < 10 AND draw <= $n_per_decile)
ORDER BY latent, decile DESC, rank
"""


def choose_examples(draft: Draft, firings: Firings, params: EvaluateParams) -> pa.Table:
    """Choose examples of every latent: its `n_top` strongest images, and `n_per_decile` more from each decile below the highest.

    Of images with equal activations the one with the lower number ranks first. DuckDB sorts on disk what does not fit into memory.

    Args:
        draft: Draft whose scratch folder DuckDB may use.
        firings: Writer of the table `firings`, closed.
        params: The section `evaluate`.

    Returns:
        The columns `latent`, `decile`, `rank`, `image` and `act` of the table `examples`.
    """
    settings: dict[str, Any] = {"memory_limit": "1GB", "temp_directory": str(draft.scratch), "preserve_insertion_order": "false"}
    with duckdb.connect(config=settings) as connection:
        values = {"files": firings.files(), "n_top": params.n_top, "n_per_decile": params.n_per_decile}
        return connection.execute(_EXAMPLES_SQL, values).to_arrow_table()


class HeatMaps(Accumulator):
    """Heat maps of the chosen examples: the activation of the example's latent on each patch."""

    STATE = ("heat",)

    def __init__(self, examples: pa.Table, grid: list[int] | None) -> None:
        self._examples = examples
        self._grid = grid
        images = torch.from_numpy(examples["image"].to_numpy().astype(np.int64))
        self._by_image = images.argsort(stable=True)
        self._images = images[self._by_image]
        self._latents = torch.from_numpy(examples["latent"].to_numpy().astype(np.int64))[self._by_image]
        self.heat = torch.zeros(len(examples), math.prod(grid or [0]))
        """Activation on each patch, (examples, patches) float32, with examples in the order of their images."""

    def add(self, numbers: Int64[Tensor, " images"], acts: Float32[Tensor, "images tokens latents"]) -> None:
        """Add a batch of images.

        Args:
            numbers: Number of each image, ascending, (images,).
            acts: Token activations, (images, tokens, latents); the patches are the last tokens.
        """
        if not self._grid:
            return
        first = int(torch.searchsorted(self._images, numbers[0]))
        last = int(torch.searchsorted(self._images, numbers[-1], right=True))
        place = torch.searchsorted(numbers, self._images[first:last])
        shown = numbers[place] == self._images[first:last]  # the range may span images of other shards
        self.heat[first:last][shown] = acts[place[shown], -self.heat.shape[1] :, self._latents[first:last][shown]]

    def table(self, sae: str) -> pa.Table:
        """Return the table `examples`."""
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


class NearMisses(Accumulator):
    """Near misses of every latent: the images on which it does not fire but comes nearest to firing.

    Of equally near images, those with the lower numbers are kept.

    Args:
        sae: The SAE.
        reach: Function that takes the largest margin over the tokens that count for image-level activations.
    """

    STATE = ("_nearest",)

    def __init__(self, sae: SAE, reach: Callable[[Tensor], Tensor]) -> None:
        self._sae = sae
        self._reach = reach
        self._nearest = TopImages(sae.n_latents, schemas.N_NEAR_MISSES, -math.inf)

    def add(
        self, numbers: Int64[Tensor, " images"], margins: Float32[Tensor, "images tokens d_sae"], acts: Float32[Tensor, "images d_sae"]
    ) -> None:
        """Add a batch of images.

        Args:
            numbers: Number of each image, (images,).
            margins: Margins of the tokens (see `SAE.encode_with_margins`), (images, tokens, d_sae).
            acts: Image-level activations, (images, d_sae).
        """
        # A margin may exceed 0 by rounding although the latent does not fire: the activation decides.
        self._nearest.add(self._reach(margins).clamp(max=0.0).masked_fill_(acts > 0, -math.inf), numbers)

    def table(self, sae: str, is_dead: Bool[Tensor, " d_sae"]) -> pa.Table:
        """Return the table `near_misses`, in which dead latents have no rows."""
        margins, images = self._nearest.acts.T, self._nearest.images.T
        latent, place = ((margins > -math.inf) & ~is_dead[:, None]).nonzero(as_tuple=True)
        margin, threshold = margins[latent, place], self._sae.thresholds[latent]
        columns = {
            "sae": pa.array([sae] * len(latent), pa.string()),
            "latent": latent.int().numpy(),
            "rank": (place + 1).int().numpy(),
            "image": images[latent, place].int().numpy(),
            "margin": margin.numpy(),
            "closeness": nullable(torch.where(threshold > 0, 1 + margin / threshold, math.nan)),
        }
        return pa.table(columns, schema=schemas.NEAR_MISSES)
