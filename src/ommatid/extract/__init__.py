"""Stage `extract`: images through the model and the judge, activations and embeddings out.

A plan deals the images to shards; an executor runs `extract_shard(i)` for those that are not there yet; their receipts become the
manifests. What comes out is a function of images, params and code: the same bytes whoever ran it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ommatid import executors
from ommatid.config import ExtractParams
from ommatid.events import Listener, Progress, ignore
from ommatid.extract.plan import blocks_of, make_plan
from ommatid.extract.room import check_room
from ommatid.extract.shard import EMBEDDINGS, PLAN, ShardJob, load_worker, receipt_name
from ommatid.extract.tokens import TokenPicker
from ommatid.extract.towers import Towers
from ommatid.store import RECEIPTS, Artefact, Draft, File

__all__ = ["extract"]


def extract(params: ExtractParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Capture activations at every hookpoint for every image, and embed it for the names and for the judge.

    Raises:
        ModelError: unknown hookpoint, or a model that cannot be loaded or lacks the tokens asked for.
        ArtefactError: the disk is too small, or an image was lost.
        ExecutorError: a worker died again and again, or no cluster answers.
    """
    images = inputs["images"]
    job = ShardJob(params.model_dump_json(), _absolute(images.url), _absolute(draft.url))
    towers = load_worker(job).towers  # all that can be wrong with the models is found before any work
    check_room(draft, params, images.summary, towers)
    n_images = _write_plan(draft, images)
    done = set(draft.names(RECEIPTS))
    missing = [shard for shard in range(len(n_images)) if receipt_name(shard) not in done]
    progress = _Progress(n_images, missing, on_event)
    executors.run(params.executor, replace(job, on_chunk=progress.tell), missing, progress.shard)
    receipts = _Receipts(draft, len(n_images))
    for name, picker in towers.pickers.items():
        files, summary = receipts.merge(name)
        draft.child(name, "activations").seal(_summarise(towers, picker, images) | summary, files)
    return draft.seal({"hookpoints": list(towers.pickers), "n_shards": len(n_images), "n_images": sum(n_images)})


def _absolute(url: str) -> str:
    """For workers that run in another folder."""
    return url if "://" in url else str(Path(url).resolve())


def _write_plan(draft: Draft, images: Artefact) -> list[int]:
    """Images of each shard."""
    if not draft.has(PLAN):
        plan = make_plan(blocks_of(images))
        draft.write_table(PLAN, plan, row_group_size=2**16)  # a worker reads the few row groups that hold its shard
    counted = draft.read(PLAN).group_by("shard").aggregate([("n_images", "sum")]).sort_by("shard")
    return counted["n_images_sum"].to_pylist()


class _Progress:
    """Images done, from chunks in this process and shards in others."""

    def __init__(self, n_images: list[int], missing: list[int], on_event: Listener) -> None:
        self._n_images = n_images
        self._done = dict(enumerate(n_images)) | dict.fromkeys(missing, 0)
        self._on_event = on_event

    def shard(self, shard: int) -> None:
        """A shard is done."""
        self.tell(shard, self._n_images[shard])

    def tell(self, shard: int, done: int) -> None:
        """So many images of a shard are done."""
        if done > self._done[shard]:
            self._done[shard] = done
            self._on_event(Progress("extract images", sum(self._done.values()), sum(self._n_images)))


class _Receipts:
    """What the shards wrote, in their order."""

    def __init__(self, draft: Draft, n_shards: int) -> None:
        self._draft = draft
        self._n_shards = n_shards

    def merge(self, hookpoint: str) -> tuple[list[File], dict[str, Any]]:
        """Files of a hookpoint's artefact, and what the shards measured."""
        files, windows, rounding, n_tokens = [], [], 0.0, {"train": 0, "eval": 0}
        for receipt in self._iter():
            for values in (*receipt[hookpoint]["files"], *receipt[EMBEDDINGS]["files"]):
                file = File(**values)
                files.append(file)
                table = file.name.partition("-")[0]
                n_tokens[table] = n_tokens.get(table, 0) + (file.rows or 0)
            windows.append(receipt[hookpoint]["window"])
            rounding = receipt["rounding"][hookpoint] if receipt["rounding"] else rounding
        summary = {"n_train_tokens": n_tokens["train"], "n_eval_tokens": n_tokens["eval"], "window": min(windows), "rounding": rounding}
        return files, summary

    def _iter(self) -> Iterator[dict[str, Any]]:
        return self._draft.iter_json([receipt_name(shard) for shard in range(self._n_shards)])


def _summarise(towers: Towers, picker: TokenPicker, images: Artefact) -> dict[str, Any]:
    model = towers.model
    return {
        "model": model.name,
        "judge": towers.judge.name,
        "namer": towers.namer.name,
        "hookpoint": picker.name,
        "d_model": picker.hookpoint.d_model,
        "d_joint": towers.d_joint,
        "d_judge": towers.judge.d_embed,
        "grid": picker.grid,
        "tokens_per_image": len(picker.places),
        "n_images": images.summary["n_images"],
        "preprocessing": dict(model.preprocessing),
    }
