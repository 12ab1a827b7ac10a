"""The job that makes one shard: it runs the shard's images through the networks, and writes one file of each table and a receipt.

Images are processed in chunks that are spilled to the local disk (see rows.py), so memory use does not depend on the number of images or
tokens, and an interrupted run continues after its last complete chunk. The job is idempotent: its files depend on the plan and params only.
"""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ommatid import schemas
from ommatid.config import ExtractParams
from ommatid.errors import ArtefactError, ModelError
from ommatid.extract.batches import ChunkOutputs, ShardImages, ShardOutputs
from ommatid.extract.cache import OutputCache, Place
from ommatid.extract.networks import Networks, is_same
from ommatid.extract.plan import SEED, divide, shard_blocks
from ommatid.extract.rows import (
    FailureCounter,
    Groups,
    Spill,
    WindowCounter,
    activation_table,
    embeddings_batch,
    iter_in_order,
    rows_batch,
    split_rounds,
    write_rows,
)
from ommatid.extract.tokens import draw_kept
from ommatid.images.loader import iter_pixels, make_pool
from ommatid.store import RECEIPTS, Artefact, Draft, Writer, open_artefact, part_name

EMBEDDINGS = "embeddings"
PLAN = "plan.parquet"
ROUNDING_IMAGES = 8
"""Number of images on which the rounding error of the extraction's dtype is measured, relative to float32."""
IMAGES_PER_CHUNK = 1024
"""Largest number of images in a chunk, unless a batch has more. One chunk is held in memory at a time."""
BYTES_PER_CHUNK = 2**27
"""Largest number of bytes of activations in a chunk of more than a batch, which may limit its images further."""


