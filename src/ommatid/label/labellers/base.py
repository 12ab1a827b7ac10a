"""The interface between the stage and its labellers: what a labeller is shown of a latent, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float32

Status = Literal["ok", "unparsed", "refused", "failed", "over_budget", "too_few_examples"]
"""Outcome of labelling a latent. ok: there is a label; unparsed: the answer contains no label; refused: the model declined to answer;
failed: no answer after all tries; over_budget: not asked because the budget was spent; too_few_examples: too few images fire the latent."""


@dataclass(frozen=True)
class Example:
    """An image of the naming half, and what a latent does on it."""

    image: int
    """Number of the image, the column `images.image`."""
    encoded: bytes
    """The image file as it is in the data set."""
    act: float
    """Image-level activation of the latent; 0 if it does not fire."""
    heat: Float32[np.ndarray, "rows columns"] | None
    """Activation of each patch, `(rows, cols)` float32; None if tokens have no place in the image, or no heat map was kept."""
    seen: tuple[float, float] = (1.0, 1.0)
    """Share of the image's width and height, around its centre, that the model sees and the heat map covers."""


@dataclass(frozen=True)
class Case:
    """A latent to label, with the images to label it from."""

    latent: int
    """Index of the latent."""
    firing: tuple[Example, ...]
    """Images on which the latent fires, strongest first."""
    silent: tuple[Example, ...]
    """Images on which it does not fire: random ones, and ones that fire the latents with the nearest directions."""


@dataclass(frozen=True)
class Answer:
    """A labeller's answer about one latent."""

    status: Status
    """Outcome. A failure is a status, and never text in `label`."""
    label: str | None = None
    """The label; None unless the status is ok."""
    detail: str | None = None
    """Why there is no label, or what the labeller said beside it."""
    n_requests: int = 0
    """Number of requests sent to a server; 0 if there is no server or the answer was cached."""
    n_tokens: int = 0
    """Number of tokens in those requests, prompts and answers together."""


class Labeller(Protocol):
    """Labels one latent at a time from images."""

    @property
    def name(self) -> str:
        """Name of the labeller, the column `labels.labeller`."""
        ...

    def answer(self, case: Case) -> Answer:
        """Label one latent from images of the naming half only."""
        ...


class Detector(Protocol):
    """Decides which images show what a label says, as a labeller's own check of its labels in addition to the joint embedding."""

    @property
    def name(self) -> str:
        """Name of the labeller whose labels it checks, the column `labels.labeller`."""
        ...

    def fires(self, label: str, images: tuple[bytes, ...]) -> tuple[float, ...] | None:
        """Return how clearly each image shows what the label says, 0 to 1; None if there was no usable answer."""
        ...


@dataclass(frozen=True)
class WordList:
    """A list of words, from which each latent gets the one that fits it best."""

    words: tuple[str, ...]
    """The words, without duplicates."""
    by: Literal["mean", "soft_wpmi"]
    """Criterion by which the word is chosen; see `vocabulary.choose`."""


@dataclass(frozen=True)
class HumanLabels:
    """Labels that people wrote."""

    labels: Mapping[str, Mapping[int, str]]
    """Labels by the SAE's name in the tables and by latent."""


@dataclass(frozen=True)
class ImageLabeller:
    """A labeller that looks at the images of one latent at a time."""

    labeller: Labeller
    """Labels the latents."""
    detector: Detector | None = None
    """Checks the labeller's own labels; None if it cannot."""
    concurrency: int = 1
    """Number of latents to ask about concurrently."""


Source = WordList | HumanLabels | ImageLabeller
"""Where the labels of one labeller come from."""
