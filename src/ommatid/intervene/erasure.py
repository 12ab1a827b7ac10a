"""Erasure: how well linear probes still find a latent's class in the tokens after the latent is removed from them.

What is removed along one direction can often be read from others. Probes see the mean of an image's kept tokens, from the activations that
were extracted, so the model is not run.

Suffixes: n images, c classes, d width of the edited tokens.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.functional import normalize

from ommatid.activations.columns import from_float16
from ommatid.compute.evenly import spread_evenly
from ommatid.intervene.arms import Controls
from ommatid.intervene.subject import Described, Subject
from ommatid.metrics import erasures
from ommatid.sae.model import SAE
from ommatid.store import Artefact

N_IMAGES = 1000
"""Largest number of evaluation images on which probes are fitted and tested, half of them each."""
LEAST_IMAGES = 40
"""Least number of images, and `LEAST_OF_CLASS` of them of the class, from which the accuracy of probes is given."""
LEAST_OF_CLASS = 8
N_OTHERS = 2
"""Number of other classes, the most common ones, that removing the latent should spare."""
N_DRAWS = 2
"""Number of draws of each random control, each of which takes new probes."""
ROWS = 2**14
"""Number of tokens that are read at a time."""


class Erasure:
    """Tokens of labelled evaluation images, pooled, in which probes look for classes.

    Args:
        subject: The model and the SAE.
        latents: Latents that are to be removed.
    """

    def __init__(self, subject: Subject, latents: list[int]) -> None:
        self.subject, self.latents = subject, latents
        known = sorted(subject.classes)
        self.images = [known[place] for place in spread_evenly(len(known), N_IMAGES)]
        """Numbers of the images, ascending."""
        names = [subject.classes[image] for image in self.images]
        by_class = sorted(range(len(names)), key=lambda place: (names[place], place))
        self._train, self._test = by_class[::2], by_class[1::2]
        self._names = names

    def rows(self, one: Described, controls: Controls) -> Iterator[dict[str, Any]]:
        """Iterate over rows of the table `interventions` for one latent; there are none if too few images have its class.

        Args:
            one: The latent.
            controls: Controls of the edit of this latent alone.
        """
        n_own = self._names.count(one.top_class or "")
        if len(self.images) < LEAST_IMAGES or n_own < LEAST_OF_CLASS or n_own > len(self.images) - LEAST_OF_CLASS:
            return
        others = sorted({*self._names} - {one.top_class}, key=lambda name: (-self._names.count(name), name))[:N_OTHERS]
        y = torch.tensor([[name == of_class for of_class in (one.top_class, *others)] for name in self._names])
        pooled, act = self._pooled, self._acts[:, self.latents.index(one.latent), None]
        taken = {name: pooled - act * vector for name, vector in self._vectors(one.latent, controls).items()} | {"none": pooled}
        train, test = ({name: x[half] for name, x in taken.items()} for half in (self._train, self._test))
        found = erasures(train, test, y[self._train], y[self._test], concept=0)
        for arm in dict.fromkeys(name.partition(" ")[0] for name in found):
            draws = [of_arm for name, of_arm in found.items() if name.partition(" ")[0] == arm]
            values = {"erasure": [draw.concept for draw in draws], "erasure_others": [draw.others for draw in draws]}
            for outcome, of_draws in values.items():
                yield {
                    "latent": one.latent, "outcome": outcome, "arm": arm, "dose": 0.0, "value": sum(of_draws) / len(of_draws),
                    "low": None, "high": None, "n_images": len(self._test), "n_draws": len(of_draws),
                }  # fmt: skip

    def _vectors(self, latent: int, controls: Controls) -> Mapping[str, Float[Tensor, " d_out"]]:
        """Return what each arm takes away for each unit of the latent's activation: vectors of the same norm."""
        W_dec = self.subject.sae.W_dec
        direction, length = W_dec[latent], W_dec[latent].norm()
        vectors = {"targeted": direction}
        for draw, other in enumerate(controls.random_latents[:N_DRAWS, 0].tolist()):
            vectors[f"random_latent {draw}"] = length * normalize(W_dec[other], dim=0)
        for draw, vector in enumerate(controls.random_directions[:N_DRAWS].cpu()):
            vectors[f"random_direction {draw}"] = length * vector
        return vectors if controls.diff_means is None else vectors | {"diff_means": length * controls.diff_means.cpu()}

    @cached_property
    def _pooled(self) -> Float32[Tensor, "images d_out"]:
        """Mean of each image's kept tokens at the hookpoint that is edited, `(n, d)`."""
        return self._means(self.subject.inputs.get("target", self.subject.inputs["extract"]), None)

    @cached_property
    def _acts(self) -> Float32[Tensor, "images latents"]:
        """Mean activation of each latent over an image's kept tokens, `(n, latents)`."""
        return self._means(self.subject.inputs["extract"], self.subject.sae)

    def _means(self, activations: Artefact, sae: SAE | None) -> Float32[Tensor, "images width"]:
        """Return the mean over each image's kept tokens, or over the activations of the latents on them."""
        sums, n_tokens = None, torch.zeros(len(self.images))
        images, latents = np.array(self.images), torch.tensor(self.latents)
        for batch in activations.iter_batches("eval", ["image", "x"], n_rows=ROWS):
            numbers = batch["image"].to_numpy().astype(np.int64)
            place = np.searchsorted(images, numbers).clip(max=len(images) - 1)
            keep = torch.from_numpy(images[place] == numbers)
            at, x = torch.from_numpy(place)[keep], from_float16(batch["x"])[keep].float()
            values = x if sae is None else sae.encode_latents(x, latents)
            sums = torch.zeros(len(images), values.shape[1]) if sums is None else sums
            sums.index_add_(0, at, values)
            n_tokens.index_add_(0, at, torch.ones(len(at)))
        assert sums is not None and n_tokens.all(), "an evaluation image has no activations"
        return sums / n_tokens[:, None]
