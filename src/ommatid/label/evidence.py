"""Evidence: the firings and images of each latent from which its labels are made and on which they are tested.

The naming half of the evaluation images (see images/eval_split.py) makes the label and the detection threshold. The held-out half scores
it: firing images against images that do not fire, half of them random and half of them hard, which means that they fire the latents whose
directions are nearest.

Labellers that look at images see grids of tiles. Their bytes follow from the images and the heat alone, and their size is bounded.
"""

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ommatid.compute.nearest import nearest
from ommatid.config import LabelParams
from ommatid.images.decode import decode
from ommatid.images.eval_split import EvalSplit, LatentFirings
from ommatid.label.labellers.base import Case, Example
from ommatid.metrics import unit
from ommatid.sae.model import SAE
from ommatid.store import Artefact, Draft
from ommatid.vlm.preprocess import Preprocess

MAX_FIRING = 64
"""Firing images drawn for a test, from all strengths."""
N_HARD_LATENTS = 8
"""Nearest latents whose images serve as hard negatives."""


@dataclass(frozen=True)
class Test:
    """Rows on which a name is tried, all of one half, in an order that has nothing to do with their activations."""

    positive: np.ndarray
    """Rows that fire the latent."""
    acts: np.ndarray
    """Image-level activation of each of them."""
    hard: np.ndarray
    """Rows that do not, but fire the latents with the nearest directions."""
    random: np.ndarray
    """Other rows that do not."""

    @property
    def negative(self) -> np.ndarray:
        """All rows that do not fire it."""
        return np.concatenate([self.hard, self.random])

    @property
    def rows(self) -> np.ndarray:
        """All of them."""
        return np.concatenate([self.positive, self.negative])


def draw_test(fired: LatentFirings, halves: EvalSplit, held_out: bool, neighbours: Sequence[np.ndarray], rng: np.random.Generator) -> Test:
    """Firing images of one half and as many that do not fire; `neighbours` are rows that fire the nearest latents."""
    drawn = rng.permutation(np.flatnonzero(halves.is_held_out[fired.rows] == held_out))[:MAX_FIRING]
    hard, random = draw_silent(fired, halves, held_out, neighbours, len(drawn), rng)
    return Test(fired.rows[drawn], fired.acts[drawn], hard, random)


