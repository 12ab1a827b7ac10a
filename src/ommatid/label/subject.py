"""An SAE whose latents get names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ommatid.config import LabelParams
from ommatid.events import Listener
from ommatid.halves import Fired, iter_fired
from ommatid.label.cases import Spool
from ommatid.label.gathered import Gathered, nearest_latents
from ommatid.label.material import Material
from ommatid.store import Artefact, Draft
from ommatid.vlm.preprocess import Preprocess


@dataclass(frozen=True)
class Subject:
    """One SAE, and all that naming its latents takes."""

    sae: str
    """What the tables call it."""
    d_sae: int
    params: LabelParams
    inputs: Mapping[str, Artefact]
    draft: Draft
    material: Material
    gathered: Gathered
    """Of its latents what names are made of."""
    has_named: np.ndarray
    """Whether each evaluation image helped to make a name or a threshold, by row of `Halves`."""
    has_scored: np.ndarray
    """Whether it served to score one: the gate holds that no image did both."""
    on_event: Listener

    def iter_fired(self) -> Iterator[Fired]:
        """The latents that fire, in order."""
        return iter_fired(self.inputs["evaluate"].files("firings"), self.material.halves, str(self.draft.scratch))

    def spool(self) -> Spool:
        """The encoded images, which are copied for that where they have not been."""
        preprocess = Preprocess(**self.inputs["extract"].summary["preprocessing"])
        return Spool(self.inputs["images"], self.material.halves, self.draft, preprocess)


def make_subject(params: LabelParams, inputs: Mapping[str, Artefact], draft: Draft, material: Material, on_event: Listener) -> Subject:
    """Gather what names are made of, by one pass over the firings."""
    unused = np.zeros(len(material.halves.images), dtype=bool)
    gathered = Gathered(material.halves, params, nearest_latents(inputs["train"]))
    sae, d_sae = inputs["train"].summary["sae"], inputs["train"].manifest.params["d_sae"]
    subject = Subject(sae, d_sae, params, inputs, draft, material, gathered, unused.copy(), unused.copy(), on_event)
    gathered.fill(subject.iter_fired())
    for strongest in gathered.strongest.values():
        subject.has_named[strongest.rows.numpy()] = True
    return subject
