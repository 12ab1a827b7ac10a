"""What each of label.labellers becomes: words of a list, labels of people, or a labeller that is asked latent by latent."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import assert_never

from ommatid import config
from ommatid.label.labellers.base import Detector, Labeller
from ommatid.label.labellers.human import load_labels
from ommatid.label.labellers.vocabulary import By, load_words


@dataclass(frozen=True)
class Words:
    """Names that are words of a list."""

    words: tuple[str, ...]
    """Each once."""
    by: By
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


def make_source(name: str, params: config.Labeller, saes: Mapping[str, int], say: Callable[[str], None]) -> Source:
    """Make a labeller.

    Args:
        name: `labels.labeller`.
        params: Its values.
        saes: Number of latents of each SAE of the training, as the tables call it.
        say: Hears a sentence when a labeller gives up for good.

    Raises:
        ConfigError: a file that it needs is missing, or cannot be used.
        ModelError: the same of a model.
    """
    match params:
        case config.VocabularyLabeller():
            return Words(load_words(params.words), params.by)
        case config.HumanLabeller():
            return People(load_labels(params.path, saes))
        case config.VlmLabeller():
            from ommatid.label.labellers.vlm import Vlm, in_checkout

            vlm = Vlm(name, params, in_checkout(), say)
            return Asked(vlm, vlm, params.concurrency)
        case config.CaptionerLabeller():
            from ommatid.label.labellers.captioner import Captioner, TransformersCaptions

            return Asked(Captioner(name, TransformersCaptions(params.path)))
        case _:
            assert_never(params)
