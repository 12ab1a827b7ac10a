"""Stage `extract`: runs images through the model and the judges, and writes activations and embeddings.

A plan deals the images to shards, an executor makes the missing shards, and their receipts are merged into the manifests. The result is a
function of images, params and code: every executor writes the same bytes.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import assert_never

import numpy as np

from ommatid import executors
from ommatid.config import ExtractFiles, ExtractParams
from ommatid.errors import ModelError
from ommatid.events import Listener, Progress, Reused, Warned, ignore
from ommatid.extract.cache import open_place
from ommatid.extract.disk_space import check_disk_space
from ommatid.extract.networks import Networks, find_device, is_same
from ommatid.extract.plan import blocks_of, make_plan
from ommatid.extract.receipts import Merged, iter_missing, merge
from ommatid.extract.shard import PLAN, ShardJob, drop_worker, keep_worker, load_worker, receipt_name
from ommatid.extract.tokens import TokenPicker
from ommatid.store import RECEIPTS, SCRATCH, Artefact, Draft
from ommatid.store.row_store import as_keys
from ommatid.summaries import ActivationsSummary, ExtractionSummary, JudgeSummary
from ommatid.vlm.precision import resolve_dtype

PROBE = f"{RECEIPTS}/probe.json"


def run(params: ExtractParams | ExtractFiles, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Capture activations of images, or import them from files; see `extract` and `import_files`."""
    match params:
        case ExtractParams():
            return extract(params, inputs, draft, on_event)
        case ExtractFiles():
            from ommatid.extract.from_files.stage import import_files

            return import_files(params, inputs, draft, on_event)
        case _:
            assert_never(params)


