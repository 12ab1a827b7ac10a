"""The evaluation split in batches: activations, reconstruction targets and judges' embeddings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from ommatid.activations.columns import from_float16, from_float32
from ommatid.events import Listener, Progress
from ommatid.schemas import judge_columns
from ommatid.store import Artefact

ENTRIES = 2**22
"""Approximate number of latent activations (tokens x latents) held in memory at once."""


@dataclass(frozen=True)
class Images:
    """A batch of evaluation images from one shard."""

    shard: int
    """Index of the shard of activations that holds the images."""
    numbers: Int64[Tensor, " images"]
    """Number of each image (`images.image`), (images,) int64."""
    x: Float32[Tensor, "images tokens d_model"]
    """Activations, (images, tokens, d_model) float32."""
    target: Float32[Tensor, "images tokens d_out"]
    """Reconstruction target, (images, tokens, d_out) float32: `x` itself or, for a transcoder, activations of another hookpoint."""
    judges: list[Float32[Tensor, "images _d_judge"]]
    """Embeddings by each judge, (images, d_judge) float32; not finite where the judge failed on an image."""


def iter_images(
    activations: Artefact, target: Artefact | None, d_sae: int, n_images: int, what: str, on_event: Listener, first: int = 0
) -> Iterator[Images]:
    """Iterate over the evaluation images shard by shard, in batches small enough to bound the memory that their latents take.

    Args:
        activations: Activations to encode.
        target: Activations to decode; None if they are those that are encoded.
        d_sae: Number of latents, from which the size of a batch follows.
        n_images: Number of evaluation images, for the progress events.
        what: Name of the work in the progress events.
        on_event: Called with each progress event and warning.
        first: Index of the shard to begin with.

    Yields:
        Batches in the order of the activations; none spans two shards.
    """
    per_image, columns = activations.summary["tokens_per_image"], judge_columns(len(activations.summary["judges"]))
    n = max(1, ENTRIES // (per_image * d_sae))
    parts = list(zip(activations.parts("eval"), activations.parts("embeddings"), strict=True))
    done = sum(_count(activations, tokens) // per_image for tokens, _ in parts[:first])
    for shard, (tokens, embedded) in enumerate(parts[first:], start=first):
        embeddings = Embeddings(activations.read_part(embedded, ["image", *columns]))
        targets = _iter_tokens(target, tokens, n * per_image) if target else None
        for image, x in _iter_tokens(activations, tokens, n * per_image):
            numbers = image[::per_image].contiguous()
            shape = (len(numbers), per_image)
            y = x if targets is None else _same_images(image, *next(targets))
            yield Images(shard, numbers, x.unflatten(0, shape), y.unflatten(0, shape), embeddings.take(numbers))
            done += len(numbers)
            on_event(Progress(what, done, n_images))


def iter_image_activations(
    evaluation: Artefact, activations: Artefact, judges: Sequence[str]
) -> Iterator[tuple[Float32[Tensor, "images d_sae"], list[Float32[Tensor, "images _d_judge"]]]]:
    """Iterate over the evaluation images in the order of the activations, without encoding any.

    Args:
        evaluation: Evaluation of an SAE, of whose firings the image-level activations are made.
        activations: Activations of the same images.
        judges: Names of judges.

    Yields:
        Image-level activations of some images, and the embeddings of the images by each judge.
    """
    known = [judge["judge"] for judge in activations.summary["judges"]]
    of_all = dict(zip(known, judge_columns(len(known)), strict=True))
    columns = [of_all[judge] for judge in judges]
    d_sae, per_image = evaluation.summary["n_latents"], activations.summary["tokens_per_image"]
    fired, n = _Fired(evaluation), max(1, ENTRIES // d_sae)
    for tokens, embedded in zip(activations.parts("eval"), activations.parts("embeddings"), strict=True):
        embeddings = Embeddings(activations.read_part(embedded, ["image", *columns]))
        numbers = activations.read_part(tokens, ["image"])["image"].to_numpy()[::per_image].astype(np.int64)
        for start in range(0, len(numbers), n):
            some = numbers[start : start + n]
            yield fired.take(some, d_sae), embeddings.take(torch.from_numpy(some))


class _Fired:
    """Firings of an evaluation, which are in the order of its images."""

    def __init__(self, evaluation: Artefact) -> None:
        self._batches = evaluation.iter_batches("firings", ["image", "latent", "act"], n_rows=2**18)
        self._rest: list[np.ndarray] = [np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)]

    def take(self, numbers: Int64[np.ndarray, " images"], d_sae: int) -> Float32[Tensor, "images d_sae"]:
        """Return the activations of the next images, (images, d_sae), given their numbers."""
        place = {number: i for i, number in enumerate(numbers.tolist())}
        while not len(self._rest[0]) or self._rest[0][-1] in place:  # until another image begins
            batch = next(self._batches, None)
            if batch is None:
                break
            new = [batch[name].to_numpy() for name in ("image", "latent", "act")]
            self._rest = [np.concatenate([old, more.astype(old.dtype)]) for old, more in zip(self._rest, new, strict=True)]
        is_mine = np.isin(self._rest[0], numbers)
        image, latent, act = (column[is_mine] for column in self._rest)
        self._rest = [column[~is_mine] for column in self._rest]
        acts = torch.zeros(len(numbers), d_sae)
        rows = torch.tensor([place[number] for number in image.tolist()], dtype=torch.int64)
        acts[rows, torch.from_numpy(latent)] = torch.from_numpy(act)
        return acts


def _count(activations: Artefact, part: str) -> int:
    """Return the number of rows of a part."""
    with activations.open_part(part) as file:
        return file.metadata.num_rows


def _iter_tokens(activations: Artefact, part: str, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield image numbers (rows,) int64 and activations (rows, d_model) float32 of a part, `n` rows at a time."""
    with activations.open_part(part) as file:
        for rows in file.iter_batches(n, columns=["image", "x"]):
            yield torch.from_numpy(rows["image"].to_numpy().astype(np.int64)), from_float16(rows["x"]).float()


def _same_images(
    image: Int64[Tensor, " rows"], target_image: Int64[Tensor, " rows"], target: Float32[Tensor, "rows d_out"]
) -> Float32[Tensor, "rows d_out"]:
    """Return the target, having checked that its rows are of the same images."""
    assert torch.equal(image, target_image), (
        f"rows of the two hookpoints belong to different images: {image[:3].tolist()}, {target_image[:3].tolist()}"
    )
    return target


class Embeddings:
    """Judges' embeddings of the images of one shard, which are in ascending order."""

    def __init__(self, rows: pa.Table) -> None:
        self._images = torch.from_numpy(rows["image"].to_numpy().astype(np.int64))
        self._judges = [from_float32(rows[name]) for name in rows.column_names if name != "image"]

    def take(self, numbers: Int64[Tensor, " images"]) -> list[Float32[Tensor, "images _d_judge"]]:
        """Return each judge's embeddings of images, (images, d_judge), given their numbers."""
        rows = torch.searchsorted(self._images, numbers)
        return [embeddings[rows] for embeddings in self._judges]


def load_kinds(activations: Artefact) -> list[str]:
    """Load the kind of each token of an image; all images have the same tokens."""
    per_image = activations.summary["tokens_per_image"]
    for rows in activations.iter_batches("eval", ["kind"], n_rows=per_image):
        return rows["kind"].to_pylist()
    return []
