"""The table `zero_shot`: how well the model still classifies images when a reconstruction x̂ replaces the activations x at the hookpoint.

All variants run on the same images and the same live activations, in the arithmetic of extraction:
plain: nothing is replaced.
sae: x̂, the SAE's reconstruction of x.
sae_with_error: x̂ + (x − x̂), which must give the same result as plain; if it does not, splicing itself changes the computation.
mean: the mean of the training tokens, the same vector for every token.
untrained, and each of `evaluate.baselines`: the reconstruction by that dictionary.

Suffixes: b images, t tokens, k tokens that were extracted, d d_model, n images in all, c classes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from ommatid import schemas
from ommatid.activations.batches import load_sample
from ommatid.compute.undefined import none_for_nan
from ommatid.errors import ModelError
from ommatid.evaluate.batches import ENTRIES
from ommatid.events import Listener, Progress, Warned
from ommatid.extract.classifier import make_classifier
from ommatid.extract.drawn import draw_images, iter_drawn_pixels
from ommatid.extract.networks import find_device, load_explained, load_picker
from ommatid.extract.tokens import TokenPicker
from ommatid.images.labels import load_labels
from ommatid.metrics import Classified, Interval, classify, downstream_kl, downstream_loss, recovered
from ommatid.sae.baselines import Dictionary
from ommatid.store import Artefact
from ommatid.vlm import Replacement, VisionModel

N_IMAGES = 1000
"""Maximum number of evaluation images. Accuracy is then known to three percentage points; the recovered share, a ratio of paired
numbers, is known more closely."""
N_MEAN = 2**14
"""Maximum number of training tokens over which the mean is taken."""


class _Undefined(Exception):
    """Raised, with the reason, if zero-shot classification is undefined for these images or this model."""


@dataclass(frozen=True)
class ZeroShot:
    """Result of the zero-shot measurement."""

    status: str
    """`ok`, or the reason why nothing was measured."""
    rows: list[dict[str, Any]]
    """Rows of the table `zero_shot`; empty unless the status is `ok`."""

    def table(self) -> pa.Table:
        """Return the table `zero_shot`."""
        return pa.Table.from_pylist(self.rows, schema=schemas.ZERO_SHOT)

    def summary(self) -> dict[str, Any]:
        """Return the numbers for the evaluation's summary; None where nothing was measured."""
        of = {row["spliced"]: row for row in self.rows}
        plain, sae = of.get("plain", {}), of.get("sae", {})
        return {
            "zero_shot": self.status,
            "zero_shot_accuracy": plain.get("accuracy"),
            "zero_shot_accuracy_sae": sae.get("accuracy"),
            "zero_shot_recovered": sae.get("recovered"),
            "zero_shot_recovered_untrained": of.get("untrained", {}).get("recovered"),
        }


def measure_zero_shot(name: str, dictionaries: Mapping[str, Dictionary], inputs: Mapping[str, Artefact], on_event: Listener) -> ZeroShot:
    """Classify some evaluation images by the texts of their classes, with and without each dictionary's x̂ in the place of x.

    Args:
        name: Name of the SAE.
        dictionaries: The SAE (`sae`) and other dictionaries, by name; beside a transcoder, only those that decode its target.
        inputs: `images`, the activations (`extract`) and, for a transcoder, the activations that it decodes (`target`).
        on_event: Called with each progress event and warning.

    Returns:
        The result. It has no rows if the images have fewer than two classes, or if the model has no text tower, can no longer be
        loaded, or cannot continue from replaced tokens at the hookpoint.
    """
    try:
        return ZeroShot("ok", _measure(name, dictionaries, inputs, on_event))
    except (_Undefined, ModelError) as error:
        on_event(Warned(f"{name}: no zero-shot check: {error}"))
        return ZeroShot(str(error), [])


def _measure(name: str, dictionaries: Mapping[str, Dictionary], inputs: Mapping[str, Artefact], on_event: Listener) -> list[dict[str, Any]]:
    labels = load_labels(inputs["images"])
    classes = sorted(set(labels.values()))
    if len(classes) < 2:
        reason = f"all labels are {classes[0]!r}" if classes else "they have no labels"
        raise _Undefined(f"the evaluation images are not of several classes: {reason}")
    splicer = _load_splicer(dictionaries, inputs)
    classifier = make_classifier(splicer.model, inputs["images"], classes)
    drawn = draw_images(inputs["images"], labels, N_IMAGES)
    cosines: dict[str, list[Tensor]] = {}
    done = 0
    for batch in iter_drawn_pixels(inputs["images"], drawn, splicer.model.preprocess, splicer.device):
        for variant, embeddings in splicer.run(batch.of[0]).items():
            cosines.setdefault(variant, []).append(classifier.cosines(embeddings))
        on_event(Progress("zero-shot images", done := done + len(batch.numbers), len(drawn.numbers)))
    truth = classifier.indices([labels[number] for number in drawn.numbers.tolist()])
    together = {variant: torch.cat(batches) for variant, batches in cosines.items()}
    of = {variant: classify(found, truth, classifier.scale) for variant, found in together.items()}
    kl = {variant: downstream_kl(together["plain"], found, classifier.scale) for variant, found in together.items()}
    constant = {
        "sae": name,
        "n_images": len(drawn.numbers),
        "n_classes": len(classes),
        "n_replaced": len(splicer.writes.places),
        "n_tokens": splicer.writes.hookpoint.n_tokens,
        "logit_scale": classifier.scale,
    }
    return [{**constant, "spliced": name, "downstream_kl": kl[name], **_numbers(classified, of)} for name, classified in of.items()]


