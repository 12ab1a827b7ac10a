"""What the model's output does while latents of one SAE are set to chosen activations, beside controls.

For each latent an image passes at most once through the part of the model before the hookpoint, and through the rest once for each dose
and arm.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ommatid.config import InterveneParams
from ommatid.config.intervene import BestLatents, FiringLatents, ListedLatents, Ranking
from ommatid.errors import InputError, ModelError
from ommatid.events import Listener, Progress, Warned
from ommatid.intervene.class_attribution import ClassAttribution, attribute_classes, attribution_rows
from ommatid.intervene.latent_test import Found, LatentTest
from ommatid.intervene.masks import Masks
from ommatid.intervene.output_scores import output_scores
from ommatid.intervene.patches import PatchHead, PatchTest, fit_patch_head
from ommatid.intervene.study import Study
from ommatid.intervene.subject import Described, Subject
from ommatid.metrics import unit
from ommatid.metrics.interventions import CausalStatus

LEAST_FIRING = 8
"""Number of sampled tokens on which a latent must fire for its scale to be known."""
KEPT = 2**28
"""Bytes of results that are kept of images at a time: 256 MiB."""


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
    latents: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """What is known of each live latent, tested or not, as columns of `effects`: its scale, and the size of its attributions."""
    patch_accuracy: float | None = None
    """Balanced accuracy of the head that reads the classes of masks from patches, in held-out images; None if there is none."""


def measure(params: InterveneParams, subject: Subject, on_event: Listener) -> Measured | str:
    """Run the model again with latents of one SAE set to chosen activations.

    Args:
        params: The section `intervene`.
        subject: The model and the SAE.
        on_event: Called with each progress event.

    Returns:
        What was measured; or, if nothing can be measured, the reason.
    """
    try:
        return _measure(Study(params, subject), on_event)
    except (ModelError, InputError) as error:
        return str(error)


def _measure(study: Study, on_event: Listener) -> Measured:
    masks = _open_masks(study, on_event)  # before any work, as its errors are the user's
    study.subject.firings  # noqa: B018 - all of them are needed, and finding those of a few at a time would take longer
    attribution = attribute_classes(study, on_event)
    chosen, untested = choose_latents(study, study.has_movement, on_event, attribution)
    head = _fit_patches(study, masks, on_event) if masks else None
    found, refused = run_tests(study, chosen, on_event)
    untested += refused
    if not found:
        raise InputError(untested[0]["reason"] if untested else "no latent can be edited; choose others with intervene.latents")
    if not any(row["value"] for one in found for row in one.interventions if row["outcome"] == "drift"):
        edited = study.subject.writes
        raise InputError(
            f"the model's output stays the same whatever is done to the {edited.policy} tokens at {edited.name}: it is not computed from "
            "them; choose an earlier hookpoint, or other tokens"
        )
    tested = {one.effect["latent"] for one in found}
    by_patch = _run_patches(study, [one for one in chosen if one.latent in tested], head, on_event) if head else []
    return Measured(
        interventions=[*(row for one in found for row in one.interventions), *by_patch],
        effects=[*(one.effect for one in found), *untested],
        attributions=attribution_rows(study, attribution),
        zero_dose=max(one.zero_dose for one in found),
        random_causal=share_of_random([one.random_status for one in found]),
        latents=_describe_live(study, attribution),
        patch_accuracy=head.accuracy if head else None,
    )


def share_of_random(statuses: Sequence[CausalStatus]) -> float | None:
    """Return the share of random latents that are called causal, of those that could be judged; None if none could."""
    judged = [status for status in statuses if status != "untested"]
    return judged.count("causal") / len(judged) if judged else None


def _open_masks(study: Study, on_event: Listener) -> Masks | None:
    if not study.params.masks:
        return None
    masks = Masks(study.params.masks, study.subject.inputs["images"])
    if masks.n_missing:
        on_event(Warned(f"{masks.n_missing} images have no mask in {study.params.masks}"))
    return masks


def _fit_patches(study: Study, masks: Masks, on_event: Listener) -> PatchHead | None:
    """Fit the head that reads the classes of masks from patches; None, with a warning, if they are of no use."""
    try:
        return fit_patch_head(study.subject, masks, study.chosen)
    except InputError as error:
        on_event(Warned(f"{study.subject.sae.name}: {error}"))
        return None


def _run_patches(study: Study, chosen: Sequence[Described], head: PatchHead, on_event: Listener) -> list[dict[str, Any]]:
    """Return the rows of outcomes by patch, of the latents that have a class of the masks."""
    tests = [PatchTest(study, one, head) for one in chosen if one.latent in head.targets]
    rows: list[dict[str, Any]] = []
    for done, test in enumerate(tests, start=1):
        rows += test.rows()
        on_event(Progress("edit patches", done, len(tests)))
    return rows


def _describe_live(study: Study, attribution: ClassAttribution) -> dict[int, dict[str, float]]:
    """Return what is known of each live latent: its scale, and the size of its attributions."""
    firings, sizes = study.subject.firings, attribution.sizes
    of_size = {} if sizes is None else {latent: {"attribution": size} for latent, size in enumerate(sizes.tolist())}
    live = [latent for latent in study.subject.latents if firings.count(latent)]
    return {latent: {"scale": firings.scale(latent), **of_size.get(latent, {})} for latent in live}


def run_tests(study: Study, chosen: Sequence[Described], on_event: Listener) -> tuple[list[Found], list[dict[str, Any]]]:
    """Test latents in as many passes over the images as memory needs.

    Args:
        study: The study.
        chosen: The latents.
        on_event: Called with each progress event.

    Returns:
        What was found, and the rows of `effects` of latents that cannot be tested.
    """
    found: list[Found] = []
    refused: list[dict[str, Any]] = []
    for some in _passes(study, chosen):
        tests: list[LatentTest] = []
        for one in some:
            try:
                tests.append(LatentTest(study, one))
            except InputError as error:  # about this latent alone, such as too few others to compare it with
                refused.append(untested_row(one.latent, str(error)))
        found += _run(study, tests, len(found) + len(refused), len(chosen), on_event)
    return found, refused


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


def choose_latents(
    study: Study, has_aim: Callable[[int], bool], on_event: Listener, attribution: ClassAttribution | None = None
) -> tuple[list[Described], list[dict[str, Any]]]:
    """Choose the latents that are tested, the best first.

    Those that fire too rarely to be edited are left out, and so are those of which it is not known toward what an edit should move the
    output, unless they are listed or that is known of none: outcomes that need no label are still measured.

    Args:
        study: The study, whose chosen latents are set.
        has_aim: Function that tells whether it is known toward what an edit of a latent should move the output.
        on_event: Called with a warning for each number by which latents cannot be ranked, if they can be by another.
        attribution: Attribution of classes to all latents, if it is known.

    Returns:
        The latents, and the rows of `effects` of those that are listed but cannot be tested.
    """
    latents = study.subject.latents
    live = [latent for latent, row in latents.items() if row["n_images"]]
    able = [latent for latent in live if has_aim(latent)] or live
    most = len(live)
    match study.params.latents:
        case ListedLatents(latents=listed):
            rankings = [[latent for latent in listed if latent in set(live)]]
        case FiringLatents(min_images=least):
            rankings = [[latent for latent in able if latents[latent]["n_images"] >= least]]
        case BestLatents(n=most):
            rankings = _rank(study, able, attribution, on_event)
    chosen: list[Described] = []
    for ranked in rankings:
        n = len(chosen) + most
        taken = {one.latent for one in chosen}
        for one in study.subject.describe([latent for latent in ranked if latent not in taken]):
            if len(chosen) == n:
                break
            if one.n_firing >= LEAST_FIRING:
                chosen.append(one)
    study.chosen = [one.latent for one in chosen]
    return chosen, _left_out(study)


def _rank(study: Study, latents: Sequence[int], attribution: ClassAttribution | None, on_event: Listener) -> list[list[int]]:
    """Rank latents by each number that `intervene.latents` names, the best first; those of which it is not known are left out.

    Raises:
        InputError: None of the numbers can be computed.
    """
    assert isinstance(study.params.latents, BestLatents)
    rankings: list[list[int]] = []
    refused: list[InputError] = []
    for by in study.params.latents.by:
        try:
            value = _values(study, by, latents, attribution)
        except InputError as error:
            refused.append(error)
            continue
        known = sorted((-number, latent) for latent in latents if (number := value.get(latent)) is not None)
        rankings.append([latent for _, latent in known])
    if not rankings:
        raise refused[0]
    for error in refused:
        on_event(Warned(f"{study.subject.sae.name}: {error}"))
    return rankings


def _values(study: Study, by: Ranking, latents: Sequence[int], attribution: ClassAttribution | None) -> Mapping[int, float | None]:
    """Return the number by which each latent is ranked; None if it has none."""
    match by:
        case "ms":
            return {latent: study.subject.latents[latent]["ms"] for latent in latents}
        case "label_score":
            return {latent: study.subject.labels.get(latent, {}).get("score") for latent in latents}
    if not study.readout or not attribution or attribution.sizes is None:
        why = study.no_readout or "the model answers in words"
        raise InputError(f"latents cannot be ranked by {by}, as no class is read from the output: {why}; name ms in intervene.latents.by")
    return dict(enumerate(attribution.sizes.tolist())) if by == "attribution" else output_scores(study, latents)


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


def _spread_of(total_d: Float64[Tensor, " d"], n: int) -> float:
    """Mean of 1 − cosine of the outputs of two different images, from the sum of outputs of unit norm, `(d,)`, and their number."""
    mean = total_d / n
    return float((1 - mean @ mean) * n / (n - 1))
