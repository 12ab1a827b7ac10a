"""Evidence: the firings and images of each latent from which its labels are made and on which they are tested.

The naming half of the evaluation images (see images/eval_split.py) is used to make labels and to set detection thresholds. The held-out
half is used to score labels: firing images are compared with silent images, on which the latent does not fire. Half of the silent images
are random, and half are hard: they fire the latents with the nearest directions.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from ommatid.compute.evenly import spread_evenly
from ommatid.compute.nearest import nearest
from ommatid.config import LabelParams
from ommatid.images.eval_split import EvalSplit, LatentFirings
from ommatid.images.reference import load_file
from ommatid.label.labellers.base import Case, Example
from ommatid.metrics import unit
from ommatid.sae.model import SAE
from ommatid.store import Artefact, Draft
from ommatid.vlm.preprocess import Preprocess

MAX_FIRING = 64
"""Largest number of firing images in a test, sampled regardless of their activation."""
N_HARD_LATENTS = 8
"""Number of nearest latents whose images serve as hard negatives."""


@dataclass(frozen=True)
class Test:
    """Images of one half on which labels are tested, in an order that is independent of their activations."""

    positive: Int[np.ndarray, " firing"]
    """Rows of the images on which the latent fires."""
    acts: Float[np.ndarray, " firing"]
    """Image-level activation of each firing image."""
    hard: Int[np.ndarray, " hard"]
    """Rows of silent images that fire the latents with the nearest directions."""
    random: Int[np.ndarray, " random"]
    """Rows of other silent images."""

    @property
    def negative(self) -> Int[np.ndarray, " silent"]:
        """Rows of all silent images."""
        return np.concatenate([self.hard, self.random])

    @property
    def rows(self) -> Int[np.ndarray, " rows"]:
        """Rows of all images."""
        return np.concatenate([self.positive, self.negative])


def draw_test(
    fired: LatentFirings, split: EvalSplit, held_out: bool, neighbours: Sequence[Int[np.ndarray, " _rows"]], rng: np.random.Generator
) -> Test:
    """Sample firing images of one half, and as many silent ones.

    Args:
        fired: Firings of the latent.
        split: The evaluation images.
        held_out: Whether to sample from the held-out half.
        neighbours: For each of the nearest latents, rows of images that fire it.
        rng: Source of randomness.

    Returns:
        The test.
    """
    drawn = rng.permutation(np.flatnonzero(split.is_held_out[fired.rows] == held_out))[:MAX_FIRING]
    hard, random = draw_negatives(fired, split, held_out, neighbours, len(drawn), rng)
    return Test(fired.rows[drawn], fired.acts[drawn], hard, random)


def draw_negatives(
    fired: LatentFirings,
    split: EvalSplit,
    held_out: bool,
    neighbours: Sequence[Int[np.ndarray, " _rows"]],
    n: int,
    rng: np.random.Generator,
) -> tuple[Int[np.ndarray, " hard"], Int[np.ndarray, " random"]]:
    """Sample at most `n` silent images of one half.

    Args:
        fired: Firings of the latent.
        split: The evaluation images.
        held_out: Whether to sample from the held-out half.
        neighbours: For each of the nearest latents, rows of images that fire it.
        n: Number of images.
        rng: Source of randomness.

    Returns:
        Rows of hard images, at most half of all, and rows of random images.
    """
    silent = split.is_held_out == held_out
    silent[fired.rows] = False
    near = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *neighbours]))
    hard = rng.permutation(near[silent[near]])[: n // 2]
    silent[hard] = False
    return hard, rng.permutation(np.flatnonzero(silent))[: n - len(hard)]


@dataclass(frozen=True)
class Strongest:
    """The images of the naming half on which a latent fires most strongly."""

    rows: Int64[Tensor, " images"]
    """Rows of the images in `EvalSplit`, `(images,)` int64, strongest first."""
    acts: Float64[Tensor, " images"]
    """Image-level activation of each, `(images,)` float64."""


class Evidence:
    """Evidence about every latent that fires, collected in one pass over the firings.

    Args:
        split: The evaluation images.
        params: The `label` section of the params.
        neighbours: Latents with the nearest directions, `(d_sae, n)`.
    """

    def __init__(self, split: EvalSplit, params: LabelParams, neighbours: Int64[np.ndarray, "d_sae n"]) -> None:
        self._split = split
        self._params = params
        self._neighbours = neighbours
        self.strongest: dict[int, Strongest] = {}
        """Strongest images of the latents with enough firing images in both halves; labels from images exist only for these latents."""
        self._samples: dict[int, np.ndarray] = {}
        """Rows of some images that fire each latent, which are hard negatives for its neighbours."""

    def fill(self, all_fired: Iterator[LatentFirings]) -> None:
        """Collect the evidence from the firings of all latents."""
        for fired in all_fired:
            self._samples[fired.latent] = fired.rows[:: max(1, len(fired.rows) // MAX_FIRING)][:MAX_FIRING]
            naming = np.flatnonzero(~self._split.is_held_out[fired.rows])
            if min(len(naming), len(fired.rows) - len(naming)) >= self._params.min_examples:
                first = naming[: self._params.n_examples]
                rows, acts = fired.rows[first].astype(np.int64), fired.acts[first]
                self.strongest[fired.latent] = Strongest(torch.from_numpy(rows), torch.from_numpy(acts))

    def neighbour_rows(self, latent: int) -> list[Int[np.ndarray, " _rows"]]:
        """Return, for each of the latents with the nearest directions, rows of images that fire it."""
        return [self._samples[i] for i in self._neighbours[latent].tolist() if i in self._samples]


def nearest_latents(sae: Artefact) -> Int64[np.ndarray, "d_sae n"]:
    """Return the other latents with the nearest directions, nearest first, `(d_sae, N_HARD_LATENTS)` int64."""
    directions = unit(SAE.load(sae.path).W_dec).float()
    n = min(N_HARD_LATENTS, len(directions) - 1)
    return nearest(directions, directions, n, np.arange(len(directions))).others


SPOOL = "scratch/encoded.bin"
"""File of the encoded images in the draft."""
OFFSETS = "scratch/encoded.npy"
"""Table of the images in `SPOOL`: offset of each, and the share of it that the model sees."""
SIZE = ("width", "height")
"""Columns of the size of an image, in pixels."""


class Spool:
    """Encoded evaluation images, one after the other in a scratch file from which each can be read by itself.

    The images artefact is no substitute: reading one image from it means reading a row group of 128, and the images of a latent are
    scattered over the data set. The file is written once for all SAEs, and a run that continues an interrupted one reuses it.

    Args:
        images: The images artefact.
        split: The evaluation images.
        draft: Draft in whose scratch folder the file lies.
        preprocess: The model's preprocessing, which decides what it sees of each image.
    """

    def __init__(self, images: Artefact, split: EvalSplit, draft: Draft, preprocess: Preprocess) -> None:
        if not (draft.has(OFFSETS) and draft.has(SPOOL)):
            _write_spool(images, split, draft, preprocess)
        table = np.load(draft.path / OFFSETS)
        self._offsets, self._seen = table["offset"], table["seen"]
        self._path = draft.path / SPOOL

    def read(self, row: int) -> tuple[bytes, tuple[float, float]]:
        """Return the image file of a row of `EvalSplit`, and the share of its width and height that the model sees."""
        with self._path.open("rb") as file:
            file.seek(int(self._offsets[row]))
            encoded = file.read(int(self._offsets[row + 1] - self._offsets[row]))
        return load_file(encoded), (float(self._seen[row][0]), float(self._seen[row][1]))


def _write_spool(images: Artefact, split: EvalSplit, draft: Draft, preprocess: Preprocess) -> None:
    table = np.zeros(len(split.images) + 1, dtype=[("offset", "i8"), ("seen", "f4", 2)])
    row = 0
    with draft.write_file(SPOOL) as path, path.open("wb") as file:
        for batch in images.iter_batches("images", ["split", *SIZE, "encoded"], n_rows=128):
            batch = batch.filter([name == "eval" for name in batch["split"].to_pylist()])
            end = row + batch.num_rows
            sizes = [file.write(encoded.as_buffer()) for encoded in batch["encoded"]]
            table["offset"][row + 1 : end + 1] = table["offset"][row] + np.cumsum(sizes, dtype=np.int64)
            table["seen"][row:end] = [_seen(preprocess, *size) for size in zip(*(batch[name].to_pylist() for name in SIZE), strict=True)]
            row = end
    assert row == len(split.images), f"{row} evaluation images, expected {len(split.images)}"
    with draft.write_file(OFFSETS) as path, path.open("wb") as file:
        np.save(file, table)


def _seen(preprocess: Preprocess, width: int, height: int) -> tuple[float, float]:
    """Return the share of an image's width and height, around its centre, that the model sees."""
    left, top, right, bottom = preprocess.box(width, height)
    return (right - left) / width, (bottom - top) / height