def draw_silent(
    fired: LatentFirings, halves: EvalSplit, held_out: bool, neighbours: Sequence[np.ndarray], n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """At most n rows of one half that do not fire: up to half of them fire the nearest latents, the others are random."""
    silent = halves.is_held_out == held_out
    silent[fired.rows] = False
    near = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *neighbours]))
    hard = rng.permutation(near[silent[near]])[: n // 2]
    silent[hard] = False
    return hard, rng.permutation(np.flatnonzero(silent))[: n - len(hard)]


@dataclass(frozen=True)
class Strongest:
    """The strongest images of the naming half of a latent."""

    rows: Tensor
    """Rows of `EvalSplit`, strongest first."""
    acts: Tensor
    """Image-level activation of each, float64."""


class Gathered:
    """What is kept of each latent that fires."""

    def __init__(self, halves: EvalSplit, params: LabelParams, neighbours: np.ndarray) -> None:
        self._halves = halves
        self._params = params
        self._neighbours = neighbours
        self.strongest: dict[int, Strongest] = {}
        """Of the latents that both halves have enough firing images of, and only of those there can be a name by looking."""
        self._samples: dict[int, np.ndarray] = {}
        """Some rows that fire each latent, for its neighbours' hard negatives."""

    def fill(self, all_fired: Iterator[LatentFirings]) -> None:
        """One pass over the latents that fire."""
        for fired in all_fired:
            self._samples[fired.latent] = fired.rows[:: max(1, len(fired.rows) // MAX_FIRING)][:MAX_FIRING]
            naming = np.flatnonzero(~self._halves.is_held_out[fired.rows])
            if min(len(naming), len(fired.rows) - len(naming)) >= self._params.min_examples:
                first = naming[: self._params.n_examples]
                rows, acts = fired.rows[first].astype(np.int64), fired.acts[first]
                self.strongest[fired.latent] = Strongest(torch.from_numpy(rows), torch.from_numpy(acts))

    def near(self, latent: int) -> list[np.ndarray]:
        """Rows that fire each of the latents with the nearest directions."""
        return [self._samples[i] for i in self._neighbours[latent].tolist() if i in self._samples]


def nearest_latents(sae: Artefact) -> np.ndarray:
    """The latents with the nearest directions, nearest first, the lower latent first of equals, (d_sae, N_HARD_LATENTS), without itself."""
    directions = unit(SAE.load(sae.path).W_dec).float()
    n = min(N_HARD_LATENTS, len(directions) - 1)
    return nearest(directions, directions, n, np.arange(len(directions))).others


DRAWING = 1
"""Raised when grids look different from before: answers to the old ones are then asked for again."""
N_TILES = 16
"""Images in a grid, at most."""
N_ACROSS = 4
SIDE = 192
"""Pixels of a tile's side."""
GAP = 8
STRIP = 22
"""Pixels above a tile for its number."""
QUALITY = 90
KEPT = 0.5
"""Share of the strongest patch's activation from which the image stays as it is."""
FADED = 0.15
"""What is left of the image's contrast where nothing fires; the rest is grey, for black would look like night."""
GREY = 128.0


def draw_grid(tiles: Sequence[tuple[int, Image.Image]]) -> bytes:
    """A JPEG of numbered tiles, row by row on white, at most `N_TILES`."""
    assert 0 < len(tiles) <= N_TILES, f"{len(tiles)} tiles"
    n_across, n_down = min(N_ACROSS, len(tiles)), -(-len(tiles) // N_ACROSS)
    canvas = Image.new("RGB", (GAP + n_across * (SIDE + GAP), GAP + n_down * (STRIP + SIDE + GAP)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=STRIP - 4)
    for i, (number, picture) in enumerate(tiles):
        left, top = place_of(i)
        pen.text((left, top - STRIP), str(number), fill="black", font=font)
        tile = _fitted(picture)
        canvas.paste(tile, (left + (SIDE - tile.width) // 2, top + (SIDE - tile.height) // 2))
    out = io.BytesIO()
    canvas.save(out, "JPEG", quality=QUALITY, subsampling=0)
    return out.getvalue()


def place_of(i: int) -> tuple[int, int]:
    """Left and top pixel of the i-th tile."""
    return GAP + i % N_ACROSS * (SIDE + GAP), GAP + STRIP + i // N_ACROSS * (STRIP + SIDE + GAP)


def choose_shown(examples: Sequence[Example]) -> Sequence[Example]:
    """As many as a grid holds: the first half of it is the strongest, the other half goes evenly down to the weakest."""
    n_first, n_rest = N_TILES // 2, len(examples) - N_TILES // 2
    if len(examples) <= N_TILES:
        return examples
    places = np.linspace(0, n_rest - 1, N_TILES - n_first).round().astype(int) + n_first
    return [*examples[:n_first], *(examples[i] for i in places)]


def cut(example: Example) -> Image.Image:
    """The image cut around what fires; without heat it stays whole."""
    picture = decode(example.encoded)
    heat = coarse_heat(example)
    return picture if heat is None else picture.crop(_box(_spread_heat(heat, picture.size, example.seen)))


def mark(example: Example) -> Image.Image:
    """The image cut around what fires, everything else in it faded to grey; without heat it stays whole."""
    picture = decode(example.encoded)
    heat = coarse_heat(example)
    if heat is None:
        return picture
    share = _spread_heat(heat, picture.size, example.seen)
    light = FADED + (1 - FADED) * np.clip(share / KEPT, 0, 1)[:, :, None]
    faded = np.asarray(picture, np.float32) * light + GREY * (1 - light)
    return Image.fromarray(faded.round().astype(np.uint8)).crop(_box(share))


def coarse_heat(example: Example) -> np.ndarray | None:
    """Heat in 255 steps of its maximum, (rows, cols) uint8: what is drawn, without the last bits, which differ between machines."""
    if example.heat is None or not (top := float(example.heat.max(initial=0))) > 0:
        return None
    return (np.clip(example.heat / top, 0, 1) * 255).round().astype(np.uint8)


def _spread_heat(heat: np.ndarray, size: tuple[int, int], seen: tuple[float, float]) -> np.ndarray:
    """Heat over the whole image, (height, width) 0 to 1: smooth inside what the model sees of it, 0 around that."""
    width, height = size
    wide, high = (max(1, round(side * share)) for side, share in zip(size, seen, strict=True))
    inside = Image.fromarray(heat.astype(np.float32) / 255).resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (width - wide) // 2, (height - high) // 2
    share = np.zeros((height, width), np.float32)
    share[top : top + high, left : left + wide] = np.asarray(inside)
    return share


def _box(share: np.ndarray) -> tuple[int, int, int, int]:
    """A square around all that is kept, with a tenth of the image as margin, half the image's shorter side at least."""
    height, width = share.shape
    rows, cols = (np.flatnonzero((share >= KEPT * share.max()).any(axis)) for axis in (1, 0))
    margin = min(height, width) // 10
    tall, wide = (int(found[-1] - found[0]) + 1 + 2 * margin for found in (rows, cols))
    side = max(tall, wide, min(height, width) // 2)
    left, right = _stretch(int(cols[0] + cols[-1] + 1) // 2, side, width)
    top, bottom = _stretch(int(rows[0] + rows[-1] + 1) // 2, side, height)
    return left, top, right, bottom


def _stretch(centre: int, length: int, limit: int) -> tuple[int, int]:
    length = min(length, limit)
    start = min(max(0, centre - length // 2), limit - length)
    return start, start + length


def _fitted(picture: Image.Image) -> Image.Image:
    """The picture as large as a tile holds it."""
    scale = SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)


SPOOL = "scratch/encoded.bin"
OFFSETS = "scratch/encoded.npy"
SIZE = ("width", "height")


class Spool:
    """The encoded evaluation images one after the other in a scratch file: an image artefact cannot be read here and there.

    A row group of it has 128 images, and a latent's are all over the set. Made once for all SAEs; a run that died may have left it.
    """

    def __init__(self, images: Artefact, halves: EvalSplit, draft: Draft, preprocess: Preprocess) -> None:
        if not (draft.has(OFFSETS) and draft.has(SPOOL)):
            _write_spool(images, halves, draft, preprocess)
        table = np.load(draft.path / OFFSETS)
        self._offsets, self._seen = table["offset"], table["seen"]
        self._path = draft.path / SPOOL

    def read(self, row: int) -> tuple[bytes, tuple[float, float]]:
        """The image file of a row of `EvalSplit`, and what the model sees of it."""
        with self._path.open("rb") as file:
            file.seek(int(self._offsets[row]))
            encoded = file.read(int(self._offsets[row + 1] - self._offsets[row]))
        return encoded, (float(self._seen[row][0]), float(self._seen[row][1]))


def _write_spool(images: Artefact, halves: EvalSplit, draft: Draft, preprocess: Preprocess) -> None:
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

    def __init__(self, spool: Spool, halves: EvalSplit, gathered: Gathered, params: LabelParams) -> None:
        self._spool = spool
        self._halves = halves
        self._gathered = gathered
        self._params = params

    def iter_cases(self, all_fired: Iterator[LatentFirings], all_looks: Iterator[Looks], wanted: Collection[int]) -> Iterator[Case]:
        """The cases of some latents, in order; images are read as cases are asked for."""
        looks = next(all_looks, None)
        for fired in all_fired:
            while looks and looks.latent < fired.latent:
                looks = next(all_looks, None)
            if fired.latent in wanted:
                yield self._make(fired, looks.heat if looks and looks.latent == fired.latent else {})

    def _make(self, fired: LatentFirings, heat: Mapping[int, np.ndarray | None]) -> Case:
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
    kept = _pick_evenly(with_heat, n // 2)
    return np.sort(np.concatenate([strongest, kept, _pick_evenly(without, n // 2 - len(kept))]))


def _pick_evenly(places: np.ndarray, n: int) -> np.ndarray:
    """At most n of them, evenly."""
    return places if len(places) <= n else places[np.linspace(0, len(places) - 1, n).round().astype(np.int64)]
