"""The `zero_shot` table: how well the model still tells classes apart when it goes on from x̂ at the hookpoint in the place of x.

Every variant is of the same images and the same live activations, in the arithmetic of extraction:
plain: nothing is replaced.
sae: x̂, what the SAE makes of x.
sae_with_error: x̂ + (x − x̂): equal to plain, or splicing itself changes something.
mean: the mean of the training tokens, one vector for every token.
untrained, and the baselines that are asked for: their x̂.

Suffixes: b images, t tokens, k tokens that were extracted, d d_model, n images in all, c classes.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ommatid import schemas
from ommatid.activations.batches import load_sample
from ommatid.compute.nulls import none_for_nan
from ommatid.errors import ModelError
from ommatid.evaluate.batches import ENTRIES, load_labels
from ommatid.events import Listener, Progress, Warned
from ommatid.extract.plan import blocks_of
from ommatid.extract.tokens import TokenPicker
from ommatid.extract.towers import find_device, load_explained
from ommatid.images.loader import Encoded, Pixels, iter_pixels, make_pool
from ommatid.metrics import Classified, Interval, classify, fit_scale, recovered, unit
from ommatid.sae.baselines import Dictionary
from ommatid.store import Artefact
from ommatid.vlm import Replacement, VisionModel, check_hookpoint
from ommatid.vlm.preprocess import Preprocess

BATCH = 64
"""Images a forward pass."""
N_BLOCKS = 256
"""Row groups of the images artefact that are read, at most: of a million images not all for a thousand of them."""


@dataclass(frozen=True)
class Drawn:
    """Images to read, as they lie in the images artefact."""

    numbers: np.ndarray
    """images.image, (images,)."""
    rows: np.ndarray
    """Their places in the table, ascending, (images,) int64."""


def draw_images(images: Artefact, among: Collection[int], n: int) -> Drawn:
    """At most n of these images, spread evenly over the set, from at most N_BLOCKS row groups."""
    numbers = images.read("images", ["image"])["image"].to_numpy()
    rows = np.flatnonzero(np.isin(numbers, np.fromiter(among, np.int64, len(among))))
    block = np.searchsorted(blocks_of(images)[:, 2].cumsum(), rows, side="right")
    held = np.unique(block)
    rows = rows[np.isin(block, held[_spread(len(held), N_BLOCKS)])]
    rows = rows[_spread(len(rows), n)]
    return Drawn(numbers[rows], rows)


def iter_drawn(images: Artefact, drawn: Drawn, preprocess: Preprocess, device: str) -> Iterator[Pixels]:
    """The pixels of images that were drawn, in order, BATCH at a time.

    Raises:
        ArtefactError: the images artefact is damaged.
    """
    files = _iter_files(images, drawn.rows)
    starts = range(0, len(drawn.numbers), BATCH)
    batches = (_encoded(drawn.numbers[start : start + BATCH], files) for start in starts)
    with make_pool(device) as pool:
        yield from iter_pixels(batches, (preprocess,), pool, device)


def _encoded(numbers: np.ndarray, files: Iterator[bytes]) -> Encoded:
    return Encoded(numbers, np.zeros(len(numbers), dtype=bool), list(islice(files, len(numbers))))


def _spread(n: int, at_most: int) -> np.ndarray:
    """At most so many of n indices, evenly."""
    return np.linspace(0, n - 1, min(n, at_most)).round().astype(np.int64)


def _iter_files(images: Artefact, rows: np.ndarray) -> Iterator[bytes]:
    parts, start = images.parts("images"), 0
    for file, row_group, n in blocks_of(images).tolist():
        places = rows[(rows >= start) & (rows < start + n)] - start
        if len(places):
            with images.open_part(parts[file]) as part:
                yield from part.read_row_group(row_group, ["encoded"])["encoded"].take(places).to_pylist()
        start += n


N_IMAGES = 1000
"""Evaluation images, at most: accuracy is then known to three points, and what is recovered, a ratio of paired numbers, closer."""
N_FITTED = 500
"""Training images on which the scale of cosines is fitted, at most, where the model has none of its own: it is one number."""
N_MEAN = 2**14
"""Training tokens that the mean is of, at most."""


class _Undefined(Exception):
    """There is nothing to measure; says why."""


@dataclass(frozen=True)
class ZeroShot:
    """What came of it."""

    status: str
    """ok, or why nothing was measured."""
    rows: list[dict[str, Any]]
    """Of `schemas.ZERO_SHOT`; none where the status is not ok."""

    def table(self) -> pa.Table:
        """The `zero_shot` table."""
        return pa.Table.from_pylist(self.rows, schema=schemas.ZERO_SHOT)

    def summary(self) -> dict[str, Any]:
        """The headline numbers; null where there are none."""
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
    """Classify some evaluation images by the texts of their classes, with each dictionary's x̂ in the place of x, and without.

    Args:
        name: Of the SAE.
        dictionaries: `sae`, and what stands beside it; of a transcoder, only such as decode the target.
        inputs: `images`, the activations (`extract`) and, of a transcoder, what it decodes (`target`).
        on_event: Hears of the images, and why there is nothing to measure.

    Returns:
        No rows where there are no two classes, or the model has no text tower, cannot be loaded any more, or cannot go on from other
        tokens at the hookpoint.
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
        found = f"all labels are {classes[0]!r}" if classes else "they have no labels"
        raise _Undefined(f"the evaluation images are not of several classes: {found}")
    splicer = _load_splicer(dictionaries, inputs)
    classifier = _make_classifier(splicer.model, inputs["images"], classes)
    drawn = draw_images(inputs["images"], labels, N_IMAGES)
    cosines: dict[str, list[Tensor]] = {}
    done = 0
    for batch in iter_drawn(inputs["images"], drawn, splicer.model.preprocess, splicer.device):
        for variant, embeddings in splicer.run(batch.of[0]).items():
            cosines.setdefault(variant, []).append(classifier.cosines(embeddings))
        on_event(Progress("zero-shot images", done := done + len(batch.numbers), len(drawn.numbers)))
    own = classifier.indices([labels[number] for number in drawn.numbers.tolist()])
    of = {variant: classify(torch.cat(found), own, classifier.scale) for variant, found in cosines.items()}
    constant = {
        "sae": name,
        "n_images": len(drawn.numbers),
        "n_classes": len(classes),
        "n_replaced": len(splicer.writes.places),
        "n_tokens": splicer.writes.hookpoint.n_tokens,
        "logit_scale": classifier.scale,
    }
    return [{**constant, "spliced": variant, **_numbers(classified, of)} for variant, classified in of.items()]


