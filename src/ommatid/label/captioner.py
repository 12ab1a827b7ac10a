"""The labeller `captioner`: captions what a latent fires on and what it does not, and takes the phrase that makes the difference."""

from collections.abc import Callable, Sequence

from PIL import Image

from ommatid.images.decode import decode
from ommatid.label.labeller import Answer, Case
from ommatid.label.phrases import shared_phrase
from ommatid.label.pictures import N_TILES, choose_shown, cut

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
