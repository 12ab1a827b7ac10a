"""What the model's output does while latents of one SAE are set to chosen activations, beside controls.

For each latent an image passes once through the part of the model before the hookpoint, and through the rest once for each dose and arm.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ommatid.config import InterveneParams
from ommatid.config.intervene import BestLatents, FiringLatents, ListedLatents
from ommatid.errors import InputError, ModelError
from ommatid.events import Listener, Progress
from ommatid.intervene.attribution import Attributor
from ommatid.intervene.latent_test import Found, LatentTest
from ommatid.intervene.study import Study
from ommatid.intervene.subject import Described, Subject
from ommatid.metrics import ablation_sparsity, unit
from ommatid.schemas import N_ATTRIBUTED
from ommatid.store import Artefact

LEAST_FIRING = 8
"""Number of sampled tokens on which a latent must fire for its scale to be known."""
KEPT = 2**28
"""Bytes of results that are kept of images at a time: 256 MiB."""
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
        return _measure(Study(params, Subject(inputs, head=params.head)), on_event)
    except (ModelError, InputError) as error:
        return str(error)


def _measure(study: Study, on_event: Listener) -> Measured:
    chosen, untested = choose_latents(study, study.has_movement)
    found: list[Found] = []
    for some in _passes(study, chosen):
        tests: list[LatentTest] = []
        for one in some:
            try:
                tests.append(LatentTest(study, one))
            except InputError as error:  # about this latent alone, such as too few others to compare it with
                untested.append(untested_row(one.latent, str(error)))
        found += _run(study, tests, len(found) + len(untested), len(chosen), on_event)
    if not found:
        raise InputError(untested[0]["reason"] if untested else "no latent can be edited; choose others with intervene.latents")
    judged = [one.random_status for one in found if one.random_status != "untested"]
    return Measured(
        interventions=[row for one in found for row in one.interventions],
        effects=[*(one.effect for one in found), *untested],
        attributions=_attribute(study, on_event),
        zero_dose=max(one.zero_dose for one in found),
        random_causal=judged.count("causal") / len(judged) if judged else None,
    )


def _passes(study: Study, chosen: Sequence[Described]) -> Iterator[Sequence[Described]]:
    """Divide latents among passes over the images, so that what is kept of each image does not fill the memory."""
    n_doses = len(study.params.doses)
    per_image = LatentTest.BYTES * (1 + n_doses * (3 + 2 * study.params.draws)) + LatentTest.RIVAL_BYTES * n_doses
    n = max(1, KEPT // (per_image * len(study.images)))
    return (chosen[start : start + n] for start in range(0, len(chosen), n))


def _run(study: Study, tests: Sequence[LatentTest], n_before: int, n_all: int, on_event: Listener) -> list[Found]:
    """Test some latents in one pass over the images."""
    subject, n = study.subject, len(study.images)
    total = torch.zeros(subject.model.d_output, dtype=torch.float64)
    for done, pixels in study.iter_pixels() if tests else ():
        read = subject.model.capture(pixels, [subject.reads.name]).tokens[subject.reads.name]
        for place, test in enumerate(tests, start=1):
            plain = test.run(pixels, read)
            of_tests = n * n_before + done * len(tests) - len(pixels) * (len(tests) - place)
            on_event(Progress("edit images", of_tests // n_all, n))
        total = total + unit(plain).sum(0)
    return [test.finish(_spread_of(total, n)) for test in tests]


def choose_latents(study: Study, has_aim: Callable[[int], bool]) -> tuple[list[Described], list[dict[str, Any]]]:
    """Choose the latents that are tested, the best first.

    Those that fire too rarely to be edited are left out, and so are those of which it is not known toward what an edit should move the
    output, unless they are listed or that is known of none: outcomes that need no label are still measured.

    Args:
        study: The study, whose chosen latents are set.
        has_aim: Function that tells whether it is known toward what an edit of a latent should move the output.

    Returns:
        The latents, and the rows of `effects` of those that are listed but cannot be tested.
    """
    latents, labels = study.subject.latents, study.subject.labels
    live = [latent for latent, row in latents.items() if row["n_images"]]
    able = [latent for latent in live if has_aim(latent)] or live
    most = len(live)
    match study.params.latents:
        case ListedLatents(latents=listed):
            ranked = [latent for latent in listed if latent in set(live)]
        case FiringLatents(min_images=least):
            ranked = [latent for latent in able if latents[latent]["n_images"] >= least]
        case BestLatents(by=by, n=most):
            value = {latent: latents[latent]["ms"] if by == "ms" else labels.get(latent, {}).get("score") for latent in able}
            known = [(-number, latent) for latent, number in value.items() if number is not None]
            ranked = [latent for _, latent in sorted(known)]
    chosen: list[Described] = []
    for one in study.subject.describe(ranked):
        if len(chosen) == most:
            break
        if one.n_firing >= LEAST_FIRING:
            chosen.append(one)
    study.chosen = [one.latent for one in chosen]
    return chosen, _left_out(study)


def _left_out(study: Study) -> list[dict[str, Any]]:
    """Make the rows of `effects` of listed latents that are not tested, with the reason of each."""
    params, subject = study.params.latents, study.subject
    left = [latent for latent in params.latents if latent not in study.chosen] if isinstance(params, ListedLatents) else []
    rows = []
    for one in subject.describe(left):
        reason = f"it fires on {one.n_firing} of {len(subject.sample)} sampled training tokens; {LEAST_FIRING} are needed to know its scale"
        if subject.latents[one.latent]["is_dead"]:
            reason = "it is dead: it never fires"
        elif not subject.latents[one.latent]["n_images"]:
            reason = "it fires on no evaluation image"
        rows.append(untested_row(one.latent, reason))
    return rows


def untested_row(latent: int, reason: str) -> dict[str, Any]:
    """Make the row of `effects` of a latent that is not tested."""
    return {"latent": latent, "status": "untested", "reason": reason}


def _attribute(study: Study, on_event: Listener) -> list[dict[str, Any]]:
    """Attribute the log-odds of the most common classes to all latents by gradients, and exactly to the first few of each class."""
    subject, names, n = study.subject, study.common, len(study.images)
    if not study.readout:
        return []
    scores = {name: study.readout.log_odds(name) for name in names}
    attributor = Attributor(subject.model, subject.device_sae, subject.reads, subject.writes)
    n_latents = subject.sae.n_latents
    cheap = {name: torch.zeros(n_latents, dtype=torch.float64) for name in names}
    for done, pixels in study.iter_pixels():
        code = attributor.encode(pixels)
        for name, score in scores.items():
            cheap[name] += attributor.cheap(pixels, score, code).by_image.sum(0).double().cpu() / n
        on_event(Progress("attribute classes", done, n))
    ranked = {name: effects.abs().topk(min(N_ATTRIBUTED, len(effects))).indices.tolist() for name, effects in cheap.items()}
    exact = {name: torch.zeros(min(N_EXACT, n_latents), dtype=torch.float64) for name in names}
    for _, pixels in study.iter_pixels():
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


def _spread_of(total_d: Float64[Tensor, " d"], n: int) -> float:
    """Mean of 1 − cosine of the outputs of two different images, from the sum of outputs of unit norm, `(d,)`, and their number."""
    mean = total_d / n
    return float((1 - mean @ mean) * n / (n - 1))