def _numbers(classified: Classified, of: Mapping[str, Classified]) -> dict[str, float | None]:
    shares = {"accuracy": classified.accuracy, "recovered": recovered(of["plain"], classified, of["mean"])}
    intervals = {key: value for name, share in shares.items() for key, value in _columns(name, share).items()}
    return {"cross_entropy": classified.cross_entropy, **intervals}


def _columns(name: str, share: Interval) -> dict[str, float | None]:
    return none_for_nan({name: share.value, f"{name}_low": share.low, f"{name}_high": share.high})


@dataclass(frozen=True)
class _Classifier:
    """Classes by the cosines of their texts."""

    classes: Sequence[str]
    texts: Tensor
    """(c, d_embed) float64 of unit norm."""
    scale: float = 1.0
    """Of cosines before the softmax."""

    def cosines(self, embeddings: Tensor) -> Tensor:
        """Of images (b, d_embed) and the classes, (b, c) float64."""
        return unit(embeddings.cpu()) @ self.texts.T

    def indices(self, labels: Sequence[str]) -> Tensor:
        """Of classes, (n,) int64."""
        place = {label: index for index, label in enumerate(self.classes)}
        return torch.tensor([place[label] for label in labels])


def _make_classifier(model: VisionModel, images: Artefact, classes: Sequence[str]) -> _Classifier:
    """By the mean over the model's templates; underscores of folder names are spaces to it."""
    names = [name.replace("_", " ") for name in classes]
    by_template = [unit(model.embed_text([template.format(name) for name in names]).cpu()) for template in model.text_templates]
    classifier = _Classifier(classes, unit(torch.stack(by_template).mean(0)))
    return _Classifier(classes, classifier.texts, model.logit_scale or _fit_scale(model, images, classifier))


