"""What labelling works with: the SAE to label, and the labellers, words and image embeddings that all SAEs of a training share."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32
from pydantic import TypeAdapter
from torch import Tensor

from ommatid.activations.joint import read_joint
from ommatid.config import LabelParams, Model
from ommatid.errors import ConfigError
from ommatid.events import Listener, Warned, ignore
from ommatid.images.eval_split import EvalSplit, LatentFirings, iter_latent_firings, load_eval_split
from ommatid.label.evidence import Evidence, Spool, nearest_latents
from ommatid.label.labellers import HumanLabels, Source, WordList, make_source
from ommatid.label.labellers.vocabulary import load_words
from ommatid.label.scoring import Texts
from ommatid.store import Artefact, Draft
from ommatid.store.per_sae import any_activations
from ommatid.vlm import VisionModel, load_model
from ommatid.vlm.preprocess import Preprocess

DEFAULT_WORDS = ("imagenet", "common")
"""Word lists used if no labeller has one: labels are centred on their mean, and random controls are drawn from them."""


@dataclass(frozen=True)
class Material:
    """What all SAEs of a training share."""

    sources: Mapping[str, Source]
    """Sources of labels by the labeller's name, in the order of label.labellers."""
    texts: Texts
    """The words of all labellers, embedded."""
    split: EvalSplit
    """The evaluation images and their halves."""
    images: Tensor
    """Joint embeddings of the evaluation images, `(images, d_joint)` float32, centred, unit norm."""


def load_material(
    params: LabelParams, inputs: Mapping[str, Artefact], on_event: Listener = ignore, saes: Sequence[Artefact] | None = None
) -> Material:
    """Make the labellers, embed their words, and read the image embeddings.

    Args:
        params: The `label` section of the params.
        inputs: The images (`images`), the activations or the extraction (`extract`), and the training or one SAE of it (`train`).
        on_event: Called with each progress event and warning.
        saes: The SAEs that share it; None for those of the training.

    Returns:
        What all SAEs of the training share.

    Raises:
        ConfigError: A file of words or labels is missing or cannot be used, or no labeller has a label.
        ModelError: The model's text tower cannot be loaded.
    """
    activations = any_activations(inputs)
    training = inputs["train"].leaving_out(())  # A file of labels may still name SAEs that were rejected after it was written.
    saes = saes or list(training.each().values() if training.manifest.kind == "training" else [training])
    named = {sae.summary["sae"]: sae for sae in saes}
    sources = {name: make_source(name, labeller, named, lambda what: on_event(Warned(what))) for name, labeller in params.each().items()}
    # A log of reviews without a name is as if it were not listed, so that params.yaml may list it before anybody has named a feature.
    sources = {name: source for name, source in sources.items() if not isinstance(source, HumanLabels) or any(source.labels.values())}
    if not sources:
        raise ConfigError("label.labellers: none has a label; name a feature, or add {kind: vocabulary, words: [common]}")
    words = dict.fromkeys(word for source in sources.values() if isinstance(source, WordList) for word in source.words)
    texts = Texts(_load_namer(activations), tuple(words) or load_words(DEFAULT_WORDS), on_event)
    split = load_eval_split(inputs["images"])
    return Material(sources, texts, split, load_joint(activations, split))


def _load_namer(activations: Artefact) -> VisionModel:
    params = activations.manifest.params
    namer = TypeAdapter(Model).validate_python(params["namer"] or params["model"])
    return load_model(namer, params["dtype"], "cpu")


def load_joint(activations: Artefact, split: EvalSplit) -> Float32[Tensor, "images d_joint"]:
    """Load the joint embeddings of the evaluation images, `(images, d_joint)` float32, centred on the naming half, unit norm."""
    joint = read_joint(activations, split.images)
    naming = joint[torch.from_numpy(~split.is_held_out)]
    return torch.nn.functional.normalize(joint - naming.mean(0), dim=1) if len(naming) else joint


@dataclass(frozen=True)
class Context:
    """One SAE, with everything needed to label its latents."""

    sae: str
    """Name of the SAE in the tables."""
    d_sae: int
    """Number of latents."""
    params: LabelParams
    """The `label` section of the params."""
    inputs: Mapping[str, Artefact]
    """Input artefacts by the name of their stage."""
    draft: Draft
    """Draft of the SAE's labels."""
    material: Material
    """What all SAEs of the training share."""
    evidence: Evidence
    """What the labels of its latents are made from."""
    has_named: Bool[np.ndarray, " images"]
    """Whether each evaluation image was used to make a label or to set a threshold, by row of `EvalSplit`, bool."""
    has_scored: Bool[np.ndarray, " images"]
    """Whether each evaluation image was used to score a label, bool; the gate checks that no image was used for both."""
    on_event: Listener
    """Called with each progress event and warning."""

    def iter_fired(self) -> Iterator[LatentFirings]:
        """Iterate over the firings of each latent that fires, in order."""
        return iter_latent_firings(self.inputs["evaluate"].files("firings"), self.material.split, str(self.draft.scratch))

    def spool(self) -> Spool:
        """Return the spool of encoded evaluation images, which is written on first use."""
        preprocess = Preprocess(**self.inputs["extract"].summary["preprocessing"])
        return Spool(self.inputs["images"], self.material.split, self.draft, preprocess)


def make_context(params: LabelParams, inputs: Mapping[str, Artefact], draft: Draft, material: Material, on_event: Listener) -> Context:
    """Make the context of one SAE, and collect the evidence about its latents in one pass over the firings."""
    unused = np.zeros(len(material.split.images), dtype=bool)
    evidence = Evidence(material.split, params, nearest_latents(inputs["train"]))
    sae, d_sae = inputs["train"].summary["sae"], inputs["train"].manifest.params["d_sae"]
    context = Context(sae, d_sae, params, inputs, draft, material, evidence, unused.copy(), unused.copy(), on_event)
    evidence.fill(context.iter_fired())
    for strongest in evidence.strongest.values():
        context.has_named[strongest.rows.numpy()] = True
    return context
