"""What labellers work with: the SAE whose latents are labelled, and the words and images that are shared by all SAEs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from ommatid.activations.columns import from_float32
from ommatid.config import LabelParams, Model
from ommatid.events import Listener, Warned, ignore
from ommatid.images.eval_split import EvalSplit, LatentFirings, iter_latent_firings, load_eval_split
from ommatid.label.evidence import Gathered, Spool, nearest_latents
from ommatid.label.labellers import Source, Words, make_source
from ommatid.label.labellers.vocabulary import load_words
from ommatid.label.scoring import Texts
from ommatid.store import Artefact, Draft
from ommatid.vlm import VisionModel, load_model
from ommatid.vlm.preprocess import Preprocess

STANDARD = ("imagenet", "common")
"""Words that stand for all that can be said where no labeller has any: they centre the names, and one is the random control."""


@dataclass(frozen=True)
class Material:
    """The same for all SAEs of a training."""

    sources: Mapping[str, Source]
    """The labellers, by `labels.labeller`."""
    texts: Texts
    """The words of all of them."""
    halves: EvalSplit
    """The evaluation images."""
    images: Tensor
    """Their joint embeddings, (images, d_joint) float32, centred, unit norm."""


def load_material(params: LabelParams, inputs: Mapping[str, Artefact], on_event: Listener = ignore) -> Material:
    """Make the labellers, embed their words, and read the images' embeddings.

    Args:
        params: The section `label`.
        inputs: `images`, the activations (`extract`), and the training or one SAE of it (`train`).
        on_event: Hears of the words.

    Raises:
        ConfigError: a file of words or labels is missing, or cannot be used.
        ModelError: the model's text tower cannot be loaded.
    """
    training = inputs["train"].leaving_out(())  # labels by people may be of SAEs that were rejected since
    saes = training.each().values() if training.manifest.kind == "training" else [training]
    n_latents = {sae.summary["sae"]: sae.manifest.params["d_sae"] for sae in saes}
    sources = {
        name: make_source(name, labeller, n_latents, lambda what: on_event(Warned(what))) for name, labeller in params.each().items()
    }
    words = dict.fromkeys(word for source in sources.values() if isinstance(source, Words) for word in source.words)
    texts = Texts(_load_namer(inputs["extract"]), tuple(words) or load_words(STANDARD), on_event)
    halves = load_eval_split(inputs["images"])
    return Material(sources, texts, halves, load_joint(inputs["extract"], halves))


def _load_namer(activations: Artefact) -> VisionModel:
    params = activations.manifest.params
    namer = TypeAdapter(Model).validate_python(params["namer"] or params["model"])
    return load_model(namer, params["dtype"], "cpu")


def load_joint(activations: Artefact, halves: EvalSplit) -> Tensor:
    """Joint embeddings of the evaluation images, centred on the naming half, unit norm: (images, d_joint) float32."""
    joint = torch.empty(len(halves.images), activations.summary["d_joint"])
    for batch in activations.iter_batches("embeddings", ["image", "joint"], n_rows=4096):
        numbers = batch["image"].to_numpy()
        place = np.searchsorted(halves.images, numbers).clip(max=len(halves.images) - 1)
        keep = halves.images[place] == numbers
        joint[torch.from_numpy(place[keep])] = from_float32(batch["joint"])[torch.from_numpy(keep)]
    naming = joint[torch.from_numpy(~halves.is_held_out)]
    return torch.nn.functional.normalize(joint - naming.mean(0), dim=1) if len(naming) else joint


@dataclass(frozen=True)
class Context:
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
    """Whether each evaluation image helped to make a name or a threshold, by row of `EvalSplit`."""
    has_scored: np.ndarray
    """Whether it served to score one: the gate holds that no image did both."""
    on_event: Listener

    def iter_fired(self) -> Iterator[LatentFirings]:
        """The latents that fire, in order."""
        return iter_latent_firings(self.inputs["evaluate"].files("firings"), self.material.halves, str(self.draft.scratch))

    def spool(self) -> Spool:
        """The encoded images, which are copied for that where they have not been."""
        preprocess = Preprocess(**self.inputs["extract"].summary["preprocessing"])
        return Spool(self.inputs["images"], self.material.halves, self.draft, preprocess)


def make_context(params: LabelParams, inputs: Mapping[str, Artefact], draft: Draft, material: Material, on_event: Listener) -> Context:
    """Gather what names are made of, by one pass over the firings."""
    unused = np.zeros(len(material.halves.images), dtype=bool)
    gathered = Gathered(material.halves, params, nearest_latents(inputs["train"]))
    sae, d_sae = inputs["train"].summary["sae"], inputs["train"].manifest.params["d_sae"]
    context = Context(sae, d_sae, params, inputs, draft, material, gathered, unused.copy(), unused.copy(), on_event)
    gathered.fill(context.iter_fired())
    for strongest in gathered.strongest.values():
        context.has_named[strongest.rows.numpy()] = True
    return context