def _fit_scale(model: VisionModel, images: Artefact, classifier: _Classifier) -> float:
    """The scale that suits the plain model best on training images, of which none is measured."""
    known = set(classifier.classes)
    labels = {image: label for image, label in load_labels(images, "train").items() if label in known}
    drawn = draw_images(images, labels, N_FITTED)
    if not len(drawn.numbers):
        raise _Undefined("no training image has a label, and cosines of a model without a scale of its own need some to be scaled by")
    device = find_device()
    found = [model.capture(batch.of[0].to(device), ()).embedding for batch in iter_drawn(images, drawn, model.preprocess, device)]
    cosines = torch.cat([classifier.cosines(embedding) for embedding in found if embedding is not None])
    return fit_scale(cosines, classifier.indices([labels[number] for number in drawn.numbers.tolist()]))


@dataclass(frozen=True)
class _Splicer:
    """The model, and what takes the place of the tokens at a hookpoint."""

    model: VisionModel
    device: str
    dictionaries: Mapping[str, Dictionary]
    reads: TokenPicker
    """What is encoded."""
    writes: TokenPicker
    """What is decoded: the same, but of a transcoder."""
    mean_d: Tensor
    """Of what is decoded, on the training split."""

    def run(self, pixels: Tensor) -> dict[str, Tensor]:
        """Embeddings (b, d_embed) of images (b, H, W, 3) by variant."""
        pixels = pixels.to(self.device)
        tokens = self._read(pixels) if self.reads != self.writes else None
        replacements = _Tokens(self, tokens).replacements()
        return dict(zip(replacements, self.model.splice(pixels, self.writes.name, list(replacements.values())), strict=True))

    def _read(self, pixels: Tensor) -> Tensor:
        return self.reads.pick(self.model.capture(pixels, [self.reads.name]).tokens[self.reads.name])


@dataclass(frozen=True)
class _Tokens:
    """Those of one batch: what x̂ is made of and put in place of."""

    splicer: _Splicer
    x_bkd: Tensor | None
    """What is encoded; None: what is replaced."""
    decoded: dict[str, Tensor] = field(default_factory=dict)
    """x̂ by dictionary, where it was needed before."""

    def replacements(self) -> dict[str, Replacement]:
        """By variant, each of whole tokens (b, t, d)."""
        made: dict[str, Callable[[Tensor], Tensor]] = {
            "sae": lambda y: self._decode("sae", y),
            "sae_with_error": lambda y: self._decode("sae", y) + (y - self._decode("sae", y)),
            "mean": lambda y: self.splicer.mean_d.expand_as(y),
        }
        others = [name for name in self.splicer.dictionaries if name != "sae"]
        made |= {name: lambda y, name=name: self._decode(name, y) for name in others}
        return {"plain": lambda tokens: tokens, **{variant: self._put(make) for variant, make in made.items()}}

    def _put(self, make: Callable[[Tensor], Tensor]) -> Replacement:
        """Replace the kept tokens by what is made of them in float32 on the CPU, where the dictionaries are."""
        writes = self.splicer.writes
        return lambda tokens: writes.put(tokens, make(writes.pick(tokens).float().cpu()))

    def _decode(self, name: str, y_bkd: Tensor) -> Tensor:
        if name not in self.decoded:
            x = y_bkd if self.x_bkd is None else self.x_bkd.float().cpu()
            self.decoded[name] = torch.cat(list(_iter_decoded(self.splicer.dictionaries[name], x.flatten(0, 1)))).reshape(y_bkd.shape)
        return self.decoded[name]


def _iter_decoded(dictionary: Dictionary, x_td: Tensor) -> Iterator[Tensor]:
    for rows in x_td.split(max(1, ENTRIES // dictionary.n_latents)):
        yield dictionary.decode(dictionary.encode(rows))


def _load_splicer(dictionaries: Mapping[str, Dictionary], inputs: Mapping[str, Artefact]) -> _Splicer:
    activations = inputs["extract"]
    target = inputs.get("target", activations)
    if "model" not in activations.manifest.params:
        raise _Undefined("the activations come from files, and the model that gave them is not here")
    model = load_explained(activations.manifest.params)
    if model.d_embed is None:
        raise _Undefined(f"{model.name} has no text tower, and so no classes to tell apart by their texts")
    reads, writes = (_make_picker(model, artefact) for artefact in (activations, target))
    return _Splicer(model, find_device(), dictionaries, reads, writes, load_sample(target, N_MEAN).mean(0))


def _make_picker(model: VisionModel, activations: Artefact) -> TokenPicker:
    name = activations.summary["hookpoint"]
    return TokenPicker(name, check_hookpoint(model, name), activations.manifest.params["tokens"])
