"""The `firings` table, as it comes."""

import numpy as np
import pyarrow as pa
from torch import Tensor

from ommatid import schemas
from ommatid.masks import positive, true_at
from ommatid.store import Draft, part_name

FIRINGS_PER_PART = 2**20
"""Rows."""


class Firings:
    """Writes image-level firings as they come, in parts.

    They wait in arrays made once: small arrays that live on between the large short-lived ones of every step leave holes in the
    heap that nothing fits, and memory grew by 2 GB over 18,000 images.
    """

    def __init__(self, draft: Draft, sae: str) -> None:
        self._draft = draft
        self._sae = sae
        self._waiting = {name: np.empty(FIRINGS_PER_PART, type_) for name, type_ in (("image", "i4"), ("latent", "i4"), ("act", "f4"))}
        self._n_waiting = 0
        self._n_parts = 0

    def add(self, numbers: Tensor, acts: Tensor) -> None:
        """Image numbers (images,) and their image-level activations (images, d_sae)."""
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
        """Write what still waits."""
        if self._n_waiting or not self._n_parts:
            self._flush()

    def files(self) -> list[str]:
        """Paths of the parts written."""
        return [str(self._draft.local(part_name("firings", i))) for i in range(self._n_parts)]

    def _flush(self) -> None:
        n = self._n_waiting
        names = pa.array(np.full(n, self._sae, dtype=object), pa.string())
        table = pa.table({"sae": names, **{name: column[:n] for name, column in self._waiting.items()}}, schema=schemas.FIRINGS)
        self._draft.write_table(part_name("firings", self._n_parts), table, compression="zstd")
        self._n_waiting, self._n_parts = 0, self._n_parts + 1
