"""A study: what the tests of all latents of one SAE share."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from ommatid.config import InterveneParams
from ommatid.errors import InputError
from ommatid.extract.classifier import embed_texts
from ommatid.extract.drawn import draw_images
from ommatid.intervene.readout import Readout
from ommatid.intervene.subject import Subject

N_LABELS = 64
"""Number of labels, beside those of the chosen latents, toward which an edit should not move images."""
N_OUTPUTS = 32
"""Number of classes, the most common first, that are attributed to latents, and among which the output score is computed."""


class Study:
    """What the tests of all latents of one SAE share.

    Args:
        params: The section `intervene`.
        subject: The model and the SAE.
    """

    def __init__(self, params: InterveneParams, subject: Subject) -> None:
        self.params, self.subject = params, subject
        self.chosen: Sequence[int] = ()
        """The latents that are tested."""

    @cached_property
    def images(self) -> list[int]:
        """Numbers of the evaluation images on which the model is run, as many of each class as possible if they have classes."""
        images, classes = self.subject.inputs["images"], self.subject.classes
        table = images.read("images", ["image", "split"])
        of_eval = [image for image, split in zip(table["image"].to_pylist(), table["split"].to_pylist(), strict=True) if split == "eval"]
        rng = np.random.default_rng(self.params.seed)
        shuffled = [of_eval[place] for place in rng.permutation(len(of_eval))]
        if classes:
            seen: dict[str, int] = {}
            rank = {}
            for image in shuffled:
                label = classes.get(image, "")
                rank[image] = seen[label] = seen.get(label, -1) + 1
            shuffled.sort(key=rank.__getitem__)  # stable: the first of every class, then the second, ...
        numbers = shuffled[: self.params.n_images]
        return draw_images(images, numbers, len(numbers)).numbers.tolist()

    @cached_property
    def readout(self) -> Readout | None:
        """Readout of the images' classes; None if they have fewer than two."""
        return self.subject.readout if self.subject.classes else None

    @cached_property
    def common(self) -> list[str]:
        """The most common classes, at most `N_OUTPUTS`, the most common first."""
        counts = Counter(self.subject.classes.values())
        return sorted(counts, key=lambda name: (-counts[name], name))[:N_OUTPUTS]

    @cached_property
    def texts(self) -> dict[str, Float64[Tensor, " d"]]:
        """Embeddings of labels, each the mean over the model's templates, `(d,)`: those of the chosen latents and some of the others."""
        labels = self.subject.labels
        names = sorted({row["label"] for row in labels.values()})
        rng = np.random.default_rng(self.params.seed)
        some = [names[place] for place in rng.permutation(len(names))[:N_LABELS]]
        wanted = list(dict.fromkeys([*(labels[latent]["label"] for latent in self.chosen), *some]))
        if len(wanted) < 2:
            raise InputError(f"all labels are {wanted[0]!r}, so an edit cannot be told from one toward another label")
        return dict(zip(wanted, embed_texts(self.subject.model, wanted), strict=True))
