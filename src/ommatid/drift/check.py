"""The comparison of new images with a champion's, its verdict, and the tables that say what has changed."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ommatid import metrics, schemas
from ommatid.catalog.reader import Catalog
from ommatid.compute.evenly import spread_evenly
from ommatid.config import DriftParams
from ommatid.drift.measure import Measured, measure
from ommatid.drift.reference import N_IMAGES, Extraction, Reference, write_artefact
from ommatid.errors import ArtefactError, QueryError
from ommatid.events import Listener, Progress, Warned, ignore
from ommatid.sae.model import SAE
from ommatid.store import Artefact, list_artefacts, open_artefact
from ommatid.summaries import DriftSummary

KIND = "drift"
N_TESTS = 4
"""Number of kinds of test, by which each p value is multiplied (Bonferroni): MMD, AUROC, FVU and latents."""
LEAST_COMPARED = 16
"""Number of images below which a kind of test is left out, such as when only evaluation images can be encoded and few are new."""
N_SHOWN = 12
"""Number of changed latents that are shown with pictures."""
N_PICTURES = 5
"""Number of pictures of each side of such a latent."""
SETTLED = ("none", "slight")
"""Verdicts after which images count as compared. Those of other checks are compared again, together with newer ones."""


@dataclass(frozen=True)
class Champion:
    """The champion that new images are compared with."""

    key: str
    """Name of its folder."""
    sae: Artefact
    """Its SAE."""
    reference: Reference
    """What new images are compared with."""
    catalog: Path | None = None
    """Its catalogue, from which names and pictures of latents are taken; None for neither."""


@dataclass(frozen=True)
class Check:
    """A check of new images for drift."""

    artefact: Artefact
    """Its tables."""

    @cached_property
    def row(self) -> dict[str, Any]:
        """The row of the table `drift_checks`."""
        return self.artefact.read("drift_checks").to_pylist()[0]

    @property
    def verdict(self) -> str:
        """Verdict: none, slight, drift, too_few or not_comparable."""
        return self.artefact.summary["verdict"]

    def latents(self, n: int | None = None) -> list[dict[str, Any]]:
        """Return rows of the table `drift`, of the `n` latents with the strongest evidence of a change; None for all."""
        return self.artefact.read("drift").slice(0, n).to_pylist()

    def pictures(self) -> list[dict[str, Any]]:
        """Return the rows of the table `drift_images`."""
        return self.artefact.read("drift_images").to_pylist()


def list_checks(folder: Path, on_event: Listener = ignore) -> list[Check]:
    """List all checks in a folder, oldest first. One that is damaged is left out, with a warning: its images are compared again."""
    found = []
    for path in list_artefacts(folder):
        try:
            artefact = open_artefact(path, KIND)
            artefact.verify()
        except ArtefactError as error:
            on_event(Warned(f"a check for drift is left out: {error}"))
        else:
            found.append(Check(artefact))
    return found


def check(params: DriftParams, folder: Path, champion: Champion, extraction: Extraction, on_event: Listener = ignore) -> Check | None:
    """Compare the images that a champion does not know with its own, and record the check; a check made before is not made again.

    The images are those that are neither among the champion's nor in an earlier check of this champion that found no drift under the same
    params. Four kinds of test compare them, at the level `alpha` together: the maximum mean discrepancy and a domain classifier on the
    judge's embeddings, FVU, and, for each latent, on what share of images it fires and how strongly. All count images, not tokens.

    Args:
        params: The section `drift`.
        folder: Folder with a folder for each check.
        champion: The champion.
        extraction: Images and activations of now.
        on_event: Called with each progress event.

    Returns:
        The check; None if there are no new images.

    Raises:
        ArtefactError: An artefact of the champion or of the extraction is damaged.
    """
    checks = list_checks(folder, on_event)
    settled = _settled(checks, champion.key, params)
    new = [
        row for row in extraction.rows if (image_id := bytes.fromhex(row[1])) not in champion.reference.known and image_id not in settled
    ]
    if not new:
        return None
    digest = _digest(params, champion, extraction, new)
    if found := next((one for one in checks if one.artefact.path.name.endswith(f"-{digest}")), None):
        return found
    now = datetime.now(UTC)
    base = {
        "check_id": f"{_count(folder) + 1:05d}-{digest}",  # and not its time, as a clock may jump
        "checked_at": now.replace(tzinfo=None),
        "sae": champion.sae.summary["sae"],
        "action": params.action,
        "alpha": params.alpha,
        "n_new": len(new),
        "n_known": len(champion.reference.known),
        "champion": champion.key,
        "images_digest": extraction.images.digest,
    }
    result = _compare(params, champion, extraction, new, on_event)
    latents = _latent_table(base, champion, result.latents, params.alpha, on_event)
    tables = {
        "drift_checks": pa.Table.from_pylist([{**base, **result.row}], schema=schemas.DRIFT_CHECKS),
        "drift": latents,
        "drift_images": _picture_table(base["check_id"], latents, champion, extraction, result.latents, on_event),
        "compared": pa.table([[bytes.fromhex(image_id) for _, image_id, _ in new]], schema=schemas.COMPARED),
    }
    inputs = {
        "images": extraction.images,
        "extract": extraction.activations,
        "train": champion.sae,
        "reference": champion.reference.artefact,
    }
    summary = DriftSummary(verdict=result.row["verdict"], n_new=len(new), **result.above_chance)
    return Check(write_artefact(folder / base["check_id"], KIND, inputs, tables, summary, **params.model_dump(mode="json")))


def _count(folder: Path) -> int:
    """Return the number of the last check in a folder; 0 if there is none."""
    numbers = (path.name.partition("-")[0] for path in list_artefacts(folder))
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def _settled(checks: Sequence[Check], champion: str, params: DriftParams) -> set[bytes]:
    """Ids of the images that were in a check of a champion, under these params, that found no drift. A look with others settles nothing."""
    found: set[bytes] = set()
    for one in checks:
        if one.verdict in SETTLED and one.row["champion"] == champion and _judges_as(one, params):
            found.update(one.artefact.read("compared")["image_id"].to_pylist())
    return found


def _judges_as(one: Check, params: DriftParams) -> bool:
    """Whether a check came to its verdict under the same params. What follows from a verdict, the action, does not matter."""
    return {**one.artefact.manifest.params, "action": params.action} == params.model_dump(mode="json")


def _digest(params: DriftParams, champion: Champion, extraction: Extraction, new: Sequence[tuple[int, str, str]]) -> str:
    """Digest of all that a check depends on."""
    parts = [params.model_dump(mode="json"), champion.reference.artefact.digest, extraction.made_with, sorted(row[1:] for row in new)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Latents:
    """How latents fire on two samples of images; `(latents,)` each, NaN where a latent fires on too few images."""

    new: Measured
    """What was measured on the new images."""
    before: Measured
    """What was measured on the champion's."""
    rate: Float64[np.ndarray, " latents"]
    """Share of new images on which each latent fires."""
    rate_before: Float64[np.ndarray, " latents"]
    """Share of the champion's."""
    act: Float64[np.ndarray, " latents"]
    """Mean image-level activation over the new images on which it fires."""
    act_before: Float64[np.ndarray, " latents"]
    """The same of the champion's."""
    rate_p: Float64[Tensor, " latents"]
    """p values of both rates being equal, unadjusted."""
    act_p: Float64[Tensor, " latents"]
    """p values of activations being equally strong, unadjusted."""
    p: Float64[Tensor, " latents"]
    """The smaller of the two, adjusted for all latents and all kinds of test."""


