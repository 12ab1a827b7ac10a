"""Zero-shot classifiers, which compare embeddings of images with those of the texts of classes.

Suffixes: b images of a batch, n images in all, c classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from ommatid.errors import ModelError
from ommatid.extract.drawn import draw_images, iter_drawn_pixels
from ommatid.extract.networks import find_device
from ommatid.images.labels import load_labels
from ommatid.metrics import fit_scale, unit
from ommatid.store import Artefact
from ommatid.vlm import VisionModel

N_FITTED = 500
"""Maximum number of training images on which the scale of cosines, a single number, is fitted if the model has none of its own."""


@dataclass(frozen=True)
class Classifier:
    """Zero-shot classifier, which compares embeddings of images with those of the classes' texts."""

    classes: Sequence[str]
    """Names of the classes, (c,)."""
    texts: Float64[Tensor, "classes d_embed"]
    """Text embedding of each class, (c, d_embed) float64, unit norm."""
    scale: float = 1.0
    """Factor by which cosines are multiplied before the softmax."""

    def cosines(self, embeddings: Float32[Tensor, "batch d_embed"]) -> Float64[Tensor, "batch classes"]:
        """Return the cosines of images (b, d_embed) and classes, (b, c) float64."""
        return unit(embeddings.cpu()) @ self.texts.T

    def indices(self, labels: Sequence[str]) -> Int64[Tensor, " images"]:
        """Return the index of each label in `classes`, (n,) int64."""
        place = {label: index for index, label in enumerate(self.classes)}
        return torch.tensor([place[label] for label in labels])


def embed_texts(model: VisionModel, texts: Sequence[str]) -> Float64[Tensor, "texts d_embed"]:
    """Return the mean over the model's templates of each text's embedding at unit norm, `(texts, d_embed)` float64."""
    by_template = [unit(model.embed_text([template.format(text) for text in texts]).cpu()) for template in model.text_templates]
    return torch.stack(by_template).mean(0)


def make_classifier(model: VisionModel, images: Artefact, classes: Sequence[str], scale: float | None = None) -> Classifier:
    """Make a classifier from the mean text embedding of each class over the model's templates.

    Labels are often names of folders, so their underscores are read as spaces.

    Args:
        model: The model.
        images: The images artefact, to whose training images a scale is fitted if the model has none.
        classes: Names of the classes.
        scale: The scale, if it was fitted before; None takes the model's own, or fits one.

    Raises:
        ModelError: The model has no scale of its own, and no training image has a label by which one could be fitted.
    """
    classifier = Classifier(classes, unit(embed_texts(model, [name.replace("_", " ") for name in classes])))
    return Classifier(classes, classifier.texts, scale or model.logit_scale or _fit_scale(model, images, classifier))


def _fit_scale(model: VisionModel, images: Artefact, classifier: Classifier) -> float:
    """Return the scale that fits the plain model best on training images; the images that are measured are not among them."""
    known = set(classifier.classes)
    labels = {image: label for image, label in load_labels(images, "train").items() if label in known}
    drawn = draw_images(images, labels, N_FITTED)
    if not len(drawn.numbers):
        raise ModelError(
            "no training image has a label; a model without a scale of its own needs labelled training images to scale cosines by"
        )
    device = find_device()
    found = [model.capture(batch.of[0].to(device), ()).embedding for batch in iter_drawn_pixels(images, drawn, model.preprocess, device)]
    cosines = torch.cat([classifier.cosines(embedding) for embedding in found if embedding is not None])
    return fit_scale(cosines, classifier.indices([labels[number] for number in drawn.numbers.tolist()]))
