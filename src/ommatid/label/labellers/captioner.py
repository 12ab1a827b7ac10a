"""The labeller `captioner`: captions what a latent fires on and what it does not, and takes the phrase that makes the difference."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from ommatid.config.label import CaptionerLabeller
from ommatid.errors import ModelError
from ommatid.images.decode import decode
from ommatid.label.evidence import N_TILES, choose_shown, cut
from ommatid.label.labellers.base import Answer, Asked, Case
from ommatid.vlm import hub
from ommatid.vlm.precision import normalise
from ommatid.vlm.processor import load_preprocess
from ommatid.vlm.trust import SHAPES, structured_picture

KEY = "label.labellers.path"
FAMILIES = ("blip", "git", "vision-encoder-decoder")
"""Values of model_type in config.json: models that caption an image without being asked a question."""
MAX_TOKENS = 24
"""Of a caption."""
BATCH = 16


class TransformersCaptions:
    """BLIP, GIT, or an image encoder with a text decoder; greedy, so that an image always gets the same caption."""

    def __init__(self, path: str) -> None:
        instead = "leave this labeller out"
        folder = hub.locate(path, KEY, hub.CONFIG | hub.WEIGHTS | hub.PREPROCESSOR | hub.TOKENIZER, instead)
        family = hub.load_config(folder, path, KEY).model_type
        if family not in FAMILIES:
            raise ModelError(
                f"{KEY}: {path}: is a {family} model; models that caption are of the families {', '.join(FAMILIES)}; one that is asked "
                "questions goes behind a server such as vLLM, and is used as {kind: vlm}"
            )
        self._preprocess = load_preprocess(folder, path, KEY)
        self._tokenizer = hub.load_tokenizer(folder, path, KEY)
        model, _ = hub.load_weights(AutoModelForImageTextToText, folder, path, KEY)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device)
        self._check(path)

    def _check(self, path: str) -> None:
        """Whether a picture alone and in a batch is said to be the same: no mask is drawn anew, and no picture looks at another."""
        picture, other = (structured_picture(*shape) for shape in SHAPES)
        with hub.reading(path, KEY, "what the model says of a picture"):
            alone, batch = self([picture]), self([picture, other])
        if alone[0] != batch[0]:
            raise ModelError(
                f"{KEY}: {path}: says {alone[0]!r} of a picture alone, and {batch[0]!r} of the same picture in a batch: something in the "
                "model is drawn anew in every pass, such as masks, or the pictures of a batch mix; use another model"
            )

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """A caption of each image."""
        captions: list[str] = []
        for start in range(0, len(images), BATCH):
            pixels = torch.stack([torch.from_numpy(self._preprocess(image)) for image in images[start : start + BATCH]])
            x = normalise(pixels, self._preprocess, self._device).contiguous()
            with hub.quiet():
                tokens: Any = self._model.generate(pixel_values=x, max_new_tokens=MAX_TOKENS, do_sample=False, num_beams=1)
            captions += self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [caption.strip() for caption in captions]


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


SHOWN = 3
"""Captions that the detail of an answer without a name repeats."""

Captions = Callable[[Sequence[Image.Image]], list[str]]
"""A caption of each image."""


class Captioner:
    """Firing images are cut around what fires, not faded, for a caption would speak of the grey; silent ones stay whole."""

    def __init__(self, name: str, captions: Captions) -> None:
        self.name = name
        self._captions = captions

    def answer(self, case: Case) -> Answer:
        """The phrase that captions of firing images share; `unparsed` where they share none."""
        firing, silent = choose_shown(case.firing), case.silent[:N_TILES]
        if not firing:
            return Answer("too_few_examples")
        captions = self._captions([*(cut(example) for example in firing), *(decode(example.encoded) for example in silent)])
        mine, others = captions[: len(firing)], captions[len(firing) :]
        phrase = shared_phrase(mine, others)
        if phrase is None:
            return Answer("unparsed", detail=f"no phrase that the captions share, such as: {'; '.join(mine[:SHOWN])}")
        detail = f"in {phrase.n_firing} of {len(mine)} captions, and in {phrase.n_silent} of {len(others)} of images that do not fire it"
        return Answer("ok", phrase.text, detail)


def make(name: str, params: CaptionerLabeller, saes: Mapping[str, int], say: Callable[[str], None]) -> Asked:
    """See `make_source`."""
    return Asked(Captioner(name, TransformersCaptions(params.path)))