@dataclass(frozen=True)
class _Result:
    """What a comparison found."""

    row: Mapping[str, Any]
    """Columns of `drift_checks`."""
    above_chance: Mapping[str, float | None] = field(default_factory=lambda: dict.fromkeys(("auroc", "fvu_rise", "changed")))
    """The numbers that thresholds limit; None unless they are above chance."""
    latents: Latents | None = None
    """The latents; None if they were not compared."""


def _compare(
    params: DriftParams, champion: Champion, extraction: Extraction, new: Sequence[tuple[int, str, str]], on_event: Listener
) -> _Result:
    n, known = len(new), len(champion.reference.known)
    was, now = champion.reference.made_with, extraction.made_with
    if differing := [f"{key} was {was.get(key)}, is {now.get(key)}" for key in {**was, **now} if was.get(key) != now.get(key)]:
        reason = f"{_images(n)} cannot be compared with the champion's {known:,}: {', '.join(differing)}"
        return _Result({"verdict": "not_comparable", "reason": reason})
    if n < params.min_images:
        reason = (
            f"{_images(n)} {'is' if n == 1 else 'are'} too few to tell whether they differ from the champion's {known:,}: "
            f"at least {params.min_images:,} are compared, and these will be among them"
        )
        return _Result({"verdict": "too_few", "reason": reason})
    numbers = np.sort(np.array([image for image, _, _ in new], np.int64))
    sae, encoded = SAE.load(champion.sae.path), _choose_encoded(extraction, new)
    embeddings = extraction.judge(numbers[spread_evenly(n, N_IMAGES)])
    measured = measure(sae, extraction.activations, extraction.target, encoded, champion.reference.image_activation, on_event)
    before = Sample(champion.reference.embeddings(), champion.reference.measured())
    row, latents = compare(params.alpha, Sample(embeddings, measured), before, sae.n_latents, on_event)
    if not row:
        reason = (
            f"{_images(n)} could not be compared with the champion's {known:,}: fewer than {LEAST_COMPARED} of them, or of the champion's, "
            "have embeddings, or all their tokens in the activations; these will be among the next"
        )
        return _Result({"verdict": "too_few", "reason": reason})
    return _decide(params, row, n, known, latents)