def _numbers(classified: Classified, of: Mapping[str, Classified]) -> dict[str, float | None]:
    shares = {
        "accuracy": classified.accuracy,
        "downstream_loss": downstream_loss(of["plain"], classified),
        "recovered": recovered(of["plain"], classified, of["mean"]),
    }
    intervals = {key: value for name, share in shares.items() for key, value in _columns(name, share).items()}
    return {"cross_entropy": classified.cross_entropy, **intervals}


def _columns(name: str, share: Interval) -> dict[str, float | None]:
    return none_for_nan({name: share.value, f"{name}_low": share.low, f"{name}_high": share.high})


@dataclass(frozen=True)
class _Splicer:
    """The model, and the dictionaries whose reconstructions replace its tokens at a hookpoint."""

    model: VisionModel
    """The explained model."""
    device: str
    """Device on which the model runs; the dictionaries are on the CPU."""
    dictionaries: Mapping[str, Dictionary]
    """Dictionaries by name."""
    reads: TokenPicker
    """Tokens that are encoded."""
    writes: TokenPicker
    """Tokens that are decoded and replaced: those that are encoded, except for a transcoder."""
    mean_d: Float32[Tensor, " d_out"]
    """Mean of the tokens that are decoded, over the training split, (d,)."""

    def run(self, pixels: UInt8[Tensor, "batch height width 3"]) -> dict[str, Float32[Tensor, "batch d_embed"]]:
        """Return the embeddings (b, d_embed) of images (b, H, W, 3) by variant."""
        pixels = pixels.to(self.device)
        x_bkd = self._read(pixels) if self.reads != self.writes else None
        replacements = _Reconstructions(self, x_bkd).replacements()
        return dict(zip(replacements, self.model.splice(pixels, self.writes.name, list(replacements.values())), strict=True))

    def _read(self, pixels: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch kept d_model"]:
        return self.reads.pick(self.model.capture(pixels, [self.reads.name]).tokens[self.reads.name])


@dataclass(frozen=True)
class _Reconstructions:
    """Reconstructions of one batch of images, and the functions that put them in the place of tokens."""

    splicer: _Splicer
    x_bkd: Float[Tensor, "batch kept d_model"] | None
    """Tokens that are encoded; None if they are those that are replaced."""
    decoded: dict[str, Tensor] = field(default_factory=dict)
    """Reconstructions that have been computed so far, by dictionary."""

    def replacements(self) -> dict[str, Replacement]:
        """Return the function of each variant that replaces tokens (b, t, d)."""
        makers: dict[str, Callable[[Tensor], Tensor]] = {
            "sae": lambda y: self._decode("sae", y),
            "sae_with_error": lambda y: self._decode("sae", y) + (y - self._decode("sae", y)),
            "mean": lambda y: self.splicer.mean_d.expand_as(y),
        }
        makers |= {name: lambda y, name=name: self._decode(name, y) for name in self.splicer.dictionaries if name != "sae"}
        return {"plain": lambda tokens: tokens, **{variant: self._put(make) for variant, make in makers.items()}}

    def _put(self, make: Callable[[Tensor], Tensor]) -> Replacement:
        """Return a function that replaces the extracted tokens by what `make` computes from them, in float32 on the CPU."""
        writes = self.splicer.writes
        return lambda tokens: writes.put(tokens, make(writes.pick(tokens).float().cpu()))

    def _decode(self, name: str, y_bkd: Float32[Tensor, "batch kept d_out"]) -> Float[Tensor, "batch kept d_out"]:
        if name not in self.decoded:
            x = y_bkd if self.x_bkd is None else self.x_bkd.float().cpu()
            self.decoded[name] = torch.cat(list(_iter_decoded(self.splicer.dictionaries[name], x.flatten(0, 1)))).reshape(y_bkd.shape)
        return self.decoded[name]


def _iter_decoded(dictionary: Dictionary, x_td: Float32[Tensor, "tokens d_model"]) -> Iterator[Tensor]:
    for rows in x_td.split(max(1, ENTRIES // dictionary.n_latents)):
        yield dictionary.decode(dictionary.encode(rows))


def _load_splicer(dictionaries: Mapping[str, Dictionary], inputs: Mapping[str, Artefact]) -> _Splicer:
    activations = inputs["extract"]
    target = inputs.get("target", activations)
    if "model" not in activations.manifest.params:
        raise _Undefined("the activations were imported from files, and the model that they come from is not available")
    model = load_explained(activations.manifest.params)
    if model.d_embed is None:
        raise _Undefined(f"{model.name} has no text tower with which to embed the names of classes")
    reads, writes = (load_picker(model, artefact) for artefact in (activations, target))
    return _Splicer(model, find_device(), dictionaries, reads, writes, load_sample(target, N_MEAN).mean(0))
