"""What the model's output does while latents of one SAE are set to chosen activations, beside controls.

For each latent an image passes once through the part of the model before the hookpoint, and through the rest once for each dose and arm.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from ommatid.config import InterveneParams
from ommatid.config.intervene import BestLatents, FiringLatents, ListedLatents
from ommatid.errors import InputError, ModelError
from ommatid.events import Listener, Progress
from ommatid.intervene.attribution import Attributor
from ommatid.intervene.latent_test import LatentTest
from ommatid.intervene.study import Study
from ommatid.intervene.subject import Described, Subject
from ommatid.metrics import ablation_sparsity, unit
from ommatid.schemas import N_ATTRIBUTED
from ommatid.store import Artefact

LEAST_FIRING = 8
"""Number of sampled tokens on which a latent must fire for its scale to be known."""
N_EXACT = 8
"""Number of latents to which a class is attributed exactly as well."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one SAE. Rows have the columns of their tables, except `sae`."""

    interventions: list[dict[str, Any]]
    """Rows of the table `interventions`."""
    effects: list[dict[str, Any]]
    """Rows of the table `effects`, of the latents that were chosen."""
    attributions: list[dict[str, Any]]
    """Rows of the table `attributions`."""
    zero_dose: float | None
    """Largest change of an output by an edit that moves nothing; anything but 0 is a fault of the edit. None if no edit was made."""
    random_causal: float | None
    """Share of random latents, one matched to each tested latent, that the same rule calls causal; None if there are none."""


def measure(params: InterveneParams, inputs: Mapping[str, Artefact], on_event: Listener) -> Measured | str:
    """Run the model again with latents of one SAE set to chosen activations.

    Args:
        params: The section `intervene`.
        inputs: `images`, the activations (`extract`), the SAE (`train`), its evaluation (`evaluate`), its labels (`label`) and, for a
            transcoder, the activations that it decodes (`target`).
        on_event: Called with each progress event.

    Returns:
        What was measured; or, if nothing can be measured, the reason.
    """
    try:
        return _measure(Study(params, Subject(inputs)), on_event)
    except (ModelError, InputError) as error:
        return str(error)


def _measure(study: Study, on_event: Listener) -> Measured:
    subject = study.subject
    if subject.model.d_embed is None:
        raise ModelError(f"{subject.model.name} has no text tower with which to embed the labels that an edit should move images toward")
    chosen = choose_latents(study)
    study.chosen = [one.latent for one in chosen]
    if not chosen:
        raise InputError("no chosen latent has a label and fires often enough to be edited; choose others with intervene.latents")
    tests: list[LatentTest] = []
    untested: list[dict[str, Any]] = []
    for one in chosen:
        try:
            tests.append(LatentTest(study, one))
        except InputError as error:  # about this latent alone, such as too few others to compare it with
            untested.append({"latent": one.latent, "status": "untested", "reason": str(error)})
    if not tests:
        raise InputError(untested[0]["reason"])
    plain: list[Tensor] = []
    n = len(study.images)
    for done, pixels in _iter_pixels(study):
        read = subject.model.capture(pixels, [subject.reads.name]).tokens[subject.reads.name]
        for place, test in enumerate(tests, start=1):
            outputs = test.run(pixels, read)
            on_event(Progress("edit images", done - len(pixels) * (len(tests) - place) // len(tests), n))
        plain.append(outputs)
    spread = _spread_of(torch.cat(plain))
    found = [test.finish(spread) for test in tests]
    statuses = [one.random_status for one in found]
    return Measured(
        interventions=[row for one in found for row in one.interventions],
        effects=[*(one.effect for one in found), *untested],
        attributions=_attribute(study, on_event),
        zero_dose=max(one.zero_dose for one in found),
        random_causal=sum(status == "causal" for status in statuses) / len(statuses),
    )


def choose_latents(study: Study) -> list[Described]:
    """Choose the latents that are tested, the best first; those that cannot be edited are left out."""
    latents, labels = study.subject.latents, study.subject.labels
    able = [latent for latent, row in latents.items() if row["n_images"] and latent in labels]
    most = len(able)
    match study.params.latents:
        case ListedLatents(latents=listed):
            ranked = [latent for latent in listed if latent in set(able)]
        case FiringLatents(min_images=least):
            ranked = [latent for latent in able if latents[latent]["n_images"] >= least]
        case BestLatents(by=by, n=most):
            value = {latent: latents[latent]["ms"] if by == "ms" else labels[latent]["score"] for latent in able}
            ranked = sorted((latent for latent in able if value[latent] is not None), key=lambda latent: (-value[latent], latent))
    chosen: list[Described] = []
    for one in study.subject.describe(ranked):
        if len(chosen) == most:
            break
        if one.n_firing >= LEAST_FIRING:
            chosen.append(one)
    return chosen


def _attribute(study: Study, on_event: Listener) -> list[dict[str, Any]]:
    """Attribute the log-odds of the most common classes to all latents by gradients, and exactly to the first few of each class."""
    subject, names, n = study.subject, study.common, len(study.images)
    if not study.readout:
        return []
    scores = {name: study.readout.log_odds(name) for name in names}
    attributor = Attributor(subject.model, subject.device_sae, subject.reads, subject.writes)
    n_latents = subject.sae.n_latents
    cheap = {name: torch.zeros(n_latents, dtype=torch.float64) for name in names}
    for done, pixels in _iter_pixels(study):
        code = attributor.encode(pixels)
        for name, score in scores.items():
            cheap[name] += attributor.cheap(pixels, score, code).by_image.sum(0).double().cpu() / n
        on_event(Progress("attribute classes", done, n))
    ranked = {name: effects.abs().topk(min(N_ATTRIBUTED, len(effects))).indices.tolist() for name, effects in cheap.items()}
    exact = {name: torch.zeros(min(N_EXACT, n_latents), dtype=torch.float64) for name in names}
    for _, pixels in _iter_pixels(study):
        code = attributor.encode(pixels)
        for name, score in scores.items():
            exact[name] += attributor.exact(pixels, score, ranked[name][:N_EXACT], code).sum(0).double().cpu() / n
    return [
        {
            "output": name, "rank": rank, "latent": latent, "effect": float(cheap[name][latent]),
            "exact": float(exact[name][rank - 1]) if rank <= N_EXACT else None,
            "sparsity": ablation_sparsity(cheap[name]), "n_images": n,
        }
        for name in names
        for rank, latent in enumerate(ranked[name], start=1)
        if cheap[name][latent]
    ]  # fmt: skip


def _iter_pixels(study: Study) -> Iterator[tuple[int, UInt8[Tensor, "batch height width 3"]]]:
    """Iterate over batches of the study's images: the number of images so far, and the pixels."""
    done = 0
    for numbers, pixels in study.subject.load_pixels(study.images):
        done += len(numbers)
        yield done, pixels


def _spread_of(outputs_nd: Float32[Tensor, "images d"]) -> float:
    """Mean of 1 − cosine of the outputs of two different images."""
    n, mean = len(outputs_nd), unit(outputs_nd).mean(0)
    return float((1 - mean @ mean) * n / (n - 1))