@dataclass(frozen=True)
class Sample:
    """What is compared of some images."""

    embeddings: Float[Tensor, "embedded width"]
    """The judge's embeddings, `(embedded, width)`."""
    measured: Measured
    """What the champion's SAE does on the images, or on some of them."""


def compare(
    alpha: float, new: Sample, before: Sample, n_latents: int, on_event: Listener = ignore
) -> tuple[dict[str, Any], Latents | None]:
    """Compare two samples of images by all kinds of test; those for which there are too few images are left out.

    Args:
        alpha: Level of all tests together.
        new: The new images.
        before: The champion's.
        n_latents: Number of latents of the champion.
        on_event: Called with each progress event.

    Returns:
        Columns of the table `drift_checks`, and the latents; None if they were left out.
    """
    n, row, latents = metrics.n_permutations(alpha), {}, None
    if min(len(new.embeddings), len(before.embeddings)) >= LEAST_COMPARED:
        row |= _compare_embeddings(new.embeddings.float(), before.embeddings.float(), n, alpha, on_event)
    if min(len(new.measured.images), len(before.measured.images)) >= LEAST_COMPARED:
        latents = _compare_latents(new.measured, before.measured, n_latents)
        row |= _compare_fvu(new.measured, before.measured, n, alpha)
        tested = latents.p[~latents.p.isnan()]
        row |= {"n_encoded": len(new.measured.images), "n_latents": len(tested), "n_changed": int((tested <= alpha).sum())}
        row |= {"latents_p": float(tested.min()) if len(tested) else 1.0}
    on_event(Progress("compare latents", 1, 1))
    return row, latents


def _compare_embeddings(
    new: Float[Tensor, "new width"], before: Float[Tensor, "before width"], n: int, alpha: float, on_event: Listener
) -> dict[str, Any]:
    discrepancy, _ = metrics.mmd(new, before, n)
    on_event(Progress("compare embeddings", 1, 2))
    classifier = metrics.domain_auroc(new, before, n)
    on_event(Progress("compare embeddings", 2, 2))
    found = 0.5 + metrics.least_found(classifier.spread, alpha / N_TESTS)
    return {
        "n_embedded": len(new),
        "mmd": discrepancy.value,
        "mmd_chance": discrepancy.chance,
        "mmd_p": _times(discrepancy.p),
        "auroc": classifier.value,
        "auroc_chance": classifier.chance,
        "auroc_p": _times(classifier.p),
        "auroc_found": min(found, 1.0),
    }


def _times(p: float) -> float:
    """Adjust a p value for the number of kinds of test."""
    return min(1.0, N_TESTS * p)


def _choose_encoded(extraction: Extraction, new: Sequence[tuple[int, str, str]]) -> dict[str, Int64[np.ndarray, " images"]]:
    """Choose the new images to encode, by split. Training images are left out if some of their tokens are missing from the activations."""
    params = extraction.activations.manifest.params
    splits = ("train", "eval") if params.get("sample") is None and params.get("max_norm") is None else ("eval",)
    wanted = sorted((image, split) for image, _, split in new if split in splits)
    chosen = [wanted[place] for place in spread_evenly(len(wanted), N_IMAGES)] if wanted else []
    return {split: np.array([image for image, of in chosen if of == split], np.int64) for split in splits}


def _compare_fvu(new: Measured, before: Measured, n: int, alpha: float) -> dict[str, Any]:
    sums = [torch.from_numpy(np.stack([measured.error, measured.variance], axis=1)) for measured in (new, before)]
    shift = metrics.ratio_shift(sums[0], sums[1], n)
    # The spread is that of |difference|, whose square has the mean of the variance of the difference.
    spread = math.hypot(shift.test.spread, shift.test.mean)
    return {
        "fvu": shift.new,
        "fvu_before": shift.before,
        "fvu_chance": shift.test.chance,
        "fvu_low": shift.low,
        "fvu_high": shift.high,
        "fvu_p": _times(shift.test.p),
        "fvu_found": metrics.least_found(spread, alpha / N_TESTS, two_sided=True),
    }


