"""Stage `extract` with `source: files`, which imports activations that were made elsewhere. See docs/users/activations.md.

Every file is divided into blocks of consecutive entries, which are dealt to shards at random. The files are read once, in order: each
block is checked, converted to float16, put into random rounds (see extract/rows.py) and spilled to its shard. Then each shard is written.
Memory use therefore does not depend on the number of rows or files, and an interrupted run continues after its last block or shard that is
complete.
"""

import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ommatid import schemas
from ommatid.activations.columns import to_binary
from ommatid.config import ExtractFiles
from ommatid.errors import ArtefactError, ConfigError, SourceError
from ommatid.events import Listener, Progress, Warned, ignore
from ommatid.extract.from_files.base import ActivationFile
from ommatid.extract.from_files.formats import open_files
from ommatid.extract.from_files.plan import FileBlock, FilePlan, places_in_runs
from ommatid.extract.plan import SEED
from ommatid.extract.rows import BYTES_PER_ROW_GROUP, Groups, Spill, WindowCounter, iter_in_order, write_rows
from ommatid.store import RECEIPTS, SCRATCH, Artefact, Draft, File, part_name
from ommatid.store.caches import activations_to_remove
from ommatid.store.filesystem import in_words
from ommatid.summaries import ActivationsSummary, ExtractionSummary

LARGEST = 65504.0
"""Largest finite number in float16."""
_SOURCE = f"{SCRATCH}/source.json"