def _ignore(shard: int, n_images: int) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class ShardJob:
    """The job that executors call for each shard. It is small enough to be sent to any worker."""

    params: str
    """`ExtractParams` as JSON."""
    images: str
    """Path or URL of the images artefact."""
    digest: str
    """Digest of the images artefact from which the plan was made."""
    draft: str
    """Path or URL of the draft of the extraction."""
    probe: tuple[float, ...]
    """Probe of the driver's networks (see `Networks.probe`)."""
    cache: Place | None = None
    """Where outputs of images are found again; None if they are not cached."""
    on_chunk: Callable[[int, int], None] = field(default=_ignore, compare=False)
    """Called with the shard and the number of its images that are done. It is called in this process only, and not pickled."""

    def __call__(self, shard: int) -> None:
        """Make one shard, unless its receipt exists.

        Raises:
            OmmatidError: An input is missing or damaged, the disk is full, or a model cannot be loaded.
        """
        worker = load_worker(replace(self, on_chunk=_ignore))
        if not worker.draft.has(receipt_name(shard)):
            _Shard(worker, shard, self.on_chunk).make()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardJob, (self.params, self.images, self.digest, self.draft, self.probe, self.cache)

    @property
    def key(self) -> str:
        """Digest of everything that determines the content of a shard, besides its index."""
        return hashlib.sha256(repr((self.params, self.digest, self.probe)).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Worker:
    """State that a worker process keeps between shards: opened inputs and loaded networks."""

    params: ExtractParams
    images: Artefact
    draft: Writer
    towers: Networks
    cache: OutputCache
    """Outputs of images that earlier runs computed."""
    notices: list[str]
    """Notices for the driver, which the next receipt will pass on."""
    pool: Executor
    """Pool that decodes images."""
    key: str
    """Key of the job."""


_workers: dict[ShardJob, Worker] = {}
"""The worker of the job that this process ran last, if any."""


def load_worker(job: ShardJob) -> Worker:
    """Return the worker of a job, after opening inputs and loading networks if this process has not done so yet.

    Raises:
        OmmatidError: An input is missing, damaged, or has changed since the plan was made; or a model cannot be loaded, lacks what the
            params name, or has weights that differ from the driver's.
    """
    if job not in _workers:
        drop_worker()
        towers = Networks(ExtractParams.model_validate_json(job.params))
        if not is_same(towers.probe(), list(job.probe)):
            raise ModelError(
                f"{towers.model.name}: its weights here differ from those where the run was started; give all workers the same files"
            )
        keep_worker(job, towers)
    return _workers[job]


def keep_worker(job: ShardJob, towers: Networks) -> None:
    """Make this process's worker from networks that are already loaded.

    Raises:
        ArtefactError: The images are missing, damaged, or have changed since the plan was made.
    """
    images = open_artefact(job.images, "images")
    if images.digest != job.digest:
        raise ArtefactError(f"{job.images}: changed since this extraction was planned; run the stage again")
    notices: list[str] = []
    cache = OutputCache(job.cache, towers, notices.append)
    _workers[job] = Worker(towers.params, images, Draft.attach(job.draft), towers, cache, notices, make_pool(towers.device), job.key)


def drop_worker() -> None:
    """Release the worker's networks and stop its decoding processes."""
    for worker in _workers.values():
        worker.pool.shutdown(cancel_futures=True)
    _workers.clear()


def receipt_name(shard: int) -> str:
    """Return the name of a shard's receipt, which lists what the shard wrote and marks it as done."""
    return f"{RECEIPTS}/{shard:07d}.json"


class _Shard:
    """One shard in the making."""

    def __init__(self, worker: Worker, index: int, on_chunk: Callable[[int, int], None]) -> None:
        self._worker = worker
        self._towers = worker.towers
        self._index = index
        self._on_chunk = on_chunk
        self._chunks = divide(shard_blocks(worker.draft.read(PLAN, [("shard", "=", index)])), self._images_per_chunk)
        self._sizes = [sum(run.n_images for run in chunk) for chunk in self._chunks]
        self._spill = Spill(worker.draft.scratch / f"shard-{index:07d}-{worker.key}")
        self._groups = {
            name: Groups.of(sum(self._sizes), len(picker.places), picker.hookpoint.d_model, worker.params.sample)
            for name, picker in self._towers.pickers.items()
        }

    def make(self) -> None:
        """Collect the outputs of the missing chunks, then write the files and the receipt."""
        missing = {i: chunk for i, chunk in enumerate(self._chunks) if not self._spill.has(i)}
        with _Background() as background:
            worker = self._worker
            images = ShardImages(worker.images, missing)
            outputs = ShardOutputs(images, worker.towers, worker.cache, worker.pool, background.submit)
            for i, chunk in outputs:
                background.submit(self._spill.write, i, self._tables(i, chunk))
                self._on_chunk(self._index, sum(self._sizes[: i + 1]))
        receipt = {
            "hookpoints": {name: self._write_activations(name) for name in self._towers.pickers},
            EMBEDDINGS: self._write_embeddings(),
            "rounding": self._measure_rounding() if self._index == 0 else None,
            "reused": {
                "found": sum(self._sizes[i] for i in missing) - outputs.n_forwarded,
                "computed": outputs.n_forwarded,
                "notices": list(worker.notices),
            },
        }
        self._worker.draft.write_json(receipt_name(self._index), receipt)
        self._spill.drop()
        worker.notices.clear()
        worker.cache.merge()

    @property
    def _images_per_chunk(self) -> int:
        per_image = sum(len(picker.places) * picker.hookpoint.d_model * 2 for picker in self._towers.pickers.values())
        most, batch = min(IMAGES_PER_CHUNK, max(1, BYTES_PER_CHUNK // per_image)), self._worker.params.batch_size
        return max(batch, most // batch * batch)  # Whole batches, so that none but the last of a shard is padded.

    def _tables(self, chunk: int, outputs: ChunkOutputs) -> dict[str, list[pa.RecordBatch]]:
        numbers, is_train, towers = outputs.numbers, outputs.is_train, self._towers
        judges = [outputs.of[output] for output in towers.judged]
        tables = {EMBEDDINGS: [embeddings_batch(numbers, outputs.of[towers.joint], judges)]}
        for name, output in towers.captured.items():
            tokens = outputs.of[output]
            tables[f"{name}.eval"] = [rows_batch(numbers[~is_train], tokens[torch.from_numpy(~is_train)])]
            # The seed is the same for every hookpoint, so that all keep the same tokens.
            rng = np.random.default_rng([SEED, self._index, chunk])
            params = self._worker.params
            kept = draw_kept(tokens := tokens[torch.from_numpy(is_train)], params.sample, params.max_norm, rng)
            tables[f"{name}.train"] = split_rounds(numbers[is_train], tokens, kept, rng, self._groups[name])
        return tables

    def _write_activations(self, name: str) -> dict[str, Any]:
        """Write the training and evaluation rows of a hookpoint in their final order, and return the receipt's part about them."""
        picker, n_chunks, n_groups = self._towers.pickers[name], len(self._chunks), self._groups[name].n
        schema = schemas.activations(picker.hookpoint.d_model, {"model": self._towers.model.name, "hookpoint": name})
        eval_rows = (pa.Table.from_batches([self._spill.read(i, f"{name}.eval")]) for i in range(n_chunks))
        counter = WindowCounter()
        train_rows = (counter.add(rows) for rows in iter_in_order(self._spill, f"{name}.train", n_chunks, n_groups))
        files = [
            self._write(f"{name}/", table, (activation_table(rows, picker.places, schema) for rows in tables), schema)
            for table, tables in (("train", train_rows), ("eval", eval_rows))
        ]
        return {"files": files, "window": counter.window}

    def _write_embeddings(self) -> dict[str, Any]:
        """Write the embeddings into every hookpoint's artefact, and return the receipt's part about them."""
        failed = FailureCounter(len(self._towers.judges))
        tables = (failed.add(pa.Table.from_batches([self._spill.read(i, EMBEDDINGS)])) for i in range(len(self._chunks)))
        first, *others = self._towers.pickers
        schema = schemas.embeddings(self._towers.d_joint, *(judge.d_embed for judge in self._towers.judges))
        file = self._write(f"{first}/", EMBEDDINGS, tables, schema)
        for other in others:
            self._worker.draft.share(f"{first}/{file['name']}", f"{other}/{file['name']}")
        return {"files": [file], "failed": list(failed.counts.values())}

    def _write(self, folder: str, table: str, tables: Iterable[pa.Table], schema: pa.Schema) -> dict[str, Any]:
        """Write one file of a hookpoint's artefact, and return its description under its name in the artefact."""
        name = part_name(table, self._index)
        file = write_rows(self._worker.draft, folder + name, tables, schema)
        return asdict(replace(file, name=name))

    def _measure_rounding(self) -> dict[str, float]:
        """Return the rounding error at each hookpoint on a few images (see `Networks.rounding`)."""
        worker, towers = self._worker, self._towers
        if towers.is_exact:
            return dict.fromkeys(towers.pickers, 0.0)
        images = ShardImages(worker.images, {0: self._chunks[0]})
        digests = images.chunks[0].digests[:ROUNDING_IMAGES]

        def measure() -> dict[str, float]:
            places = [(0, i) for i in range(len(digests))]
            encoded = images.iter_encoded([(places, (towers.model.preprocess,))])
            (pixels,) = iter_pixels(encoded, (), worker.pool, "cpu")
            return towers.rounding(pixels.of[0])

        return worker.cache.rounding(digests, measure)


class _Background:
    """A thread that calls functions in order, at most one of which waits for another to end; errors are raised by later calls."""

    def __enter__(self) -> "_Background":
        self._pool, self._last = ThreadPoolExecutor(1), None
        return self

    def submit(self, function: Callable[..., object], *arguments: Any) -> None:
        """Wait until the last function has returned, and begin to call another."""
        self._wait()
        self._last = self._pool.submit(function, *arguments)

    def _wait(self) -> None:
        last: Future[object] | None
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._pool:
            if kind is None:
                self._wait()
