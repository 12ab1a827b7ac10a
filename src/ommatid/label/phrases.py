"""The phrase that captions of some images share and captions of others lack."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import log2

LONGEST = 3
"""Words of a phrase, at most."""
FEWEST = 2
"""Captions in which it stands, at least."""
LEAST_SHARE = 0.25
"""Of the captions, at least: what is in fewer is not what the images have in common."""
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_LIST = (
    "a an the this that these those some any each one two three several many few other another it its he his she her they their them "
    "there here who which what where when of in on at by to from with without for as into onto over under up down out off near next "
    "behind between through around across above below and or but not no is are was were be been being has have having do does very "
    "image images photo photos photograph picture pictures view close close-up closeup shot unknown unk"
)
_EMPTY = frozenset(_LIST.split())
"""Words that say nothing of what is in the image: a phrase neither begins nor ends with one."""


@dataclass(frozen=True)
class Phrase:
    """Words in a row that stand in captions."""

    text: str
    n_firing: int
    """Captions of firing images in which it stands."""
    n_silent: int
    """Captions of silent images in which it stands."""


def shared_phrase(firing: Sequence[str], silent: Sequence[str]) -> Phrase | None:
    """The phrase of one to three words that tells the firing images' captions best from the others.

    That is the one with the largest f · log2(f / g), where f is the share of firing captions in which it stands and g that of silent ones,
    (n + 1/2) / (N + 1) so that it is never 0: a term of the Kullback-Leibler divergence, and a kind of tf-idf. Of equals the one with more
    words, then the first by alphabet. It stands in a quarter of the firing captions, in two at least, and in a larger share of those than
    of the silent ones.

    Returns:
        None: there is no such phrase.
    """
    in_firing, in_silent = _count(firing), _count(silent)
    fewest = max(FEWEST, LEAST_SHARE * len(firing))
    found = [Phrase(text, n, in_silent[text]) for text, n in in_firing.items() if n >= fewest]
    scored = [(_score(phrase, len(firing), len(silent)), phrase) for phrase in found]
    scored = [(score, phrase) for score, phrase in scored if score > 0]
    return min(scored, key=lambda pair: (-pair[0], -pair[1].text.count(" "), pair[1].text))[1] if scored else None


def _score(phrase: Phrase, n_firing: int, n_silent: int) -> float:
    f, g = phrase.n_firing / n_firing, (phrase.n_silent + 0.5) / (n_silent + 1)
    return f * log2(f / g)


def _count(captions: Iterable[str]) -> Counter[str]:
    """In how many captions each phrase stands; twice in one is once."""
    return Counter(phrase for caption in captions for phrase in set(_phrases(caption)))


def _phrases(caption: str) -> Iterator[str]:
    words = _WORD.findall(caption.lower())
    for start in range(len(words)):
        for end in range(start + 1, min(start + LONGEST, len(words)) + 1):
            if words[start] not in _EMPTY and words[end - 1] not in _EMPTY:
                yield " ".join(words[start:end])
