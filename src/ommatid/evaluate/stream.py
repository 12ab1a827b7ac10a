"""The evaluation images, a few at a time: activations, what is to be decoded from them, and the judges' embeddings."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ommatid.events import Listener, Progress
from ommatid.schemas import judge_columns
from ommatid.store import Artefact
from ommatid.tensors import from_float16, from_float32

ENTRIES = 2**22
"""Token activations (tokens x latents) held at once, about."""


@dataclass(frozen=True)
class Images:
    """Evaluation images of one step of the stream."""

    numbers: Tensor
    """images.image, (images,)."""
    x: Tensor
    """Activations, (images, tokens, d_model) float32."""
    target: Tensor
    """What is to be decoded from them, (images, tokens, d_out) float32: x itself, or activations of another hookpoint."""
    judges: list[Tensor]
    """Each judge's embeddings, (images, d_judge) float32; not finite where it failed."""


def iter_images(
    activations: Artefact, target: Artefact | None, d_sae: int, n_images: int, what: str, on_event: Listener
) -> Iterator[Images]:
    """The evaluation images shard by shard, so many at a time that their activations stay bounded."""
    per_image, columns = activations.summary["tokens_per_image"], judge_columns(len(activations.summary["judges"]))
    n = max(1, ENTRIES // (per_image * d_sae))
    done = 0
    for tokens, embedded in zip(activations.parts("eval"), activations.parts("embeddings"), strict=True):
        embeddings = _Embeddings(activations.read_part(embedded, ["image", *columns]))
        ours = _iter_tokens(activations, tokens, n * per_image)
        theirs = _iter_tokens(target, tokens, n * per_image) if target else None
        for image, x in ours:
            numbers = image[::per_image].contiguous()
            shape = (len(numbers), per_image)
            y = x if theirs is None else _same_images(image, *next(theirs))
            yield Images(numbers, x.unflatten(0, shape), y.unflatten(0, shape), embeddings.take(numbers))
            done += len(numbers)
            on_event(Progress(what, done, n_images))


def _iter_tokens(activations: Artefact, part: str, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (rows,) int64 and activations (rows, d_model) float32 of a part, n rows at a time."""
    with activations.open_part(part) as file:
        for rows in file.iter_batches(n, columns=["image", "x"]):
            yield torch.from_numpy(rows["image"].to_numpy().astype(np.int64)), from_float16(rows["x"]).float()


def _same_images(image: Tensor, other: Tensor, y: Tensor) -> Tensor:
    assert torch.equal(image, other), f"rows of two hookpoints are of other images: {image[:3].tolist()}, {other[:3].tolist()}"
    return y


class _Embeddings:
    """The judges' embeddings of one shard's images, which are in order."""

    def __init__(self, rows: pa.Table) -> None:
        self._images = torch.from_numpy(rows["image"].to_numpy().astype(np.int64))
        self._judges = [from_float32(rows[name]) for name in rows.column_names if name != "image"]

    def take(self, numbers: Tensor) -> list[Tensor]:
        """Rows of these images of each judge, (images, d_judge)."""
        rows = torch.searchsorted(self._images, numbers)
        return [embeddings[rows] for embeddings in self._judges]


def load_labels(images: Artefact) -> dict[int, str]:
    """Class of each evaluation image that has one."""
    labels: dict[int, str] = {}
    for batch in images.iter_batches("images", ["image", "split", "label"], n_rows=4096):
        rows = zip(*(batch[name].to_pylist() for name in ("image", "split", "label")), strict=True)
        labels |= {image: label for image, split, label in rows if split == "eval" and label is not None}
    return labels
