"""Names and captions in the server's memory, where a word is found in a millisecond or two, several times as fast as by a statement."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from ommatid.explorer.cards import iter_rows, keep, load_cards, load_strongest
from ommatid.explorer.library import Opened

MOST_CAPTIONS_MB = 32
"""Size of all captions, in MB, above which they are not held."""

_OTHER_NAMES = """
    SELECT latent, lower(labels.label), score FROM labels JOIN features USING (sae, latent)
    WHERE sae = $sae AND labels.label IS NOT NULL AND features.labeller <> labels.labeller AND latent >= $first AND latent < $last
"""
_CAPTIONS = """
    SELECT image, lower(unnest(captions)), NULL FROM images WHERE split = 'eval' AND image >= $first AND image < $last
"""
_SIZE = """
    SELECT coalesce(max(image), -1) + 1 AS n, coalesce(sum(len(array_to_string(captions, ' '))), 0) / 1e6 AS mb
    FROM images WHERE split = 'eval'
"""
_CAPTIONED = """
    SELECT image FROM images WHERE split = 'eval' AND len(list_filter(captions, lambda one: contains(lower(one), $text))) > 0
"""


class Texts:
    """Texts about latents or images, held as one string.

    Args:
        rows: Number of the latent or image, text in lower case and merit of each text; a merit of None is the least. Several texts may be
            about the same latent or image.
    """

    def __init__(self, rows: Iterable[tuple[Any, ...]]) -> None:
        numbers, texts, merits = [], [], []
        for number, text, merit in rows:
            numbers.append(number)
            texts.append(text.replace("\n", " ").encode())
            merits.append(merit)
        self._numbers = np.asarray(numbers, np.int32)
        self._merits = np.asarray(merits, np.float64)  # None is NaN
        self._ends = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64) - 1
        self._starts = self._ends - [len(text) for text in texts]
        self._all = b"\n".join(texts)

    def find(self, text: str, n: int) -> list[int]:
        """Find the best texts that contain another one.

        Args:
            text: What to find, in lower case.
            n: Maximum number of latents or images.

        Returns:
            Numbers of the latents or images: first those whose text is the same, then those that have it as whole words, then by merit and
            number.
        """
        needle = text.encode()
        word = re.compile(rb"\b%b\b" % re.escape(needle))
        found = self._find_lines(needle)
        lines = [self._all[start:end] for start, end in zip(self._starts[found].tolist(), self._ends[found].tolist(), strict=True)]
        is_same = np.array([line == needle for line in lines], bool)
        is_word = np.array([word.search(line) is not None for line in lines], bool)
        merits = np.nan_to_num(self._merits[found], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        order = np.lexsort((self._numbers[found], -merits, ~is_word, ~is_same))
        return list(dict.fromkeys(self._numbers[found[order]].tolist()))[:n]

    def find_all(self, text: str) -> np.ndarray:
        """Numbers of all latents or images with a text that contains another one, in lower case; unordered, perhaps repeated."""
        return self._numbers[self._find_lines(text.encode())]

    def _find_lines(self, needle: bytes) -> np.ndarray:
        """Indices of the texts that contain bytes."""
        places: list[int] = []
        place = self._all.find(needle)
        while place >= 0:
            places.append(place)
            end = self._all.find(b"\n", place)
            place = self._all.find(needle, end) if end >= 0 else -1
        return np.searchsorted(self._starts, np.asarray(places, np.int64), "right") - 1


def names(opened: Opened, sae: str) -> Texts:
    """The name that the catalogue gives each latent of an SAE; its merit is the score above the control."""
    merits = load_cards(opened, sae).iter_merits()
    return keep(opened, "names", sae, lambda: Texts((latent, name.lower(), merit) for latent, name, merit in merits))


def other_names(opened: Opened, sae: str) -> Texts:
    """The names by labellers whose name is not the one that the catalogue gives a latent; their merit is the score."""
    return keep(opened, "other names", sae, lambda: Texts(iter_rows(opened, _OTHER_NAMES, opened.saes[sae]["n_latents"], sae=sae)))


def find_captioned(opened: Opened, sae: str, text: str, n: int) -> dict[int, int]:
    """Find latents whose strongest images have captions that contain a text.

    Args:
        opened: The catalogue.
        sae: The SAE.
        text: What to find, in lower case.
        n: Maximum number of latents.

    Returns:
        By latent the number of its strongest images, of the 8 of the relation `previews`, with such a caption; the most first.
    """
    size = opened.kept(_SIZE)[0]
    if not size["mb"]:
        return {}
    if size["mb"] > MOST_CAPTIONS_MB:
        images = np.array([row["image"] for row in opened.rows(_CAPTIONED, text=text)], np.int64)
    else:
        images = keep(opened, "captions", "", lambda: Texts(iter_rows(opened, _CAPTIONS, size["n"]))).find_all(text)
    has = np.zeros(size["n"] + 1, bool)  # the last one is never set: it stands for images that a latent lacks
    has[images] = True
    strongest = load_strongest(opened, sae)
    counts = np.bincount(np.flatnonzero(has[strongest.ravel()]) // strongest.shape[1], minlength=1)
    found = np.flatnonzero(counts)
    best = found[np.argsort(-counts[found], kind="stable")][:n]
    return {int(latent): int(counts[latent]) for latent in best}
