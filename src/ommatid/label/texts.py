"""Names in the joint space of images and texts."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ommatid.events import Listener, Progress, ignore
from ommatid.metrics import unit
from ommatid.vlm import VisionModel

BLOCK = 4096
"""Names embedded at a time."""


class Texts:
    """Words, and whatever else is a name: each the mean over the model's templates, less the mean of all the words, of unit norm.

    Taking the mean away takes out what all texts share (in CLIP, the gap between texts and images).
    """

    def __init__(self, model: VisionModel, words: Sequence[str], on_event: Listener = ignore) -> None:
        self._model = model
        self.words = tuple(words)
        self._place = {word: i for i, word in enumerate(self.words)}
        blocks = []
        for start in range(0, len(self.words), BLOCK):
            blocks.append(self._embed(self.words[start : start + BLOCK]))
            on_event(Progress("embed words", min(start + BLOCK, len(self.words)), len(self.words)))
        self.embeddings = torch.cat(blocks)
        """Of the words, (words, d_joint) float32."""
        self._mean = self.embeddings.mean(0) if len(self.words) > 1 else torch.zeros(self.embeddings.shape[1])
        for rows in self.embeddings.split(BLOCK):
            rows.copy_(unit(rows - self._mean))

    def rows(self, words: Iterable[str]) -> Tensor:
        """Places of some of the words in `embeddings`."""
        return torch.tensor([self._place[word] for word in words], dtype=torch.int64)

    def embed(self, names: Sequence[str]) -> Tensor:
        """Any names, (names, d_joint) float32; the model is asked only about those that are none of the words, once each."""
        others = [name for name in dict.fromkeys(names) if name not in self._place]
        new = [unit(self._embed(others[start : start + BLOCK]) - self._mean).float() for start in range(0, len(others), BLOCK)]
        of_others = dict(zip(others, torch.cat(new), strict=True)) if new else {}
        rows = [of_others[name] if name in of_others else self.embeddings[self._place[name]] for name in names]
        return torch.stack(rows) if rows else self.embeddings[:0]

    def _embed(self, names: Sequence[str]) -> Tensor:
        templates = self._model.text_templates
        by_template = [unit(self._model.embed_text([template.format(name) for name in names])) for template in templates]
        return torch.stack(by_template).mean(0).float().cpu()
