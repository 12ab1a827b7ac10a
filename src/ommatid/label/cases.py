"""Cases for labellers that look at images: of each latent the encoded images of the naming half, with heat maps where there are any."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np

from ommatid.config import LabelParams
from ommatid.halves import Fired, Halves
from ommatid.label.examples import draw_silent
from ommatid.label.gathered import Gathered
from ommatid.label.labeller import Case, Example
from ommatid.store import Artefact, Draft
from ommatid.vlm.preprocess import Preprocess

SPOOL = "scratch/encoded.bin"
OFFSETS = "scratch/encoded.npy"
SIZE = ("width", "height")


class Spool:
    """The encoded evaluation images one after the other in a scratch file: an image artefact cannot be read here and there.

    A row group of it has 128 images, and a latent's are all over the set. Made once for all SAEs; a run that died may have left it.
    """

    def __init__(self, images: Artefact, halves: Halves, draft: Draft, preprocess: Preprocess) -> None:
        if not (draft.has(OFFSETS) and draft.has(SPOOL)):
            _write_spool(images, halves, draft, preprocess)
        table = np.load(draft.path / OFFSETS)
        self._offsets, self._seen = table["offset"], table["seen"]
        self._path = draft.path / SPOOL

    def read(self, row: int) -> tuple[bytes, tuple[float, float]]:
        """The image file of a row of `Halves`, and what the model sees of it."""
        with self._path.open("rb") as file:
            file.seek(int(self._offsets[row]))
            encoded = file.read(int(self._offsets[row + 1] - self._offsets[row]))
        return encoded, (float(self._seen[row][0]), float(self._seen[row][1]))


def _write_spool(images: Artefact, halves: Halves, draft: Draft, preprocess: Preprocess) -> None:
    table = np.zeros(len(halves.images) + 1, dtype=[("offset", "i8"), ("seen", "f4", 2)])
    row = 0
    with draft.write_file(SPOOL) as path, path.open("wb") as file:
        for batch in images.iter_batches("images", ["split", *SIZE, "encoded"], n_rows=128):
            batch = batch.filter([split == "eval" for split in batch["split"].to_pylist()])
            end = row + batch.num_rows
            sizes = [file.write(encoded.as_buffer()) for encoded in batch["encoded"]]
            table["offset"][row + 1 : end + 1] = table["offset"][row] + np.cumsum(sizes, dtype=np.int64)
            table["seen"][row:end] = [_seen(preprocess, *size) for size in zip(*(batch[name].to_pylist() for name in SIZE), strict=True)]
            row = end
    assert row == len(halves.images), f"{row} evaluation images, expected {len(halves.images)}"
    with draft.write_file(OFFSETS) as path, path.open("wb") as file:
        np.save(file, table)


def _seen(preprocess: Preprocess, width: int, height: int) -> tuple[float, float]:
    """Share of width and height, about the centre, that the model sees."""
    left, top, right, bottom = preprocess.box(width, height)
    return (right - left) / width, (bottom - top) / height


@dataclass(frozen=True)
class Looks:
    """What the evaluation has kept of a latent to be looked at."""

    latent: int
    heat: Mapping[int, np.ndarray | None]
    """By images.image; None: tokens have no place."""


def iter_looks(evaluation: Artefact) -> Iterator[Looks]:
    """The table `examples`, latent by latent, in order."""
    latent, heat = -1, {}
    for batch in evaluation.iter_batches("examples", ["latent", "image", "heat", "rows", "cols"], n_rows=4096):
        for row in batch.to_pylist():
            if row["latent"] != latent:
                if heat:
                    yield Looks(latent, heat)
                latent, heat = row["latent"], {}
            values = row["heat"]
            heat[row["image"]] = None if values is None else np.array(values, dtype=np.float32).reshape(row["rows"], row["cols"])
    if heat:
        yield Looks(latent, heat)


class Cases:
    """Makes the cases of an SAE's latents."""

    def __init__(self, spool: Spool, halves: Halves, gathered: Gathered, params: LabelParams) -> None:
        self._spool = spool
        self._halves = halves
        self._gathered = gathered
        self._params = params

    def iter_cases(self, all_fired: Iterator[Fired], all_looks: Iterator[Looks], wanted: Collection[int]) -> Iterator[Case]:
        """The cases of some latents, in order; images are read as cases are asked for."""
        looks = next(all_looks, None)
        for fired in all_fired:
            while looks and looks.latent < fired.latent:
                looks = next(all_looks, None)
            if fired.latent in wanted:
                yield self._make(fired, looks.heat if looks and looks.latent == fired.latent else {})

    def _make(self, fired: Fired, heat: Mapping[int, np.ndarray | None]) -> Case:
        n = self._params.n_examples
        naming = np.flatnonzero(~self._halves.is_held_out[fired.rows])
        has_heat = np.isin(self._halves.images[fired.rows[naming]], list(heat))
        rng = np.random.default_rng([self._params.seed, 3, fired.latent])
        hard, random = draw_silent(fired, self._halves, False, self._gathered.near(fired.latent), n, rng)
        mixed = [row for row in chain.from_iterable(zip_longest(hard.tolist(), random.tolist())) if row is not None]
        firing = [self._example(int(fired.rows[i]), float(fired.acts[i]), heat) for i in naming[choose_firing(has_heat, n)]]
        return Case(fired.latent, tuple(firing), tuple(self._example(row, 0.0, {}) for row in mixed))

    def _example(self, row: int, act: float, heat: Mapping[int, np.ndarray | None]) -> Example:
        image = int(self._halves.images[row])
        encoded, seen = self._spool.read(row)
        return Example(image, encoded, act, heat.get(image), seen)


def choose_firing(has_heat: np.ndarray, n: int) -> np.ndarray:
    """Places of n of a latent's images, which are in order of strength: the strongest half, and weaker ones evenly spread.

    Of the weaker ones those come first that the evaluation has kept as examples, for these have heat maps and are drawn by decile.
    """
    strongest, rest = np.arange(min(n - n // 2, len(has_heat))), np.arange(len(has_heat))[n - n // 2 :]
    with_heat, without = rest[has_heat[rest]], rest[~has_heat[rest]]
    kept = _spread(with_heat, n // 2)
    return np.sort(np.concatenate([strongest, kept, _spread(without, n // 2 - len(kept))]))


def _spread(places: np.ndarray, n: int) -> np.ndarray:
    """At most n of them, evenly."""
    return places if len(places) <= n else places[np.linspace(0, len(places) - 1, n).round().astype(np.int64)]
