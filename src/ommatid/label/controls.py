"""The names that are tried on a latent: its own, another latent's, and a random word."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ommatid.label.texts import Texts

Labels = Mapping[int, str]
"""Names by latent."""


@dataclass(frozen=True)
class Tried:
    """Places of names in the joint space, (d_joint,) each."""

    name: Tensor
    """The latent's own."""
    shuffled: Tensor | None
    """Of another latent, by the same labeller, and another name; None: there is none."""
    random: Tensor | None
    """Of a word of the vocabulary, and another name; None: there is none."""


class Controls:
    """Of every name of an SAE what it is compared with: drawn by a seed, the same word for all labellers."""

    def __init__(self, labels: Mapping[str, Labels], scored: Collection[int], texts: Texts, d_sae: int, seed: int) -> None:
        """`labels` has the names by labeller and latent; names of latents in `scored` are tried, and serve as controls."""
        self._texts = texts
        self._labels = labels
        names = sorted({label for of in labels.values() for latent, label in of.items() if latent in scored})
        self._places = dict(zip(names, texts.embed(names), strict=True))
        self._others = {labeller: others({i: of[i] for i in of if i in scored}, seed) for labeller, of in labels.items()}
        self._random = np.random.default_rng([seed, 2]).integers(len(texts.words), size=d_sae)

    def of(self, labeller: str, latent: int) -> Tried:
        """What is tried on a latent that is scored and has a name by that labeller."""
        label, other = self._labels[labeller][latent], self._others[labeller][latent]
        return Tried(self._places[label], None if other is None else self._places[other], self._random_word(latent, label))

    def _random_word(self, latent: int, label: str) -> Tensor | None:
        words = self._texts.words
        place = int(self._random[latent])
        if words[place] == label:
            place = (place + 1) % len(words)
        return None if words[place] == label else self._texts.embeddings[place]


def others(labels: Labels, seed: int) -> dict[int, str | None]:
    """For each latent the name of another one that is another name: the next such in a seeded order; None: all have the same."""
    order = np.random.default_rng([seed, 1]).permutation(sorted(labels)).tolist()
    found: dict[int, str | None] = {}
    later: str | None = None  # the next name after this place that is not the one of this place
    for here, after in zip(reversed(order * 2), reversed(order * 2 + order[:1]), strict=False):
        if labels[here] != labels[after]:
            later = labels[after]
        found[here] = later
    return found
