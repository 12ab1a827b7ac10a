"""The labeller `captioner`: captions images that fire a latent and images that do not, and picks the phrase that sets them apart."""

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
from ommatid.label.grid import N_TILES, choose_tiles, cut
from ommatid.label.labellers.base import Answer, Case, ImageLabeller
from ommatid.store import Artefact
from ommatid.vlm import hub
from ommatid.vlm.network_checks import SHAPES, structured_picture
from ommatid.vlm.precision import normalise
from ommatid.vlm.processor import load_preprocess

KEY = "label.labellers.path"
FAMILIES = ("blip", "git", "vision-encoder-decoder")
"""Supported values of model_type in config.json: models that caption an image without a question in the prompt."""
MAX_TOKENS = 24
"""Largest number of tokens in a caption."""
BATCH = 16
"""Images captioned at once."""


class TransformersCaptions:
    """Captions by BLIP, GIT, or an image encoder with a text decoder; decoding is greedy, so an image always gets the same caption.

    Args:
        path: A hub name or a local folder.

    Raises:
        ModelError: The model cannot be loaded, is of another family, or captions an image differently in a batch.
    """

    def __init__(self, path: str) -> None:
        instead = "leave this labeller out"
        folder = hub.locate(path, KEY, hub.CONFIG | hub.WEIGHTS | hub.PREPROCESSOR | hub.TOKENIZER, instead)
        family = hub.load_config(folder, path, KEY).model_type
        if family not in FAMILIES:
            raise ModelError(
                f"{KEY}: {path}: is a {family} model; a captioner must be of one of the families {', '.join(FAMILIES)}; run a model that "
                "needs a question in the prompt on a server such as vLLM, and use {kind: vlm}"
            )
        self._preprocess = load_preprocess(folder, path, KEY)
        self._tokenizer = hub.load_tokenizer(folder, path, KEY)
        model, _ = hub.load_weights(AutoModelForImageTextToText, folder, path, KEY)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device)
        self._check(path)

    def _check(self, path: str) -> None:
        """Check that a picture gets the same caption alone and in a batch: the model must not be random, nor mix the images of a batch."""
        picture, other = (structured_picture(*shape) for shape in SHAPES)
        with hub.reading(path, KEY, "its caption of a test picture"):
            alone, batch = self([picture]), self([picture, other])
        if alone[0] != batch[0]:
            raise ModelError(
                f"{KEY}: {path}: captions a picture {alone[0]!r} when alone, and {batch[0]!r} in a batch: the model draws something at "
                "random in every pass, such as masks, or mixes the images of a batch; use another model"
            )

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """Caption each image."""
        captions: list[str] = []
        for start in range(0, len(images), BATCH):
            pixels = torch.stack([torch.from_numpy(self._preprocess(image)) for image in images[start : start + BATCH]])
            x = normalise(pixels, self._preprocess, self._device).contiguous()
            with hub.quiet():
                tokens: Any = self._model.generate(pixel_values=x, max_new_tokens=MAX_TOKENS, do_sample=False, num_beams=1)
            captions += self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [caption.strip() for caption in captions]


LONGEST = 3
"""Largest number of words in a phrase."""
FEWEST = 2
"""Smallest number of firing captions that must contain a phrase."""
LEAST_SHARE = 0.25
"""Smallest share of firing captions that must contain a phrase: one in fewer is not what the images have in common."""
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_LIST = (
    "a an the this that these those some any each one two three several many few other another it its he his she her they their them "
    "there here who which what where when of in on at by to from with without for as into onto over under up down out off near next "
    "behind between through around across above below and or but not no is are was were be been being has have having do does very "
    "image images photo photos photograph picture pictures view close close-up closeup shot unknown unk"
)
_EMPTY = frozenset(_LIST.split())
"""Words that say nothing about the content of an image; a phrase neither begins nor ends with one."""


@dataclass(frozen=True)
class Phrase:
    """A sequence of words, and how many captions contain it."""

    text: str
    """The words in lower case, separated by blanks."""
    n_firing: int
    """Number of captions of firing images that contain it."""
    n_silent: int
    """Number of captions of silent images that contain it."""


def shared_phrase(firing: Sequence[str], silent: Sequence[str]) -> Phrase | None:
    """Return the phrase of one to three words that best distinguishes the captions of firing images from those of silent ones.

    It is the phrase with the largest f · log2(f / g), where f is the share of firing captions that contain it, and g the share of silent
    ones, smoothed to (n + 1/2) / (N + 1) so that it is never 0. This is a term of the Kullback-Leibler divergence, and a kind of tf-idf.
    Among equals, the phrase with more words is chosen, then the first in alphabetical order. At least a quarter of the firing captions,
    and at least two of them, contain the phrase, and a larger share of them than of the silent captions.

    Args:
        firing: Captions of images that fire the latent.
        silent: Captions of images that do not.

    Returns:
        The phrase; None if there is no such phrase.
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
    """Count the captions that contain each phrase."""
    return Counter(phrase for caption in captions for phrase in set(_phrases(caption)))


def _phrases(caption: str) -> Iterator[str]:
    """Iterate over the phrases of a caption: up to `LONGEST` words in a row, without empty words at either end."""
    words = _WORD.findall(caption.lower())
    for start in range(len(words)):
        for end in range(start + 1, min(start + LONGEST, len(words)) + 1):
            if words[start] not in _EMPTY and words[end - 1] not in _EMPTY:
                yield " ".join(words[start:end])


SHOWN = 3
"""Captions quoted in the detail of an answer without a label."""

Captions = Callable[[Sequence[Image.Image]], list[str]]
"""A function that captions each image."""


class Captioner:
    """Labels a latent with a phrase that captions of its firing images share.

    Firing images are cropped around what fires but not faded, because a caption would mention the grey. Silent images stay whole.
    """

    def __init__(self, name: str, captions: Captions) -> None:
        self.name = name
        self._captions = captions

    def answer(self, case: Case) -> Answer:
        """Return the phrase that captions of firing images share; the status is `unparsed` if they share none."""
        firing, silent = choose_tiles(case.firing), case.silent[:N_TILES]
        if not firing:
            return Answer("too_few_examples")
        captions = self._captions([*(cut(example) for example in firing), *(decode(example.encoded) for example in silent)])
        on_firing, on_silent = captions[: len(firing)], captions[len(firing) :]
        phrase = shared_phrase(on_firing, on_silent)
        if phrase is None:
            return Answer("unparsed", detail=f"the captions share no phrase; the first are: {'; '.join(on_firing[:SHOWN])}")
        in_firing, in_silent = f"{phrase.n_firing} of {len(on_firing)}", f"{phrase.n_silent} of {len(on_silent)}"
        detail = f"in {in_firing} captions of firing images, and in {in_silent} of silent ones"
        return Answer("ok", phrase.text, detail)


def make(name: str, params: CaptionerLabeller, saes: Mapping[str, Artefact], warn: Callable[[str], None]) -> ImageLabeller:
    """Make the labeller; see `make_source`."""
    return ImageLabeller(Captioner(name, TransformersCaptions(params.path)))