def _compare_latents(new: Measured, before: Measured, n_latents: int) -> Latents:
    counts, means = [], []
    for measured in (new, before):
        counts.append(np.bincount(measured.latents, minlength=n_latents))
        sums = np.bincount(measured.latents, measured.acts, n_latents)
        means.append(np.where(counts[-1] > 0, sums / counts[-1].clip(min=1), np.nan))
    tensors = [torch.from_numpy(count) for count in counts]
    rate_p = metrics.rate_shift(tensors[0], len(new.images), tensors[1], len(before.images))
    latents, acts = (torch.from_numpy(np.concatenate([getattr(of, name) for of in (new, before)])) for name in ("latents", "acts"))
    act_p = metrics.activation_shift(latents, acts, torch.arange(len(latents)) < len(new.latents), n_latents)
    adjusted = metrics.holm(torch.cat([rate_p, act_p])).unflatten(0, (2, n_latents))
    p = torch.where(adjusted.isnan().all(0), math.nan, adjusted.nan_to_num(1.0).amin(0) * N_TESTS).clamp_max(1.0)
    rates = [count / len(measured.images) for count, measured in zip(counts, (new, before), strict=True)]
    return Latents(new, before, rates[0], rates[1], means[0], means[1], rate_p, act_p, p)


def _decide(params: DriftParams, row: dict[str, Any], n: int, known: int, latents: Latents | None) -> _Result:
    """Decide the verdict, and say why."""

    def is_found(kind: str) -> bool:
        return kind in row and row[kind] <= params.alpha

    rise = row["fvu"] - row["fvu_before"] if "fvu" in row else 0.0
    changed = row["n_changed"] / max(1, row["n_latents"]) if is_found("latents_p") else None
    above = {"auroc": row["auroc"] if is_found("auroc_p") else None, "fvu_rise": rise if is_found("fvu_p") else None, "changed": changed}
    limits = {"auroc": params.max_auroc, "fvu_rise": params.max_fvu_rise, "changed": params.max_changed}
    exceeded = any(above[key] is not None and above[key] > limit for key, limit in limits.items())
    found = any(map(is_found, ("mmd_p", "auroc_p", "fvu_p", "latents_p")))
    verdict = "drift" if exceeded else "slight" if found else "none"
    says = {"drift": "differ from", "slight": "differ slightly from", "none": "look like"}[verdict]
    reason = f"{_images(n)} {says} the champion's {known:,}: {'; '.join(_iter_findings(row))}"
    if verdict == "none" and row.get("auroc_found", 1.0) < 1.0:
        share = 2 * (row["auroc_found"] - 0.5)
        reason += f"; images that the judge takes for another kind would very likely have been found from a share of {100 * share:.0f} % on"
    return _Result({**row, "verdict": verdict, "reason": reason}, above, latents)


def _iter_findings(row: Mapping[str, Any]) -> Iterator[str]:
    if "auroc" in row:
        yield f"a classifier tells them apart with an AUROC of {row['auroc']:.3f} (up to {row['auroc_chance']:.3f} by chance)"
    if "fvu" in row:
        interval = f"{row['fvu_low']:+.4f} to {row['fvu_high']:+.4f}"
        yield f"FVU is {row['fvu']:.4f} where it was {row['fvu_before']:.4f} (a difference of {interval})"
        yield f"{row['n_changed'] or 'none'} of {row['n_latents']:,} latents fire differently"


def _images(n: int) -> str:
    return f"{n:,} new image{'s' * (n != 1)}"


