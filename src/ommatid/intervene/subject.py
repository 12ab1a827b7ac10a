"""Subject of a study: a model and one of its SAEs, ready to be edited and read.

Suffixes: d width of the edited activations, s latents.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, UInt8
from torch import Tensor

from ommatid.activations.batches import load_sample
from ommatid.activations.columns import from_float16
from ommatid.errors import InputError, ModelError
from ommatid.extract.classifier import embed_texts, make_classifier
from ommatid.extract.drawn import draw_images, iter_drawn_pixels
from ommatid.extract.networks import find_device, load_explained, load_picker
from ommatid.extract.tokens import TokenPicker
from ommatid.images.labels import load_classes
from ommatid.intervene.arms import Controls, draw_controls
from ommatid.intervene.edit import Editor
from ommatid.intervene.firings import Firings, find_firings
from ommatid.intervene.head import fit_head, load_head
from ommatid.intervene.readout import Readout
from ommatid.metrics import unit
from ommatid.sae.model import SAE
from ommatid.store import Artefact
from ommatid.vlm import VisionModel

N_SAMPLE = 2**17
"""Number of training tokens from which the scale of each latent, and the mean of the tokens on which it fires, are computed."""
SAME_MODEL = 0.1
"""Largest relative difference between the activations of an image, then and now, that rounding and another machine explain."""
AT_ONCE = 64
"""Number of latents that are described together, unless the firings of all are known."""


@dataclass(frozen=True, eq=False)
class Described:
    """What is known of a latent before it is edited."""

    latent: int
    """Index of the latent."""
    label: str | None
    """Its best label; None if it has none."""
    n_firing: int
    """Number of sampled training tokens on which it fires."""
    scale: float
    """Activation that dose 1 is: the 99th percentile of its positive ones on the sampled tokens; NaN if it fires on none."""
    diff_means: Float32[Tensor, " d_out"] | None
    """Mean of the sampled tokens on which it fires, minus that of the others, `(d,)`. None if it fires on none or all of them, or if the
    edited tokens are not those that it reads."""
    most: float
    """Largest activation observed: on the sampled tokens, or on any token of the evaluation images."""
    top_class: str | None
    """Most common class of its strongest images; None if they have none."""


class Subject:
    """A study's model and one of its SAEs, ready to be edited and read."""

    def __init__(self, inputs: Mapping[str, Artefact], load: Callable[[], VisionModel] | None = None, head: str | None = None) -> None:
        """Load the SAE; the model is loaded when it is first needed.

        Args:
            inputs: `images`, the activations (`extract`), the SAE (`train`), its evaluation (`evaluate`), its labels (`label`) and, for a
                transcoder, the activations that it decodes (`target`).
            load: Function that returns the explained model, if it may have been loaded already; None loads it from the params.
            head: File with a linear head by which classes are read from the output; see `load_head`.

        Raises:
            ModelError: The activations were imported from files.
        """
        self.inputs = inputs
        if "model" not in inputs["extract"].manifest.params:
            raise ModelError("the activations were imported from files, and the model that they come from is not available")
        self._load, self.head = load, head
        self.device: str = find_device()
        """Device of the model."""
        self.sae: SAE = SAE.load(inputs["train"].path)
        """The SAE, on the CPU."""

    @cached_property
    def model(self) -> VisionModel:
        """The explained model.

        Raises:
            ModelError: It cannot be loaded.
        """
        return self._load() if self._load else load_explained(self.inputs["extract"].manifest.params)

    @cached_property
    def reads(self) -> TokenPicker:
        """Tokens that the SAE encodes.

        Raises:
            ModelError: The model lacks the hookpoint, or has other weights than the one that the SAE explains.
        """
        picker = load_picker(self.model, self.inputs["extract"])
        self._check_weights(picker)
        return picker

    @cached_property
    def writes(self) -> TokenPicker:
        """Tokens that are edited: those that are encoded, except for a transcoder.

        Raises:
            ModelError: The model lacks the hookpoint.
        """
        return load_picker(self.model, self.inputs["target"]) if self.sae.config.target else self.reads

    @cached_property
    def classes(self) -> dict[int, str]:
        """Class of each evaluation image, by image number; empty unless there are several classes."""
        return load_classes(self.inputs["images"])

    @cached_property
    def labels(self) -> dict[int, dict[str, Any]]:
        """Label and score of each latent that has a label, by latent: the same that the relation `features` shows."""
        return best_labels(self.inputs["label"])

    @cached_property
    def latents(self) -> dict[int, dict[str, Any]]:
        """What the evaluation says of each latent, by latent."""
        columns = ["latent", "ms", "density", "is_dead", "n_images", "max_act", "top_classes"]
        return {row["latent"]: row for row in self.inputs["evaluate"].read("latents", columns).to_pylist()}

    @cached_property
    def sample(self) -> Float32[Tensor, "tokens d_model"]:
        """Training tokens, `(tokens, d_model)` float32."""
        return load_sample(self.inputs["extract"], N_SAMPLE)

    @cached_property
    def mean(self) -> Float32[Tensor, " d_out"]:
        """Mean of training tokens at the hookpoint that is edited, `(d,)`."""
        return (load_sample(self.inputs["target"], N_SAMPLE) if self.sae.config.target else self.sample).mean(0)

    @cached_property
    def densities(self) -> tuple[Float64[Tensor, " d_sae"], Bool[Tensor, " d_sae"]]:
        """Share of tokens on which each latent fires, and whether it is live, `(s,)` each."""
        density, is_live = torch.zeros(self.sae.n_latents, dtype=torch.float64), torch.zeros(self.sae.n_latents, dtype=torch.bool)
        at = list(self.latents)
        density[at] = torch.tensor([row["density"] for row in self.latents.values()], dtype=torch.float64)
        is_live[at] = torch.tensor([not row["is_dead"] for row in self.latents.values()])
        return density, is_live

    def check_latent(self, latent: int) -> None:
        """Check that a latent can be edited.

        Raises:
            InputError: It does not exist, or is dead.
        """
        if not 0 <= latent < self.sae.n_latents:
            raise InputError(f"latent {latent} does not exist; {self.sae.name} has latents 0 to {self.sae.n_latents - 1}")
        if not self.densities[1][latent]:
            raise InputError(f"latent {latent} is dead: it fires on no image, so no dose is relative to it; choose a live one")

    def describe(self, latents: Sequence[int]) -> Iterator[Described]:
        """Describe latents by the sampled tokens and by the evaluation, in their order."""
        for start in range(0, len(latents), AT_ONCE):
            some = latents[start : start + AT_ONCE]
            firings = self.firings if "firings" in vars(self) else find_firings(self.sae, self.sample, some)
            total, n = self.sample[: firings.n_tokens].sum(0), firings.n_tokens
            for latent in some:
                n_firing, means = firings.count(latent), None
                if self.reads == self.writes and 0 < n_firing < n:
                    inside = self.sample[firings.tokens(latent)].sum(0)
                    means = inside / n_firing - (total - inside) / (n - n_firing)
                label = self.labels.get(latent, {}).get("label")
                most = max(firings.most(latent), self.latents[latent]["max_act"])
                yield Described(latent, label, n_firing, firings.scale(latent), means, most, self.top_class(latent))

    @cached_property
    def firings(self) -> Firings:
        """Firings of all latents on the sampled tokens; to know those of a few, `describe` does not need them."""
        return find_firings(self.sae, self.sample)

    def top_class(self, latent: int) -> str | None:
        """Return the most common class of a latent's strongest images; None if they have none."""
        return next(iter(self.latents[latent]["top_classes"] or ()), None)

    @cached_property
    def device_sae(self) -> SAE:
        """The SAE on the model's device."""
        return SAE(self.sae.config, **{name: tensor.to(self.device) for name, tensor in self.sae.tensors().items()})

    def editor(self, described: Sequence[Described]) -> Editor:
        """Return an editor of latents, in which dose 1 is the scale of each.

        Raises:
            InputError: As for `Editor`.
            ModelError: As for `Editor`.
        """
        scales = torch.full((self.sae.n_latents,), math.nan)
        scales[[one.latent for one in described]] = torch.tensor([one.scale for one in described])
        reads = None if self.reads == self.writes else self.reads
        return Editor(self.device_sae, [one.latent for one in described], self.writes, reads, scales, self.device)

    def controls(self, described: Sequence[Described], seed: int, draws: int) -> Controls:
        """Draw the controls of an edit of latents. None is a latent with the same label as an edited one.

        Args:
            described: The latents that are edited together; the difference of means is the sum of theirs.
            seed: Seed of the draws.
            draws: Number of draws of each random control.

        Raises:
            InputError: As for `draw_controls`.
        """
        latents = [one.latent for one in described]
        means = [one.diff_means for one in described if one.diff_means is not None]
        together = torch.stack(means).sum(0) if len(means) == len(described) else None
        return draw_controls(self.editor(described), latents, self.densities[0], self.comparable(latents), together, seed, draws)

    def comparable(self, latents: Sequence[int]) -> Bool[Tensor, " d_sae"]:
        """Return whether each latent is live, and has a label other than those of given ones unless it is one of them, `(s,)`."""
        named = {self.labels[latent]["label"] for latent in latents if latent in self.labels}
        is_live = self.densities[1].clone()
        is_live[[latent for latent, row in self.labels.items() if row["label"] in named and latent not in latents]] = False
        return is_live

    @cached_property
    def readout(self) -> Readout:
        """Readout of classes: by the head that was given, by the texts of the images' classes, or by a head fitted to training images.

        Raises:
            ConfigError: The given head does not fit the model.
            InputError: The images have no several classes.
            ModelError: The model has no scale of its own, and no training image has a label by which to fit one; or it has no text tower,
                and no head can be fitted to the training images.
        """
        if self.head:
            return load_head(self.head, self.model)
        if self.model.d_embed is None:
            return fit_head(self.model, self.inputs["images"], self.writes.name, self.device)
        names = sorted(set(self.classes.values()))
        if not names:
            raise InputError("the evaluation images are not of several classes, by which the model's output could be read; name texts")
        measured = self.inputs["evaluate"].read("zero_shot", ["logit_scale"])["logit_scale"].to_pylist()
        classifier = make_classifier(self.model, self.inputs["images"], names, next(iter(measured), None))
        return Readout(tuple(names), classifier.texts, classifier.scale)

    def text_readout(self, texts: Sequence[str]) -> Readout:
        """Return a readout of free texts, each embedded in the model's templates.

        Its scale is the model's own, or else the one that fits the classes of the images best, or 1 if they have none.

        Raises:
            InputError: There is no text, or one is given twice.
            ModelError: The model has no text tower.
        """
        self._check_text()
        if not texts or len(set(texts)) < len(texts):
            raise InputError(f"texts are {list(texts)}; give one or more, each once")
        scale = self.model.logit_scale or (self.readout.scale if self.classes else 1.0)
        return Readout(tuple(texts), unit(embed_texts(self.model, texts)), scale)

    def load_pixels(self, images: Sequence[int]) -> Iterator[tuple[np.ndarray, UInt8[Tensor, "batch height width 3"]]]:
        """Iterate over the pixels of images of the study.

        Args:
            images: Numbers of the images.

        Yields:
            Batches in the order of the images artefact: numbers `(b,)`, and uint8 pixels `(b, H, W, 3)` on the model's device.
        """
        drawn = draw_images(self.inputs["images"], images, len(images))
        for batch in iter_drawn_pixels(self.inputs["images"], drawn, self.model.preprocess, self.device):
            yield batch.numbers, batch.of[0].to(self.device)

    def _check_weights(self, picker: TokenPicker) -> None:
        """Check that the model still gives the first evaluation image the activations that were extracted."""
        activations = self.inputs["extract"]
        rows = next(activations.iter_batches("eval", ["image", "x"], activations.summary["tokens_per_image"]))
        ((_, pixels),) = self.load_pixels([rows["image"][0].as_py()])
        with torch.no_grad():
            now = picker.pick(self.model.capture(pixels, [picker.name]).tokens[picker.name])[0].float().cpu()
        then = from_float16(rows["x"]).float()
        off = float((now - then).norm() / then.norm()) if now.shape == then.shape else math.inf
        if not off <= SAME_MODEL:
            raise ModelError(
                f"{self.model.name}: its activations at {picker.name} are not those in {activations.url}, from which the SAE comes: those "
                f"of one image differ by {100 * off:.0f} %; bring back the weights of then, or run `dvc repro extract`"
            )

    def _check_text(self) -> None:
        if self.model.d_embed is None:
            raise ModelError(
                f"{self.model.name} has no text tower with which to embed texts; leave them out to read classes by a linear head"
            )


def best_labels(labels: Artefact) -> dict[int, dict[str, Any]]:
    """Load the label and the score of each latent that has a label, by latent; of several labels, the one that `features` shows."""
    found: dict[int, dict[str, Any]] = {}
    for row in sorted(labels.read("labels", ["latent", "labeller", "place", "status", "label", "score"]).to_pylist(), key=_label_order):
        if row["status"] == "ok":
            found.setdefault(row["latent"], row)
    return found


def _label_order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Order of labels in which the first one of a latent is its best, as in the relation `features`."""
    score = -math.inf if row["score"] is None else row["score"]
    return (row["latent"], not row["labeller"].startswith("human"), -score, row["place"], row["labeller"])
