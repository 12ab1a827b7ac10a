"""A study: what the tests of all latents of one SAE share."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt8
from torch import Tensor

from ommatid.config import InterveneParams
from ommatid.errors import InputError, ModelError
from ommatid.extract.classifier import embed_texts
from ommatid.extract.drawn import draw_images
from ommatid.images.labels import list_split
from ommatid.intervene.erasure import Erasure
from ommatid.intervene.readout import Readout
from ommatid.intervene.subject import Described, Subject
from ommatid.metrics import beyond_the_rest, unit

N_LABELS = 64
"""Number of labels, beside those of the chosen latents, toward which an edit should not move images."""
N_OUTPUTS = 32
"""Number of classes, the most common first, that are attributed to latents, and among which the output score is computed."""


N_RIVALS = 20
"""Number of other labels (or classes) beside which an edit is measured. If its own is but one of 21, it is first in one of 21 cases."""
Movement = Callable[[Float32[Tensor, "batch d"], Float32[Tensor, "batch d"]], Float64[Tensor, "batch names"]]
"""Function from outputs of the plain model and of an edited one, `(b, d)` each, to how far the edit moves each image toward the latent's
own label and toward each of up to `N_RIVALS` others, `(b, 1 + others)`."""


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
        self.no_readout = ""
        """Why no class is read from the output, once that was tried."""

    @cached_property
    def images(self) -> list[int]:
        """Numbers of the evaluation images on which the model is run, as many of each class as possible if they have classes.

        What is chosen for each arm by its outputs is chosen on the first half, every other image, and measured on the second.
        """
        images, classes = self.subject.inputs["images"], self.subject.classes
        of_eval = list_split(images, "eval")
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
        drawn = draw_images(images, numbers, len(numbers)).numbers.tolist()
        return [*drawn[::2], *drawn[1::2]]

    @property
    def n_first(self) -> int:
        """Number of images in the first half."""
        return (len(self.images) + 1) // 2

    def iter_pixels(self) -> Iterator[tuple[int, UInt8[Tensor, "batch height width 3"]]]:
        """Iterate over batches of the images, in their order and none of both halves: the number of images so far, and the pixels."""
        done = 0
        for half in (self.images[: self.n_first], self.images[self.n_first :]):
            for numbers, pixels in self.subject.load_pixels(half):
                done += len(numbers)
                yield done, pixels

    @cached_property
    def readout(self) -> Readout | None:
        """Readout of the images' classes; None if the output cannot be read so, for the reason `no_readout`."""
        try:
            return self.subject.readout
        except (InputError, ModelError) as error:
            self.no_readout = str(error)
            return None

    @cached_property
    def erasure(self) -> Erasure | None:
        """Probes for classes in the tokens of evaluation images; None if the images have fewer than two classes."""
        return Erasure(self.subject, list(self.chosen)) if self.subject.classes else None

    def movement(self, one: Described) -> Movement:
        """Return the function that tells how far an edit moves outputs toward what a latent shows, and toward what some others show.

        With a text tower, that is the text of its label, and else the logit of its class, each beyond the mean of all others; see
        `metrics.interventions.beyond_the_rest`. The others are the same for all edits of the latent.

        Raises:
            InputError: The latent has no label, or no other latent another one; without a text tower, it has no class, or no class can be
                read from the output.
        """
        if self.subject.model.d_embed is not None:
            if one.label is None:
                raise InputError("it has no label toward which an edit could move the output")
            names, scores = list(self.texts), partial(_cosines, self._unit_texts)
            if len(names) < 2:
                raise InputError(f"all labels are {one.label!r}, so an edit cannot be told from one toward another label")
            return partial(_move, scores, self._with_rivals(one.latent, names.index(one.label), len(names)))
        if not self.readout:
            raise InputError(self.no_readout)
        if one.top_class not in self.readout.names:
            raise InputError(f"its most common class is {one.top_class}, and the output says only {', '.join(self.readout.names[:8])}")
        names = self.readout.names
        return partial(_move, self.readout.scores, self._with_rivals(one.latent, names.index(one.top_class), len(names)))

    def _with_rivals(self, latent: int, own: int, n: int) -> list[int]:
        """Return the place of a latent's own name among n, and those of some others drawn at random; none if there is only one other."""
        shuffled = np.random.default_rng([self.params.seed, latent]).permutation(n).tolist()
        rivals = [place for place in shuffled if place != own]
        return [own, *(rivals[:N_RIVALS] if len(rivals) > 1 else [])]

    def has_movement(self, latent: int) -> bool:
        """Return whether it is known toward what an edit of a latent should move outputs."""
        if self.subject.model.d_embed is not None:
            return latent in self.subject.labels
        return self.readout is not None and self.subject.top_class(latent) in self.readout.names

    @cached_property
    def common(self) -> list[str]:
        """The most common classes, at most `N_OUTPUTS`, the most common first."""
        counts = Counter(self.subject.classes.values())
        names = self.readout.names if self.readout else ()
        return sorted(names, key=lambda name: (-counts[name], name))[:N_OUTPUTS]

    def among_common(self, log_p: Float64[Tensor, "batch names"]) -> Float64[Tensor, "batch common"]:
        """Return log-probabilities among the most common classes, as among all, which may be a thousand, takes too much time."""
        if not self.readout or len(self.common) == log_p.shape[1]:
            return log_p
        return log_p[:, [self.readout.index(name) for name in self.common]].log_softmax(1)

    @cached_property
    def texts(self) -> dict[str, Float64[Tensor, " d"]]:
        """Embeddings of labels, each the mean over the model's templates, `(d,)`: those of the chosen latents and some of the others."""
        labels = self.subject.labels
        names = sorted({row["label"] for row in labels.values()})
        rng = np.random.default_rng(self.params.seed)
        some = [names[place] for place in rng.permutation(len(names))[:N_LABELS]]
        wanted = list(dict.fromkeys([*(labels[latent]["label"] for latent in self.chosen if latent in labels), *some]))
        return dict(zip(wanted, embed_texts(self.subject.model, wanted), strict=True))

    @cached_property
    def _unit_texts(self) -> Float64[Tensor, "names d"]:
        """The embeddings of `texts` at unit norm; one copy serves the tests of all latents."""
        return unit(torch.stack(list(self.texts.values())))


def _cosines(texts_md: Float64[Tensor, "names d"], outputs_bd: Float32[Tensor, "batch d"]) -> Float64[Tensor, "batch names"]:
    return unit(outputs_bd) @ texts_md.T


def _move(
    scores: Callable[[Tensor], Tensor], places: list[int], plain_bd: Float32[Tensor, "batch d"], edited_bd: Float32[Tensor, "batch d"]
) -> Float64[Tensor, "batch names"]:
    """Return how far an edit moves outputs toward the names at some places, `(b, places)`."""
    return beyond_the_rest(scores(edited_bd) - scores(plain_bd))[:, places]
