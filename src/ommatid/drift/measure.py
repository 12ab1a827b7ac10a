"""What an SAE does on some images: which latents fire on each, how strongly, and how much of its activations is not explained."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from ommatid.activations.columns import from_float16
from ommatid.config.evaluate import ImageActivation
from ommatid.errors import ArtefactError
from ommatid.events import Listener, Progress
from ommatid.sae.model import SAE
from ommatid.store import Artefact

ENTRIES = 2**23
"""Approximate number of latent activations (tokens x latents) held in memory at once."""


@dataclass(frozen=True)
class Measured:
    """What an SAE does on some images."""

    images: Int64[np.ndarray, " images"]
    """Number of each image, ascending, `(images,)`."""
    error: Float64[np.ndarray, " images"]
    """Sum over each image's tokens of the squared distance between target and reconstruction, `(images,)`."""
    variance: Float64[np.ndarray, " images"]
    """Sum over each image's tokens of the squared distance between target and the mean token of all of these images, `(images,)`."""
    rows: Int64[np.ndarray, " firings"]
    """Row in `images` of the image of each firing, `(firings,)`."""
    latents: Int64[np.ndarray, " firings"]
    """Latent of each firing, `(firings,)`."""
    acts: Float32[np.ndarray, " firings"]
    """Image-level activation of each firing, above 0, `(firings,)`."""


def measure(
    sae: SAE,
    activations: Artefact,
    target: Artefact | None,
    images: Mapping[str, Int64[np.ndarray, " images"]],
    image_activation: ImageActivation,
    on_event: Listener,
) -> Measured:
    """Encode and decode all tokens of some images.

    Args:
        sae: The SAE.
        activations: Activations to encode.
        target: Activations that a transcoder decodes; None for an autoencoder.
        images: Numbers of the images in each table of activations, `train` and `eval`.
        image_activation: How the activations of an image's tokens become one, the value of `evaluate.image_activation`.
        on_event: Called with each progress event.

    Returns:
        The measurements.

    Raises:
        ArtefactError: No token of an image is in its table.
    """
    numbers = np.sort(np.concatenate([*images.values(), np.empty(0, np.int64)]).astype(np.int64))
    sums, n = _Sums(len(numbers), sae), max(1, ENTRIES // sae.n_latents)
    for table, wanted in images.items():
        parts = activations.parts(table) if len(wanted) else []
        for done, part in enumerate(parts, start=1):
            for batch in _iter_tokens(activations, target, part, np.sort(wanted), n):
                sums.add(np.searchsorted(numbers, batch.images), batch, image_activation)
            on_event(Progress(f"compare images: {table} activations", done, len(parts)))
    if missing := int((sums.n_tokens == 0).sum()):
        raise ArtefactError(f"{activations.url}: has no tokens of {missing} of {len(numbers)} images; run `dvc repro extract`")
    rows, latents, acts = sums.firings(image_activation)
    return Measured(numbers, sums.error, sums.variance(), rows, latents, acts)


@dataclass(frozen=True)
class _Tokens:
    """Some tokens of the wanted images."""

    images: Int64[np.ndarray, " tokens"]
    is_cls: np.ndarray
    x: Float32[Tensor, "tokens d_model"]
    target: Float32[Tensor, "tokens d_out"]


def _iter_tokens(
    activations: Artefact, target: Artefact | None, part: str, wanted: Int64[np.ndarray, " images"], n: int
) -> Iterator[_Tokens]:
    """Yield the tokens of the wanted images in a part, at most `n` at a time."""
    decoded, first = target and target.read_part(part, ["x"])["x"], 0
    with activations.open_part(part) as file:
        for group in range(file.num_row_groups):
            images = file.read_row_group(group, ["image"])["image"].to_numpy().astype(np.int64)
            place = np.searchsorted(wanted, images).clip(max=len(wanted) - 1)
            rows = np.flatnonzero(wanted[place] == images)
            before, first = first, first + len(images)
            if not len(rows):
                continue
            found = file.read_row_group(group, ["kind", "x"]).take(rows)
            for start in range(0, len(rows), n):
                some, of = found.slice(start, n), rows[start : start + n]
                x = from_float16(some["x"]).float()
                y = x if decoded is None else from_float16(decoded.take(before + of)).float()
                yield _Tokens(images[of], np.array(some["kind"]) == "cls", x, y)


class _Sums:
    """Sums over the tokens of each image."""

    def __init__(self, n_images: int, sae: SAE) -> None:
        self._sae = sae
        self._n_images = n_images
        self.n_tokens = np.zeros(n_images, np.int64)
        self.error = np.zeros(n_images)
        self._squares = np.zeros(n_images)
        self._sums = torch.zeros(n_images, sae.d_out, dtype=torch.float64)
        self._keys: list[np.ndarray] = []
        self._acts: list[np.ndarray] = []

    def add(self, rows: Int64[np.ndarray, " tokens"], tokens: _Tokens, image_activation: ImageActivation) -> None:
        """Add tokens, given the row of each one's image."""
        acts = self._sae.encode(tokens.x)
        error = (tokens.target - self._sae.decode(acts)).square().sum(1)
        self.n_tokens += np.bincount(rows, minlength=self._n_images)
        self.error += np.bincount(rows, error.numpy(), self._n_images)
        self._squares += np.bincount(rows, tokens.target.square().sum(1).numpy(), self._n_images)
        self._sums.index_add_(0, torch.from_numpy(rows), tokens.target.double())
        if image_activation == "cls":
            acts[torch.from_numpy(~tokens.is_cls)] = 0
        token, latent = acts.nonzero(as_tuple=True)
        keys = rows[token.numpy()] * self._sae.n_latents + latent.numpy()
        self._reduce(keys, acts[token, latent].numpy(), image_activation)

    def _reduce(self, keys: np.ndarray, acts: np.ndarray, image_activation: ImageActivation) -> None:
        """Keep one number for each image and latent of a batch: the largest activation, or the sum if they are averaged."""
        order = np.argsort(keys, kind="stable")
        keys, acts = keys[order], acts[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        if len(starts):
            self._keys.append(keys[starts])
            self._acts.append((np.add if image_activation == "mean" else np.maximum).reduceat(acts, starts))

    def firings(self, image_activation: ImageActivation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the row of the image, the latent and the image-level activation of each firing, by image and latent."""
        keys, acts = self._keys, self._acts
        self._keys, self._acts = [], []
        if keys:
            self._reduce(np.concatenate(keys), np.concatenate(acts), image_activation)
        key, act = (self._keys[0], self._acts[0]) if self._keys else (np.empty(0, np.int64), np.empty(0, np.float32))
        row, latent = np.divmod(key, self._sae.n_latents)
        return row, latent, act / self.n_tokens[row].astype(np.float32) if image_activation == "mean" else act

    def variance(self) -> Float64[np.ndarray, " images"]:
        """Return Σ‖y − ȳ‖² over the tokens of each image, where ȳ is the mean over all tokens."""
        mean = self._sums.sum(0) / max(1, int(self.n_tokens.sum()))
        return self._squares - 2 * (self._sums @ mean).numpy() + self.n_tokens * float(mean.square().sum())