def _latent_table(base: Mapping[str, Any], champion: Champion, found: Latents | None, alpha: float, on_event: Listener) -> pa.Table:
    """Make the table `drift`, the latents with the strongest evidence first."""
    if found is None:
        return schemas.DRIFT.empty_table()
    n = len(found.p)
    unadjusted = torch.stack([found.rate_p, found.act_p]).nan_to_num(2.0).numpy()
    difference = np.abs(found.rate - found.rate_before)
    order = np.lexsort((np.arange(n), -difference, unadjusted.min(0)))
    is_changed = (found.p <= alpha).numpy()
    by_rate = unadjusted[0] <= unadjusted[1]
    more, stronger = found.rate > found.rate_before, found.act > found.act_before
    change = np.where(by_rate, np.where(more, "more", "fewer"), np.where(stronger, "stronger", "weaker"))
    labels = _read_labels(champion, on_event)
    columns = {
        "check_id": [base["check_id"]] * n,
        "sae": [base["sae"]] * n,
        "latent": order.astype(np.int32),
        "rank": np.arange(1, n + 1, dtype=np.int32),
        "label": [labels.get(latent) for latent in order.tolist()],
        "rate": found.rate[order],
        "rate_before": found.rate_before[order],
        **{name: pa.array(getattr(found, name)[order], pa.float64(), from_pandas=True) for name in ("act", "act_before")},
        **{name: pa.array(getattr(found, name).numpy()[order], pa.float64(), from_pandas=True) for name in ("rate_p", "act_p", "p")},
        "is_changed": is_changed[order],
        "change": pa.array(change[order], pa.string(), mask=~is_changed[order]),
    }
    return pa.table(columns, schema=schemas.DRIFT)


def _read_labels(champion: Champion, on_event: Listener) -> dict[int, str]:
    sql = "SELECT latent, label FROM features WHERE sae = $sae AND label IS NOT NULL"
    return {row["latent"]: row["label"] for row in _ask(champion, sql, {"sae": champion.sae.summary["sae"]}, "names", on_event)}


def _ask(champion: Champion, sql: str, parameters: Mapping[str, Any], what: str, on_event: Listener) -> list[dict[str, Any]]:
    """Query a champion's catalogue; if it cannot be read, say which part of a check is missing, as its verdict needs no catalogue."""
    if champion.catalog is None:
        return []
    try:
        with Catalog(champion.catalog) as catalog:
            return catalog.ask(sql, dict(parameters)).dicts()
    except QueryError as error:
        on_event(Warned(f"changed latents are shown without {what}: {error}"))
        return []


def _picture_table(
    check_id: str, latents: pa.Table, champion: Champion, extraction: Extraction, found: Latents | None, on_event: Listener
) -> pa.Table:
    """Make the table `drift_images`: of the changed latents with the strongest evidence, images on which they fire most."""
    shown = [row["latent"] for row in latents.slice(0, N_SHOWN).to_pylist() if row["is_changed"]]
    if found is None or not shown:
        return schemas.DRIFT_IMAGES.empty_table()
    chosen = [
        (latent, side, rank, int(measured.images[measured.rows[place]]), float(measured.acts[place]))
        for latent in shown
        for side, measured in (("before", found.before), ("new", found.new))
        for rank, place in enumerate(_strongest(measured, latent), start=1)
    ]
    wanted = {side: {image for _, of, _, image, _ in chosen if of == side} for side in ("before", "new")}
    pictures = {"before": _read_known(champion, wanted["before"], on_event), "new": dict(_iter_new(extraction, wanted["new"]))}
    rows = [
        {"check_id": check_id, "latent": latent, "side": side, "rank": rank, "act": act, **pictures[side][image]}
        for latent, side, rank, image, act in chosen
        if image in pictures[side]
    ]
    return pa.Table.from_pylist(rows, schema=schemas.DRIFT_IMAGES)


def _strongest(measured: Measured, latent: int) -> Int64[np.ndarray, " firings"]:
    """Places of the firings of a latent with the largest activations."""
    places = np.flatnonzero(measured.latents == latent)
    return places[np.argsort(-measured.acts[places], kind="stable")[:N_PICTURES]]


def _read_known(champion: Champion, images: set[int], on_event: Listener) -> dict[int, dict[str, Any]]:
    """Read images of the champion's data set from its catalogue, by number."""
    sql = "SELECT image, image_id, path, thumbnail FROM images WHERE image IN (SELECT unnest($images::INTEGER[]))"
    found = _ask(champion, sql, {"images": sorted(images)}, "the champion's images", on_event)
    return {row.pop("image"): row for row in found}


def _iter_new(extraction: Extraction, images: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read images of now by number, from the row groups that hold them."""
    start = 0
    for part, groups in zip(extraction.images.parts("images"), extraction.images.row_groups("images"), strict=True):
        for group, n in enumerate(groups):
            if any(image in images for image, _, _ in extraction.rows[start : start + n]):
                with extraction.images.open_part(part) as file:
                    for row in file.read_row_group(group, ["image", "image_id", "path", "thumbnail"]).to_pylist():
                        if (image := row.pop("image")) in images:
                            yield image, row
            start += n
