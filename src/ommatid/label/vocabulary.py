"""The labeller `vocabulary`: the word nearest to what a latent's strongest images have in common, in the joint space."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ommatid.errors import ConfigError
from ommatid.metrics import unit
from ommatid.vlm import VisionModel, imagenet_classes

By = Literal["mean", "soft_wpmi"]


@dataclass(frozen=True)
class Vocabulary:
    """Words and their places in the joint space."""

    words: tuple[str, ...]
    embeddings: Tensor
    """(words, d_joint) float64, centred on the vocabulary's mean, unit norm."""

    def nearest(self, directions_nd: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the word with the largest cosine to each direction, and that cosine, (n,) each."""
        cosines = unit(directions_nd) @ self.embeddings.T
        best = cosines.max(1)
        return best.indices, best.values


def load_words(lists: Sequence[str]) -> tuple[str, ...]:
    """The words of all lists in order, each once.

    Args:
        lists: `imagenet`, `common`, or paths of text files with one name a line.

    Raises:
        ConfigError: a file is missing or has no words.
    """
    words = [word for name in lists for word in _load_list(name)]
    return tuple(dict.fromkeys(words))


def embed_words(model: VisionModel, words: Sequence[str]) -> Vocabulary:
    """Put words into the model's joint space: the mean over its templates, centred on all the words.

    Centring takes out what all texts share (in CLIP, the gap between texts and images).
    """
    by_template = [unit(model.embed_text([template.format(word) for word in words])) for template in model.text_templates]
    embeddings = torch.stack(by_template).mean(0)
    centred = embeddings - embeddings.mean(0) if len(words) > 1 else embeddings
    return Vocabulary(tuple(words), unit(centred))


def _load_list(name: str) -> Sequence[str]:
    if name == "imagenet":
        return imagenet_classes()
    if name == "common":
        return _parse((files("ommatid.label") / "words" / "common.txt").read_text(encoding="utf-8"))
    try:
        words = _parse(Path(name).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"label.labellers: words: {name!r}: {error}; use imagenet, common, or a text file with one name a line") from None
    if not words:
        raise ConfigError(f"label.labellers: words: {name!r} has no words; write one name a line")
    return words


def _parse(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]