def extract(params: ExtractParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Capture activations at every hookpoint for every image, and embed the image for the labels and for each judge.

    Args:
        params: The `extract` section of the params.
        inputs: The `images` artefact.
        draft: Draft of the extraction.
        on_event: Called with each progress event and warning.

    Returns:
        The sealed extraction, with one artefact of activations for each hookpoint.

    Raises:
        ModelError: A hookpoint is unknown, a model cannot be loaded or lacks the tokens to extract, or a judge fails on every image.
        ArtefactError: The disk is too small, or a file of an input or of the draft is missing or damaged.
        ExecutorError: A worker died repeatedly, or the cluster does not answer.
    """
    images = inputs["images"]
    if taken := sorted({SCRATCH, RECEIPTS.strip("/")} & set(params.hookpoints)):
        raise ModelError(f"extract.hookpoints: {taken[0]!r} is the name of a folder that Ommatid needs; rename the module")
    towers = Networks(_with_dtype(params))  # First, so that problems with the models are found before any work is done.
    left = check_disk_space(draft, params, images.summary, towers)
    cache = open_place(draft.scratch, left, lambda line: on_event(Warned(line)))
    towers.check()
    probe = tuple(_begin_or_continue(draft, towers.probe()))
    job = ShardJob(towers.params.model_dump_json(), _absolute(images.url), images.digest, _absolute(draft.url), probe, cache)
    n_images = _write_plan(draft, images)
    missing = list(iter_missing(draft, params.hookpoints, len(n_images)))
    progress = _Counter(n_images, missing, on_event)
    keep_worker(job, towers)
    if cache and missing:
        load_worker(job).cache.keep(_keys_of(images))
    try:
        executors.run(params.executor, replace(job, on_chunk=progress.update), missing, progress.finish)
    finally:
        drop_worker()
    _report_reuse(draft, missing, on_event)
    for name, merged in merge(draft, params.hookpoints, len(n_images)).items():
        judges = _summarise_judges(towers, merged.failed, sum(n_images))
        summary = _summarise(towers, towers.pickers[name], judges, merged, images.summary["n_images"])
        draft.child(name, "activations").seal(summary, merged.files)
    return draft.seal(ExtractionSummary(hookpoints=list(towers.pickers), n_shards=len(n_images), n_images=sum(n_images)))


def _with_dtype(params: ExtractParams) -> ExtractParams:
    """Resolve the dtype `auto` on this machine, so that all workers compute alike."""
    dtype = str(resolve_dtype(params.dtype, find_device())).removeprefix("torch.")
    return params.model_copy(update={"dtype": dtype})


def _begin_or_continue(draft: Draft, probe: list[float]) -> list[float]:
    """Return the probe with which the draft was begun. If other weights began it, discard its receipts and begin with this probe."""
    if draft.has(PROBE):
        begun: list[float] = draft.read_json(PROBE)
        if is_same(probe, begun):
            return begun
        for name in draft.names(RECEIPTS):
            draft.remove(name)
    draft.write_json(PROBE, probe)
    return probe


def _keys_of(images: Artefact) -> np.ndarray:
    """Return the keys in the cache of all images, `(images,)`."""
    return np.concatenate([as_keys(batch["image_id"].to_pylist()) for batch in images.iter_batches("images", ["image_id"], n_rows=2**16)])


def _absolute(url: str) -> str:
    """Make a path absolute, for workers that run in another folder."""
    return url if "://" in url else str(Path(url).resolve())


def _write_plan(draft: Draft, images: Artefact) -> list[int]:
    """Write the plan unless the draft has one, and return the number of images of each shard."""
    if not draft.has(PLAN):
        plan = make_plan(blocks_of(images))
        draft.write_table(PLAN, plan, row_group_size=2**16)  # Small, so that a worker reads only the few rows of its shard.
    counted = draft.read(PLAN).group_by("shard").aggregate([("n_images", "sum")]).sort_by("shard")
    return counted["n_images_sum"].to_pylist()


def _report_reuse(draft: Draft, shards: list[int], on_event: Listener) -> None:
    """Report the notices of the workers that made some shards, and how many images they found in the cache."""
    receipts = [receipt["reused"] for receipt in draft.iter_json([receipt_name(shard) for shard in shards])]
    for line in dict.fromkeys(line for receipt in receipts for line in receipt["notices"]):
        on_event(Warned(line))
    found, computed = (sum(receipt[key] for receipt in receipts) for key in ("found", "computed"))
    if found:
        on_event(Reused("images", found, computed))


class _Counter:
    """Counts the images that are done: chunk by chunk in this process, and shard by shard in others."""

    def __init__(self, n_images: list[int], missing: list[int], on_event: Listener) -> None:
        self._n_images = n_images
        self._of_shard = dict.fromkeys(missing, 0)
        self._total = sum(n_images)
        self._done = self._total - sum(n_images[shard] for shard in missing)
        self._on_event = on_event

    def finish(self, shard: int) -> None:
        """Count a shard as done."""
        self.update(shard, self._n_images[shard])

    def update(self, shard: int, done: int) -> None:
        """Count the first `done` images of a shard as done."""
        more = done - self._of_shard[shard]
        if more > 0:
            self._of_shard[shard] = done
            self._done += more
            self._on_event(Progress("extract images", self._done, self._total))


def _summarise_judges(towers: Networks, failed: list[int], n_images: int) -> list[JudgeSummary]:
    """Return the name, width and number of failures of each judge, in the order of their columns.

    Raises:
        ModelError: A judge failed on every image.
    """
    for judge, n in zip(towers.judges, failed, strict=True):
        if n == n_images > 0:
            raise ModelError(
                f"extract.judge: {judge.name} gave no embedding (NaN, infinity or zeros) for any of the {n} images; set extract.dtype to "
                "float32 if it overflows in bfloat16, or extract.judge to another encoder"
            )
    return [JudgeSummary(judge=judge.name, d_judge=judge.d_embed, failed=n) for judge, n in zip(towers.judges, failed, strict=True)]


def _summarise(towers: Networks, picker: TokenPicker, judges: list[JudgeSummary], merged: Merged, n_images: int) -> ActivationsSummary:
    return ActivationsSummary(
        model=towers.model.name,
        judge=towers.judges[0].name,
        judges=judges,
        namer=towers.namer.name,
        hookpoint=picker.name,
        d_model=picker.hookpoint.d_model,
        d_joint=towers.d_joint,
        d_judge=towers.judges[0].d_embed,
        grid=picker.grid,
        tokens_per_image=len(picker.places),
        n_images=n_images,
        n_train_tokens=merged.n_tokens["train"],
        n_eval_tokens=merged.n_tokens["eval"],
        window=merged.window or 0,
        rounding=merged.rounding,
        preprocessing=dict(towers.model.preprocessing),
    )