@dataclass(frozen=True)
class HeatMaps:
    """Heat maps of a latent's examples."""

    latent: int
    """Index of the latent."""
    heat: Mapping[int, np.ndarray | None]
    """Activation of each patch, `(rows, cols)` float32, by the number of the image; None if tokens have no place in the image."""


def iter_heat_maps(evaluation: Artefact) -> Iterator[HeatMaps]:
    """Iterate over the heat maps in the table `examples`, one latent at a time, in order."""
    latent, heat = -1, {}
    for batch in evaluation.iter_batches("examples", ["latent", "image", "heat", "rows", "cols"], n_rows=4096):
        for row in batch.to_pylist():
            if row["latent"] != latent:
                if heat:
                    yield HeatMaps(latent, heat)
                latent, heat = row["latent"], {}
            values = row["heat"]
            heat[row["image"]] = None if values is None else np.array(values, dtype=np.float32).reshape(row["rows"], row["cols"])
    if heat:
        yield HeatMaps(latent, heat)


class Cases:
    """Makes the cases of an SAE's latents.

    Args:
        spool: The encoded images.
        split: The evaluation images.
        evidence: Evidence about the latents.
        params: The `label` section of the params.
    """

    def __init__(self, spool: Spool, split: EvalSplit, evidence: Evidence, params: LabelParams) -> None:
        self._spool = spool
        self._split = split
        self._evidence = evidence
        self._params = params

    def iter_cases(self, all_fired: Iterator[LatentFirings], all_heat_maps: Iterator[HeatMaps], wanted: Collection[int]) -> Iterator[Case]:
        """Iterate over the cases of some latents, in order; the images of a case are read when it is yielded.

        Args:
            all_fired: Firings of all latents, in order.
            all_heat_maps: Heat maps of all latents, in order.
            wanted: Latents to make cases of.
        """
        heat_maps = next(all_heat_maps, None)
        for fired in all_fired:
            while heat_maps and heat_maps.latent < fired.latent:
                heat_maps = next(all_heat_maps, None)
            if fired.latent in wanted:
                yield self._make(fired, heat_maps.heat if heat_maps and heat_maps.latent == fired.latent else {})

    def _make(self, fired: LatentFirings, heat: Mapping[int, np.ndarray | None]) -> Case:
        n = self._params.n_examples
        naming = np.flatnonzero(~self._split.is_held_out[fired.rows])
        has_heat = np.isin(self._split.images[fired.rows[naming]], list(heat))
        rng = np.random.default_rng([self._params.seed, 3, fired.latent])
        hard, random = draw_negatives(fired, self._split, False, self._evidence.neighbour_rows(fired.latent), n, rng)
        mixed = [row for row in chain.from_iterable(zip_longest(hard.tolist(), random.tolist())) if row is not None]
        firing = [self._example(int(fired.rows[i]), float(fired.acts[i]), heat) for i in naming[choose_firing(has_heat, n)]]
        return Case(fired.latent, tuple(firing), tuple(self._example(row, 0.0, {}) for row in mixed))

    def _example(self, row: int, act: float, heat: Mapping[int, np.ndarray | None]) -> Example:
        image = int(self._split.images[row])
        encoded, seen = self._spool.read(row)
        return Example(image, encoded, act, heat.get(image), seen)


def choose_firing(has_heat: Bool[np.ndarray, " images"], n: int) -> Int64[np.ndarray, " chosen"]:
    """Choose n of a latent's images: half of them the strongest, and half evenly spread over the weaker ones.

    Among the weaker images, those that the evaluation kept as examples are preferred, because they have heat maps and cover the deciles.

    Args:
        has_heat: Whether each image, in order of decreasing activation, has a heat map, `(images,)` bool.
        n: Number of images to choose.

    Returns:
        Indices of the images, ascending, int64.
    """
    strongest, rest = np.arange(min(n - n // 2, len(has_heat))), np.arange(len(has_heat))[n - n // 2 :]
    with_heat, without = rest[has_heat[rest]], rest[~has_heat[rest]]
    kept = with_heat[spread_evenly(len(with_heat), n // 2)]
    return np.sort(np.concatenate([strongest, kept, without[spread_evenly(len(without), n // 2 - len(kept))]]))
