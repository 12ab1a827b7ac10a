"""What a labeller is shown of a latent, and what it answers: the seam between the stage and everything that gives names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Status = Literal["ok", "unparsed", "refused", "failed", "over_budget", "too_few_examples"]
"""ok: there is a label; unparsed: an answer that is none; refused: the model would not; failed: no answer after all tries;
over_budget: it was not asked; too_few_examples: there was nothing to ask about."""


@dataclass(frozen=True)
class Example:
    """An image of the naming half, and what a latent does on it."""

    image: int
    """images.image"""
    encoded: bytes
    """The image file, as it came."""
    act: float
    """Image-level activation; 0: it does not fire."""
    heat: np.ndarray | None
    """Activation of each patch, (rows, cols) float32; None: tokens have no place, or nobody looked."""
    seen: tuple[float, float] = (1.0, 1.0)
    """Share of width and height, about the centre, that the model sees: where heat lies."""


@dataclass(frozen=True)
class Case:
    """A latent to name."""

    latent: int
    """Index."""
    firing: tuple[Example, ...]
    """Strongest first."""
    silent: tuple[Example, ...]
    """Images on which it does not fire: random ones, and such that fire the latents with the nearest directions."""


@dataclass(frozen=True)
class Answer:
    """What a labeller says of a latent."""

    status: Status
    """A failed answer is a status, never a label."""
    label: str | None = None
    """The name; None: status is not ok."""
    detail: str | None = None
    """Why not, or what else was said."""
    n_requests: int = 0
    """Calls of a server that it took; 0: none, or it was remembered."""
    n_tokens: int = 0
    """Tokens of these calls, asked and answered."""


class Labeller(Protocol):
    """Names latents one by one from their images."""

    @property
    def name(self) -> str:
        """`labels.labeller`."""
        ...

    def answer(self, case: Case) -> Answer:
        """The name of one latent, from images of the naming half only."""
        ...


class Detector(Protocol):
    """Says of images whether a name is true of them: a labeller's own second opinion, beside that of the joint embedding."""

    @property
    def name(self) -> str:
        """`labels.labeller` of those that it judges."""
        ...

    def fires(self, label: str, images: tuple[bytes, ...]) -> tuple[float, ...] | None:
        """How far each image shows what the label says, 0 to 1; None: no usable answer."""
        ...


@dataclass(frozen=True)
class Words:
    """Names that are words of a list."""

    words: tuple[str, ...]
    """Each once."""
    by: Literal["mean", "soft_wpmi"]
    """How the word is found."""


@dataclass(frozen=True)
class People:
    """Names that were given."""

    labels: Mapping[str, Mapping[int, str]]
    """By SAE, as the tables call it, and latent."""


@dataclass(frozen=True)
class Asked:
    """Names from a labeller that looks at images, latent by latent."""

    labeller: Labeller
    """Who is asked."""
    detector: Detector | None = None
    """Its second opinion on its own names; None: it has none."""
    concurrency: int = 1
    """Latents that are worth asking about at a time."""


Source = Words | People | Asked
