"""The evaluation images, a few at a time: activations, what is to be decoded from them, and the judges' embeddings."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ommatid.activations.columns import from_float16, from_float32
from ommatid.events import Listener, Progress
from ommatid.schemas import judge_columns
from ommatid.store import Artefact

ENTRIES = 2**22
"""Token activations (tokens x latents) held at once, about."""


@dataclass(frozen=True)
class Images:
    """Evaluation images of one step of the stream."""

    shard: int
    """Shard of the activations that they are in."""
    numbers: Tensor
    """images.image, (images,)."""
    x: Tensor
    """Activations, (images, tokens, d_model) float32."""
    target: Tensor
    """What is to be decoded from them, (images, tokens, d_out) float32: x itself, or activations of another hookpoint."""
    judges: list[Tensor]
    """Each judge's embeddings, (images, d_judge) float32; not finite where it failed."""


def iter_images(
    activations: Artefact, target: Artefact | None, d_sae: int, n_images: int, what: str, on_event: Listener, first: int = 0
) -> Iterator[Images]:
    """The evaluation images shard by shard, so many at a time that their activations stay bounded.

    Args:
        activations: What is encoded.
        target: What is to be decoded, where it is other activations.
        d_sae: Latents, for how many images come at a time.
        n_images: Images in all, for those who wait.
        what: Words for them.
        on_event: Hears of progress.
        first: The first shard; those before are done.
    """
    per_image, columns = activations.summary["tokens_per_image"], judge_columns(len(activations.summary["judges"]))
    n = max(1, ENTRIES // (per_image * d_sae))
    parts = list(zip(activations.parts("eval"), activations.parts("embeddings"), strict=True))
    done = sum(_count(activations, tokens) // per_image for tokens, _ in parts[:first])
    for shard, (tokens, embedded) in enumerate(parts[first:], start=first):
        embeddings = _Embeddings(activations.read_part(embedded, ["image", *columns]))
        ours = _iter_tokens(activations, tokens, n * per_image)
        theirs = _iter_tokens(target, tokens, n * per_image) if target else None
        for image, x in ours:
            numbers = image[::per_image].contiguous()
            shape = (len(numbers), per_image)
            y = x if theirs is None else _same_images(image, *next(theirs))
            yield Images(shard, numbers, x.unflatten(0, shape), y.unflatten(0, shape), embeddings.take(numbers))
            done += len(numbers)
            on_event(Progress(what, done, n_images))


def _count(activations: Artefact, part: str) -> int:
    """Rows of a part."""
    with activations.open_part(part) as file:
        return file.metadata.num_rows


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


def load_kinds(activations: Artefact) -> list[str]:
    """Kind of each token of an image; all images have the same tokens."""
    per_image = activations.summary["tokens_per_image"]
    for rows in activations.iter_batches("eval", ["kind"], n_rows=per_image):
        return rows["kind"].to_pylist()
    return []


def load_labels(images: Artefact, of_split: str = "eval") -> dict[int, str]:
    """Class of each image of a split that has one."""
    return _load_column(images, "label", of_split)


def load_classes(images: Artefact) -> dict[int, str]:
    """Class of each evaluation image that has one; none where there are not two classes: they then say nothing of a latent."""
    labels = load_labels(images)
    return labels if len(set(labels.values())) > 1 else {}


def load_paths(images: Artefact) -> dict[int, tuple[str, ...]]:
    """Path from the root of the taxonomy of each evaluation image that has one."""
    return {image: tuple(path.split("/")) for image, path in _load_column(images, "taxonomy").items()}


def _load_column(images: Artefact, column: str, of_split: str = "eval") -> dict[int, str]:
    """Values of the images of a split that have one."""
    found: dict[int, str] = {}
    for batch in images.iter_batches("images", ["image", "split", column], n_rows=4096):
        if column not in batch.schema.names:
            return {}  # written before there was such a column
        rows = zip(*(batch[name].to_pylist() for name in ("image", "split", column)), strict=True)
        found |= {image: value for image, split, value in rows if split == of_split and value is not None}
    return found
