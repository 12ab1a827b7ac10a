"""What lists show of features and of images, most of which the server holds in memory: asking for it was a third of the time of a page."""

import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from ommatid.catalog.question import Question
from ommatid.explorer.heat import Tile, make_tile
from ommatid.explorer.library import Opened
from ommatid.explorer.web import View

T = TypeVar("T")

N_PREVIEW = 4
"""Strongest images that stand for a feature in a list."""
N_STRONGEST = 8
"""Strongest images of a latent in the relation `previews`."""
MOST_SAES = 4
"""SAEs whose cards are kept, about 10 MB for 65,536 latents."""
ROWS_AT_ONCE = 2**14
"""Rows loaded at a time, so that a page's statement has memory for them."""

_NUMBERS = ("label_score", "control_score", "ms", "ms_floor", "max_act", "purity")
_STRONGEST = tuple(f"images[{place}]" for place in range(1, N_STRONGEST + 1))
_DOES = """
    SELECT latent, causal, effect, best_control FROM features
    WHERE sae = $sae AND latent >= $first AND latent < $last AND causal <> 'untested'
"""
_OF_OTHERS = """
    SELECT sae, latent, label, ms FROM features WHERE latent IN (SELECT unnest($latents::INTEGER[]))
"""
_IMAGES = """
    SELECT image, left(image_id, 12), width, height, seen_width, seen_height, left(label, 80)
    FROM images WHERE image IN (SELECT unnest($images::INTEGER[]))
"""
_LOADING = threading.Lock()


class Cards:
    """What lists show of every latent of an SAE.

    Args:
        opened: The catalogue.
        sae: The SAE.
    """

    def __init__(self, opened: Opened, sae: str) -> None:
        n = _count_latents(opened, sae)
        self._sae = sae
        self._is_described = np.zeros(n, bool)
        self._n_images = np.zeros(n, np.int32)
        self._numbers = np.full((n, len(_NUMBERS)), np.nan)
        self.labels: list[str | None] = [None] * n
        """Name of each latent; None if it has none."""
        for latents, labels, n_images, *numbers in _iter_columns(opened, sae, "features", ("latent", "label", "n_images", *_NUMBERS), n):
            self._is_described[latents] = True
            self._n_images[latents] = n_images
            self._numbers[latents] = np.array(numbers, np.float64).T  # None is NaN
            for latent, label in zip(latents, labels, strict=True):
                self.labels[latent] = label and sys.intern(label)
        found = iter_rows(opened, _DOES, n, sae=sae) if opened.is_intervened else ()
        self._does = {latent: (sys.intern(causal), effect, best_control) for latent, causal, effect, best_control in found}

    def row(self, latent: int) -> dict[str, Any] | None:
        """What the relation `features` says of a latent in the columns that cards show; None if it does not describe it."""
        if not 0 <= latent < len(self.labels) or not self._is_described[latent]:
            return None
        numbers = {name: None if value != value else value for name, value in zip(_NUMBERS, self._numbers[latent].tolist(), strict=True)}
        causal, effect, best_control = self._does.get(latent, ("untested", None, None))
        does = {"causal": causal, "effect": effect, "best_control": best_control}
        return {
            "sae": self._sae,
            "latent": latent,
            "label": self.labels[latent],
            "n_images": int(self._n_images[latent]),
            **numbers,
            **does,
        }

    def iter_merits(self) -> Iterator[tuple[int, str, float | None]]:
        """Iterate over the latents with a name: latent, name, and its score above the control."""
        scores, controls = (self._numbers[:, _NUMBERS.index(name)] for name in ("label_score", "control_score"))
        for latent, (label, merit) in enumerate(zip(self.labels, (scores - controls).tolist(), strict=True)):
            if label is not None:
                yield latent, label, None if merit != merit else merit


def load_cards(opened: Opened, sae: str) -> Cards:
    """Load the cards of an SAE, the first time that they are asked for."""
    return keep(opened, "cards", sae, lambda: Cards(opened, sae))


def load_strongest(opened: Opened, sae: str) -> np.ndarray:
    """Load the numbers of the images on which each latent is strongest, the first time that they are asked for.

    Returns:
        The numbers, (latents, 8) int32, strongest first; -1 where a latent fires on fewer.
    """

    def load() -> np.ndarray:
        n = _count_latents(opened, sae)
        strongest = np.full((n, N_STRONGEST), -1, np.int32)
        for latents, *images in _iter_columns(opened, sae, "previews", ("latent", *_STRONGEST), n):
            strongest[latents] = np.nan_to_num(np.array(images, np.float64), nan=-1).T
        return strongest

    return keep(opened, "strongest", sae, load)