def import_files(params: ExtractFiles, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Import activations, without any embeddings.

    Args:
        params: The `extract` section of the params.
        inputs: Not used, because an import has no inputs.
        draft: Draft of the extraction.
        on_event: Called with each progress event and warning.

    Returns:
        The sealed extraction, with one artefact of activations.

    Raises:
        SourceError: The files break the contract of docs/users/activations.md, or hold values that float16 cannot represent.
        ConfigError: `extract.name` is the name of a folder that Ommatid uses itself.
    """
    if params.name in (SCRATCH, RECEIPTS):
        raise ConfigError(f"extract.name: {params.name!r} is a folder that Ommatid uses itself; call the activations something else")
    files, notices = open_files(params.path, params.key)
    for notice in notices:
        on_event(Warned(notice))
    plan = FilePlan(files)
    if not files[0].has_images and len(files[0].shape) == 2:
        on_event(
            Warned(f"{params.path}: the files do not say which image a row comes from, so each of {plan.n_rows} rows counts as an image")
        )
    _begin_or_continue(draft, params.name, files)
    _Import(params, files, plan, draft, on_event).make()
    shards = list(draft.iter_json([_receipt(shard) for shard in range(len(plan.shards))]))
    written = [File(**file) for shard in shards for file in shard["files"]]
    window = min(shard["window"] for shard in shards)
    draft.child(params.name, "activations").seal(_summarise(params, files[0], plan, written, window), written)
    return draft.seal(ExtractionSummary(source="files", hookpoints=[params.name], n_shards=len(shards), n_images=plan.n_images))


def _summarise(params: ExtractFiles, first: ActivationFile, plan: FilePlan, written: Sequence[File], window: int) -> ActivationsSummary:
    """Return a summary with the same keys as for activations of images. Values that only images could provide are None."""
    per_image = 1 if not first.has_images else None
    n_tokens = {table: sum(file.rows or 0 for file in written if file.name.startswith(f"{table}-")) for table in ("train", "eval")}
    return ActivationsSummary(
        source="files",
        model=params.model,
        judge=None,
        judges=None,
        namer=None,
        hookpoint=params.name,
        d_model=first.shape[-1],
        d_joint=None,
        d_judge=None,
        grid=None,
        tokens_per_image=first.shape[1] if len(first.shape) == 3 else per_image,
        n_images=plan.n_images,
        n_train_tokens=n_tokens["train"],
        n_eval_tokens=n_tokens["eval"],
        window=window,
        rounding=None,
        preprocessing={},
    )


def _begin_or_continue(draft: Draft, name: str, files: Sequence[ActivationFile]) -> None:
    """Keep what an interrupted run left if the files are still the same. Otherwise, empty the draft and start afresh."""
    stats = [(path, path.stat()) for file in files for path in file.paths]
    facts = [(path.as_posix(), status.st_size, status.st_mtime_ns) for path, status in stats]
    fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()
    if draft.has(_SOURCE) and draft.read_json(_SOURCE) == fingerprint:
        return
    for folder in (name, RECEIPTS):
        draft.remove(folder)
    shutil.rmtree(draft.scratch)
    draft.scratch.mkdir()
    draft.write_json(_SOURCE, fingerprint)


def _receipt(shard: int) -> str:
    return f"{RECEIPTS}/{shard:07d}.json"


class _Import:
    """One import, from files to shards."""

    def __init__(self, params: ExtractFiles, files: Sequence[ActivationFile], plan: FilePlan, draft: Draft, on_event: Listener) -> None:
        self._params = params
        self._files = files
        self._plan = plan
        self._draft = draft
        self._on_event = on_event
        shards = range(len(plan.shards))
        done = draft.whole_receipts(map(_receipt, shards), self._iter_files)
        self._missing = [shard for shard in shards if _receipt(shard) not in done]
        self._spills = {shard: Spill(draft.scratch / f"shard-{shard:07d}") for shard in self._missing}
        self._groups = {shard: _groups(plan.shards[shard], plan.d_model) for shard in self._missing}

    def _iter_files(self, receipt: dict[str, Any]) -> Iterator[File]:
        """Yield the files that a receipt describes, under their names in the draft."""
        return (File(**(values | {"name": f"{self._params.name}/{values['name']}"})) for values in receipt["files"])

    def make(self) -> None:
        """Read, check and spill the missing blocks, then write the missing shards.

        Raises:
            SourceError: Float16 cannot represent some values. The message names the files, the first such row, and the number of rows.
        """
        places = {block: (shard, chunk) for shard in self._missing for chunk, block in enumerate(self._plan.shards[shard])}
        wanted = {block: place for block, place in places.items() if not self._spills[place[0]].has(place[1])}
        self._check_disk_space(wanted)
        self._read(wanted)
        for n, shard in enumerate(self._missing, start=1):
            self._write(shard)
            self._on_event(Progress("write shards", n, len(self._missing)))

    def _check_disk_space(self, wanted: Mapping[FileBlock, Any]) -> None:
        per_row = 2 * self._plan.d_model + _BESIDE
        largest = max((sum(block.n_rows for block in self._plan.shards[shard]) for shard in self._missing), default=0)
        need = (sum(block.n_rows for block in wanted) + largest) * per_row
        free = shutil.disk_usage(self._draft.scratch).free
        if need > free:
            raise ArtefactError(
                f"{self._draft.scratch}: the import needs {in_words(need)}, but only {in_words(free)} is free; make room"
                f"{activations_to_remove(self._draft.scratch)}, or point extract.path at fewer files"
            )

    def _read(self, wanted: Mapping[FileBlock, tuple[int, int]]) -> None:
        """Read every file once, in order, and spill the wanted blocks to their shard and chunk."""
        damage: list[str] = []
        done = len(self._plan.blocks) - len(wanted)
        for index, blocks in groupby(sorted(wanted, key=lambda block: (block.file, block.index)), lambda block: block.file):
            file, bad = self._files[index], _BadRows(self._plan.tokens)
            of_piece = {block.index: block for block in blocks}
            for i, x, images in file.iter_pieces(self._plan.entries, of_piece):
                start = i * self._plan.entries
                if not bad.add(start, x) and not damage:
                    entries = np.arange(start, start + len(x)) + self._plan.starts[index] if images is None else images
                    self._spill(*wanted[of_piece[i]], entries, places_in_runs(entries, of_piece[i].before), x)
                done += 1
                self._on_event(Progress("read blocks", done, len(self._plan.blocks)))
            damage += [f"{file.path}: {bad}"] if bad else []
        if damage:
            more = f"; and {len(damage) - _SHOWN} more files" if len(damage) > _SHOWN else ""
            raise SourceError(
                f"activations that cannot be stored as float16: {'; '.join(damage[:_SHOWN])}{more}; correct or remove these rows"
            )

    def _spill(self, shard: int, chunk: int, entries: np.ndarray, place: np.ndarray, x: Tensor) -> None:
        """Spill the rows of a block to its shard: training rows in random rounds, evaluation rows in their original order.

        Args:
            shard: Index of the shard.
            chunk: Index of the block in the shard.
            entries: Image of each entry, `(entries,)`.
            place: Index of each entry within its image's run of entries, `(entries,)`.
            x: Activations, `(entries, ..., d_model)`.
        """
        image = entries.repeat(self._plan.tokens)
        token = (place[:, None] * self._plan.tokens + np.arange(self._plan.tokens)).reshape(-1)
        rows = x.reshape(-1, self._plan.d_model).half()
        is_held_out = is_eval(image, self._params.eval_share)
        eval_rows, train_rows = is_held_out.nonzero()[0], (~is_held_out).nonzero()[0]
        order, parts = self._groups[shard].split(image[train_rows], np.random.default_rng([SEED, shard, chunk]))
        train = []
        for part in parts:
            columns = _columns(image[train_rows[part]], token[train_rows[part]], rows[torch.from_numpy(train_rows[part])])
            extra = {"round": order.round[part], "stratum": order.stratum[part], "draw": order.draw[part]}
            train.append(pa.RecordBatch.from_pydict(columns | {name: pa.array(values) for name, values in extra.items()}))
        held_out = pa.RecordBatch.from_pydict(_columns(image[eval_rows], token[eval_rows], rows[torch.from_numpy(eval_rows)]))
        self._spills[shard].write(chunk, {"train": train, "eval": [held_out]})

    def _write(self, shard: int) -> None:
        spill, n_chunks = self._spills[shard], len(self._plan.shards[shard])
        schema = schemas.activations(self._plan.d_model, {"model": self._params.model, "hookpoint": self._params.name})
        draft = self._draft.child(self._params.name, "activations")
        counter = WindowCounter()
        tables = {
            "train": (counter.add(rows) for rows in iter_in_order(spill, "train", n_chunks, self._groups[shard].n)),
            "eval": (pa.Table.from_batches([spill.read(chunk, "eval")]) for chunk in range(n_chunks)),
        }
        files = [
            write_rows(draft, part_name(table, shard), (_activations(rows, schema) for rows in found), schema)
            for table, found in tables.items()
        ]
        self._draft.write_json(_receipt(shard), {"files": [asdict(file) for file in files], "window": counter.window})
        spill.drop()


_BESIDE = 29
"""Bytes of a spilled row besides its vector."""
_SHOWN = 3
"""Number of files with bad rows that an error message names. The rest are counted."""


def _groups(blocks: Sequence[FileBlock], d_model: int) -> Groups:
    """Return row groups of whole rounds, of about `BYTES_PER_ROW_GROUP` bytes each."""
    most = max(block.most for block in blocks)
    n_bytes = sum(block.n_rows for block in blocks) * d_model * 2
    return Groups(most, math.ceil(most / max(1, n_bytes // BYTES_PER_ROW_GROUP)))


def _columns(image: np.ndarray, token: np.ndarray, x: Tensor) -> dict[str, pa.Array]:
    return {"image": pa.array(image, pa.int32()), "token": pa.array(token, pa.int32()), "x": to_binary(x, torch.float16)}


def _activations(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Convert rows to the schema of the artefact, in which imported tokens have no place in the image."""
    n = len(rows)
    nowhere = pa.array(np.full(n, -1), pa.int16())
    columns = {"kind": pa.array(["imported"] * n, pa.string()), "row": nowhere, "col": nowhere}
    return pa.table([columns.get(name) if name in columns else rows[name] for name in schema.names], schema=schema)


def is_eval(image: np.ndarray, share: float) -> np.ndarray:
    """Return which images are held out for evaluation.

    The choice depends on an image's number alone, so that the image stays in its split when others are added or removed. Numbers are
    hashed with the finaliser of SplitMix64 (doi 10.1145/2714064.2660195).

    Args:
        image: Numbers of images, `(images,)`.
        share: Share of the images to hold out, from 0 to 1.

    Returns:
        Whether each image is held out, `(images,)` bool.
    """
    x = image.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) / 2**64 < share


class _BadRows:
    """Counts the rows of one file that float16 cannot represent."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._counts = dict.fromkeys(("NaN", "infinity", f"more than {LARGEST:.0f}"), 0)
        self._first: int | None = None

    def add(self, start: int, x: Tensor) -> bool:
        """Count the bad rows among the entries from `start` on, and return whether there are any."""
        top = x.reshape(-1, x.shape[-1]).abs().amax(1)  # NaN for rows that contain one.
        bad = (~(top <= LARGEST)).nonzero()[:, 0]
        if not len(bad):
            return False
        found = top[bad]
        for name, mask in zip(self._counts, (found.isnan(), found.isinf(), found.isfinite()), strict=True):
            self._counts[name] += int(mask.sum())
        if self._first is None:
            self._first = start * self._tokens + int(bad[0])
        return True

    def __bool__(self) -> bool:
        return self._first is not None

    def __str__(self) -> str:
        assert self._first is not None
        entry, token = divmod(self._first, self._tokens)
        where = f"row {entry}" + (f" token {token}" if self._tokens > 1 else "")
        return ", ".join(f"{n} with {name}" for name, n in self._counts.items() if n) + f" (first: {where})"
