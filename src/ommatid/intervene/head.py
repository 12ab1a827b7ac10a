"""Linear heads, by which classes are read from a model without a text tower: fitted to labelled images, or given in a file."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ommatid.errors import ConfigError, ModelError
from ommatid.extract.drawn import draw_images, iter_drawn_pixels
from ommatid.images.labels import load_labels
from ommatid.intervene.readout import Readout
from ommatid.metrics import fit_probes, wilson
from ommatid.store import Artefact
from ommatid.vlm import VisionModel

N_FITTED = 1000
"""Number of training images to which a head is fitted, or `PER_CLASS` for each class if those are more."""
PER_CLASS = 20
"""Least number of training images for each class, if there are as many."""
HELD_OUT = 5
"""One in so many of these images tests the head instead."""


def fit_head(model: VisionModel, images: Artefact, hookpoint: str, device: str) -> Readout:
    """Fit a logistic regression for each class against all others to the model's output on training images.

    Each class has half of the weight in its regression, so that a logit of 0 is the best threshold however rare the class is.

    Args:
        model: The model.
        images: The images artefact, whose labels are the classes.
        hookpoint: A hookpoint of the model.
        device: Device of the model.

    Returns:
        The head.

    Raises:
        ModelError: The training images have fewer than two classes; or the head tells held-out images apart no better than chance.
    """
    labels = load_labels(images, "train")
    n = max(N_FITTED, PER_CLASS * len(set(labels.values())))
    drawn = draw_images(images, labels, n)
    truth = [labels[number] for number in drawn.numbers.tolist()]
    is_held = torch.arange(len(truth)) % HELD_OUT == HELD_OUT - 1
    names = sorted({name for name, held in zip(truth, is_held.tolist(), strict=True) if not held})
    if len(names) < 2:
        raise ModelError(
            f"{model.name} has no text tower, and a linear head in its place needs training images with labels of two or more classes; "
            f"there are {len(names)}: label images, or set intervene.head to a file"
        )
    outputs = torch.cat(
        [
            model.splice(batch.of[0].to(device), hookpoint, [lambda tokens: tokens])[0].float().cpu()
            for batch in iter_drawn_pixels(images, drawn, model.preprocess, device)
        ]
    )
    y = torch.tensor([[name == one for one in names] for name in truth])
    probes = fit_probes(outputs[~is_held], y[~is_held])
    weights = probes.weights_cd / probes.std
    head = Readout(tuple(names), weights, 1.0, probes.bias_c - weights @ probes.mean)
    y_held = y[is_held]
    right = float((head.scores(outputs[is_held]).argmax(1) == y_held.int().argmax(1)).double().mean()) if len(y_held) else 0.0
    chance = float(y_held.double().mean(0).max()) if len(y_held) else 1.0
    if wilson(right, len(y_held)).low <= chance or not len(y_held):
        raise ModelError(
            f"{model.name} has no text tower, and a linear head fitted to {len(truth) - len(y_held)} training images names the class of "
            f"{right:.0%} of {len(y_held)} others, where {chance:.0%} is chance: add labelled images, or set intervene.head to a file"
        )
    return head


def load_head(path: str, model: VisionModel) -> Readout:
    """Load a linear head from a safetensors file with `weight` (classes, d_output), `bias` (classes,) and, as metadata, `names`.

    Args:
        path: The file; its metadata `names` is a JSON list of the names of the classes.
        model: The model, whose output the head reads.

    Returns:
        The head.

    Raises:
        ConfigError: The file cannot be read, lacks something, or is of another model.
    """
    key = f"intervene.head: {path}"
    if not Path(path).expanduser().is_file():
        raise ConfigError(f"{key}: no such file; name a safetensors file with weight, bias and names")
    try:
        with safe_open(Path(path).expanduser(), framework="pt") as file:
            missing = sorted({"weight", "bias"} - set(file.keys()))
            if missing:
                raise ConfigError(f"{key}: has no tensor {missing[0]!r}; it needs weight (classes, {model.d_output}) and bias (classes,)")
            weight, bias, names = file.get_tensor("weight"), file.get_tensor("bias"), (file.metadata() or {}).get("names")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{key}: is not a safetensors file: {error}") from error
    if weight.ndim != 2 or weight.shape[1] != model.d_output:
        raise ConfigError(f"{key}: weight is {tuple(weight.shape)}, but {model.name} needs (classes, {model.d_output})")
    if bias.shape != weight.shape[:1]:
        raise ConfigError(f"{key}: bias is {tuple(bias.shape)}, but weight has {len(weight)} classes; it needs ({len(weight)},)")
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ConfigError(f"{key}: weight or bias has numbers that are not finite")
    return Readout(_check_names(key, names, len(weight)), weight.double(), 1.0, bias.double())


def _check_names(key: str, text: str | None, n: int) -> tuple[str, ...]:
    try:
        names = json.loads(text or "null")
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{key}: its metadata has no `names`, a JSON list of the names of the classes; got {text!r:.80}")
    if len(names) != n or len(set(names)) < n or n < 2:
        raise ConfigError(
            f"{key}: names lists {len(names)} classes, and weight has {n}; it needs one name for each, two or more and all different"
        )
    return tuple(names)