def load_features(view: View, sae: str, latents: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Load what cards show of some features, by latent in their order; latents that the catalogue does not describe are left out."""
    cards = load_cards(view.opened, sae)
    return {latent: row for latent in sorted(set(latents)) if (row := cards.row(latent))}


def load_features_of_others(view: View, wanted: Collection[tuple[str, int]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Load name and MS of latents of other SAEs, by SAE and latent; of more SAEs than are held, they are asked for."""
    saes = {sae for sae, _ in wanted}
    if len(saes) < MOST_SAES:
        found = ((sae, latent, load_cards(view.opened, sae).row(latent)) for sae, latent in wanted)
        return {(sae, latent): row for sae, latent, row in found if row}
    latents = sorted({latent for _, latent in wanted})
    return {(row["sae"], row["latent"]): row for row in view.rows(_OF_OTHERS, latents=latents) if row["sae"] in saes}


def load_previews(view: View, sae: str, latents: Iterable[int]) -> dict[int, list[int]]:
    """Load the numbers of the strongest images of some latents, at most 8 of each, strongest first."""
    strongest = load_strongest(view.opened, sae)
    wanted = sorted({latent for latent in latents if 0 <= latent < len(strongest)})
    return {latent: [image for image in row if image >= 0] for latent, row in zip(wanted, strongest[wanted].tolist(), strict=True)}


def previews(view: View, sae: str, latents: Iterable[int], n: int = N_PREVIEW) -> dict[int, list[Tile]]:
    """Load the strongest images of some features, without their heat maps.

    Args:
        view: The request.
        sae: The SAE.
        latents: Its latents.
        n: Number of images of each, at most 8.

    Returns:
        The images by latent, strongest first.
    """
    images = {latent: found[:n] for latent, found in load_previews(view, sae, latents).items()}
    tiles = load_tiles(view, {image for found in images.values() for image in found})
    return {latent: [tiles[image] for image in found if image in tiles] for latent, found in images.items()}


class Images:
    """What tiles show of the images that have been asked for so far, in arrays by number, which take 80 bytes an image.

    Args:
        n: Number of images.
    """

    def __init__(self, n: int) -> None:
        self._is_known = np.zeros(n, bool)
        self._hashes = np.zeros(n, "U12")
        self._sizes = np.zeros((n, 2), np.int32)
        self._seen = np.full((n, 2), np.nan, np.float32)
        self._labels = np.full(n, -1, np.int32)
        self._texts: list[str | None] = [None]  # the last one, at -1, stands for images without a label
        self._places: dict[str, int] = {}

    def find_missing(self, images: Sequence[int]) -> list[int]:
        """Return those of some images that are not known yet."""
        return [image for image in images if image < len(self._is_known) and not self._is_known[image]]

    def add(self, image: int, hash_: str, size: tuple[int, int], seen: tuple[float | None, float | None], label: str | None) -> None:
        """Add an image: beginning of its checksum, width and height, the shares of them that the model sees, and its class."""
        self._hashes[image], self._sizes[image], self._seen[image] = hash_, size, seen
        if label is not None:
            if label not in self._places:
                self._places[label] = len(self._texts) - 1
                self._texts.insert(-1, label)
            self._labels[image] = self._places[label]
        self._is_known[image] = True

    def rows(self, images: Sequence[int]) -> dict[int, dict[str, Any]]:
        """What tiles show of some images, by number; unknown ones are left out."""
        known = [image for image in images if image < len(self._is_known) and self._is_known[image]]
        columns = (column[known].tolist() for column in (self._hashes, self._sizes, self._seen, self._labels))
        return {
            image: {
                "image": image,
                "hash": hash_,
                "width": width,
                "height": height,
                "label": self._texts[label],
                "seen_width": None if seen_width != seen_width else seen_width,
                "seen_height": None if seen_height != seen_height else seen_height,
            }
            for image, hash_, (width, height), (seen_width, seen_height), label in zip(known, *columns, strict=True)
        }


def load_images(view: View, images: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Load what tiles show of some images, by their numbers; images that the catalogue does not have are left out."""
    opened, wanted = view.opened, sorted({image for image in images if image >= 0})
    held = keep(opened, "images", "", lambda: Images(opened.rows("SELECT coalesce(max(image), -1) + 1 AS n FROM images")[0]["n"]))
    if missing := held.find_missing(wanted):
        found = opened.ask(Question(_IMAGES, {"images": missing})).rows
        with _LOADING:
            for image, hash_, width, height, seen_width, seen_height, label in found:
                held.add(image, hash_, (width, height), (seen_width, seen_height), label)
    return held.rows(wanted)


def load_tiles(view: View, images: Iterable[int]) -> dict[int, Tile]:
    """Load some images as tiles, by their numbers."""
    return {image: make_tile(row) for image, row in load_images(view, images).items()}


def _count_latents(opened: Opened, sae: str) -> int:
    return opened.rows("SELECT coalesce(max(latent), -1) + 1 AS n FROM features WHERE sae = $sae", sae=sae)[0]["n"]


def _iter_columns(opened: Opened, sae: str, relation: str, columns: Sequence[str], n: int) -> Iterator[tuple[list[Any], ...]]:
    """Iterate over the columns of the rows about the `n` latents of an SAE, asked for in parts: lists are passed on faster than rows."""
    wanted = ", ".join(f"list({column})" for column in columns)
    sql = f"SELECT {wanted} FROM {relation} WHERE sae = $sae AND latent >= $first AND latent < $last HAVING count(*) > 0"
    return iter_rows(opened, sql, n, sae=sae)


def iter_rows(opened: Opened, sql: str, n: int, **values: Any) -> Iterator[tuple[Any, ...]]:
    """Iterate over the rows of an answer about `n` latents or images, asked for in parts."""
    for first in range(0, n, ROWS_AT_ONCE):
        yield from opened.ask(Question(sql, {**values, "first": first, "last": first + ROWS_AT_ONCE})).rows


def keep(opened: Opened, kind: str, sae: str, load: Callable[[], T]) -> T:
    """Return what is held of an SAE, or of the images of all (""); it is loaded once, even if several visitors ask at the same time.

    Of each kind, that of the latest `MOST_SAES` is kept.
    """
    held: dict[str, T] = opened.held.setdefault(kind, {})
    with _LOADING:
        if sae not in held:
            found = load()
            if len(held) >= MOST_SAES:
                held.pop(next(iter(held)))
            held[sae] = found
        return held[sae]
