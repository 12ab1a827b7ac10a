"""Stage `extract`: images through the model and the judge, activations and embeddings out.

Images go through in chunks. A chunk's training tokens wait, permuted, in a scratch file; at the end every part takes a slice of
every chunk and is permuted again, so that training reads sequentially and still sees mixed batches. A run that died goes on
after the last whole chunk. Memory: one chunk, or one part.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ommatid import schemas
from ommatid.config import ExtractParams
from ommatid.errors import ModelError
from ommatid.events import Listener, Progress, ignore
from ommatid.images import decode
from ommatid.store import Artefact, Draft, part_name
from ommatid.tensors import to_binary
from ommatid.vlm import Captured, Hookpoint, Judge, VisionModel, check_hookpoint, load_judge, load_model

IMAGES_PER_CHUNK = 1024
"""What a killed run loses at most."""
PART_BYTES = 64 * 2**20
"""Size of a part of the training table, about."""
SHUFFLE_SEED = 0
"""The order of the rows is a function of the data alone."""


def extract(params: ExtractParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Capture activations at `params.hookpoint` for every image, and embed it with the model and the judge.

    Raises:
        ModelError: unknown hookpoint, or a model that cannot be loaded or lacks the tokens asked for.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(params.model, params.dtype, device)
    hookpoint = check_hookpoint(model, params.hookpoint)
    picker = TokenPicker(params.tokens, hookpoint)
    judge = load_judge(params.judge, params.dtype, device)
    tower = _Towers(model, judge, params.hookpoint, picker, device)
    schema = schemas.activations(hookpoint.d_model, {"model": model.name, "hookpoint": params.hookpoint})
    images = inputs["images"]
    n_chunks = 0
    for index, chunk in enumerate(_iter_chunks(images)):
        if not _is_done(draft, index):
            _write_chunk(draft, index, _run_chunk(tower, chunk, params.batch_size), schema)
        n_chunks = index + 1
        on_event(Progress("extract images", min(n_chunks * IMAGES_PER_CHUNK, images.rows("images")), images.rows("images")))
    _write_train(draft, n_chunks, schema)
    return draft.seal(_summarise(params, model, judge, hookpoint, picker, images))


@dataclass(frozen=True)
class TokenPicker:
    """Which tokens of a forward pass are kept, and where they are: the policy `extract.tokens`."""

    policy: str
    """pooled, patch, cls or all."""
    hookpoint: Hookpoint

    def __post_init__(self) -> None:
        """Refuse a policy that the hookpoint cannot serve."""
        lacks_cls = self.policy == "cls" and not self.hookpoint.has_cls
        if lacks_cls or (self.policy in ("patch", "pooled") and self.hookpoint.grid is None):
            has = [p for p, ok in (("cls", self.hookpoint.has_cls), ("patch", self.hookpoint.grid), ("pooled", self.hookpoint.grid)) if ok]
            raise ModelError(f"extract.tokens: {self.policy!r} is not at this hookpoint; it has {', '.join([*has, 'all'])}")

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the kept patches; None when no kept token has a place."""
        return self.hookpoint.grid if self.policy in ("patch", "all") else None

    @property
    def places(self) -> list[tuple[int, str, int, int]]:
        """(token, kind, row, col) of each kept token, in the order of `pick`."""
        if self.policy == "pooled":
            return [(0, "pooled", -1, -1)]
        first_patch = int(self.hookpoint.has_cls)
        cls = [(0, "cls", -1, -1)] if self.hookpoint.has_cls and self.policy in ("cls", "all") else []
        rows, cols = self.grid or (0, 0)
        return cls + [(first_patch + r * cols + c, "patch", r, c) for r in range(rows) for c in range(cols)]

    def pick(self, captured: Captured) -> Tensor:
        """The kept tokens, (batch, tokens, d_model)."""
        if self.policy == "pooled":
            assert captured.patches is not None
            return captured.patches.mean((1, 2))[:, None]
        pieces = []
        if self.policy in ("cls", "all") and captured.cls is not None:
            pieces.append(captured.cls[:, None])
        if self.policy in ("patch", "all") and captured.patches is not None:
            pieces.append(captured.patches.flatten(1, 2))
        return torch.cat(pieces, dim=1)


@dataclass(frozen=True)
class _Towers:
    """The model and the judge on one device."""

    model: VisionModel
    judge: Judge
    hookpoint: str
    picker: TokenPicker
    device: str

    def prepare(self, encoded: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Decode once, preprocess for both."""
        image = decode(encoded)
        for_model = self.model.preprocess(image)
        same = self.model.preprocess == self.judge.preprocess
        return for_model, for_model if same else self.judge.preprocess(image)

    def run(self, prepared: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (batch, tokens, d_model) float16, joint and judge embeddings (batch, width) float32, on the CPU."""
        for_model, for_judge = (torch.from_numpy(np.stack(pixels)).to(self.device) for pixels in zip(*prepared, strict=True))
        captured = self.model.capture(for_model, self.hookpoint)
        tokens = self.picker.pick(captured)
        judged = self.judge.embed(for_judge)
        return tokens.to("cpu", torch.float16), _unit(captured.embedding), _unit(judged)


@dataclass
class _Chunk:
    """What was computed for up to IMAGES_PER_CHUNK images, in image order."""

    images: np.ndarray
    is_train: np.ndarray
    places: list[tuple[int, str, int, int]]
    tokens: list[Tensor] = field(default_factory=list)
    joint: list[Tensor] = field(default_factory=list)
    judge: list[Tensor] = field(default_factory=list)


def _run_chunk(towers: _Towers, chunk: pa.Table, batch_size: int) -> _Chunk:
    """Threads decode and preprocess the next batch while the model computes this one."""
    result = _Chunk(chunk["image"].to_numpy(), np.array(chunk["split"].to_pylist()) == "train", towers.picker.places)
    with ThreadPoolExecutor() as pool:
        prepared = pool.map(towers.prepare, (value.as_py() for value in chunk["encoded"]))
        for batch in _batches(prepared, batch_size):
            tokens, joint, judge = towers.run(batch)
            result.tokens.append(tokens)
            result.joint.append(joint)
            result.judge.append(judge)
    return result


def _write_chunk(draft: Draft, index: int, chunk: _Chunk, schema: pa.Schema) -> None:
    tokens = torch.cat(chunk.tokens)
    joint, judge = torch.cat(chunk.joint), torch.cat(chunk.judge)
    columns = [pa.array(chunk.images, pa.int32()), to_binary(joint, torch.float32), to_binary(judge, torch.float32)]
    embeddings = pa.table(columns, schema=schemas.embeddings(joint.shape[1], judge.shape[1]))
    draft.write_table(part_name("embeddings", index), embeddings, compression="none", use_dictionary=False)
    kept = ~chunk.is_train
    # whole images in every row group: readers take them one image at a time
    whole = {"row_group_size": 1024 * len(chunk.places)}
    draft.write_table(part_name("eval", index), _token_table(chunk, tokens, kept, schema), **whole, **_PARQUET)
    train = _token_table(chunk, tokens, chunk.is_train, schema)
    order = np.random.default_rng([SHUFFLE_SEED, index]).permutation(len(train))
    with draft.write_file(_scratch_name(index)) as path, pa.ipc.new_file(path, schema) as file:
        file.write_table(train.take(order))


_PARQUET: dict[str, Any] = {"compression": "none", "use_dictionary": ["kind"], "write_statistics": False}


def _token_table(chunk: _Chunk, tokens: Tensor, kept: np.ndarray, schema: pa.Schema) -> pa.Table:
    """One row a token of the kept images, in image and token order."""
    n, per_image = int(kept.sum()), len(chunk.places)
    token, kind, row, col = zip(*chunk.places, strict=True)
    columns = [
        pa.array(np.repeat(chunk.images[kept], per_image), pa.int32()),
        pa.array(np.tile(token, n), pa.int32()),
        pa.array(np.tile(kind, n), pa.string()),
        pa.array(np.tile(row, n), pa.int16()),
        pa.array(np.tile(col, n), pa.int16()),
        to_binary(tokens[torch.from_numpy(kept)].flatten(0, 1), torch.float16),
    ]
    return pa.table(columns, schema=schema)


def _write_train(draft: Draft, n_chunks: int, schema: pa.Schema) -> None:
    """Deal every chunk's rows out to the parts, and permute each part."""
    maps = [pa.memory_map(str(draft.path / _scratch_name(i))) for i in range(n_chunks)]
    chunks = [pa.ipc.open_file(mapped).read_all() for mapped in maps]
    n_rows = sum(len(chunk) for chunk in chunks)
    n_parts = max(1, -(-n_rows * schema.field("x").type.byte_width // PART_BYTES))
    for part in range(n_parts):
        if draft.has(part_name("train", part)):
            continue
        slices = [_slice(chunk, part, n_parts) for chunk in chunks]
        table = pa.concat_tables(slices) if slices else schema.empty_table()
        order = np.random.default_rng([SHUFFLE_SEED, n_chunks, part]).permutation(len(table))
        draft.write_table(part_name("train", part), table.take(order), **_PARQUET)
    for mapped in maps:
        mapped.close()


def _slice(table: pa.Table, index: int, n: int) -> pa.Table:
    start, end = len(table) * index // n, len(table) * (index + 1) // n
    return table.slice(start, end - start)


def _iter_chunks(images: Artefact) -> Iterator[pa.Table]:
    """Images in order, IMAGES_PER_CHUNK at a time but for the last."""
    waiting: list[pa.RecordBatch] = []
    for batch in images.iter_batches("images", ["image", "split", "encoded"], n_rows=256):
        waiting.append(batch)
        table = pa.Table.from_batches(waiting)
        if len(table) >= IMAGES_PER_CHUNK:
            yield table.slice(0, IMAGES_PER_CHUNK)
            waiting = table.slice(IMAGES_PER_CHUNK).to_batches()
    rest = pa.Table.from_batches(waiting) if waiting else None
    if rest is not None and len(rest):
        yield rest


def _batches(items: Iterator[Any], n: int) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == n:
            yield batch
            batch = []
    if batch:
        yield batch


def _scratch_name(index: int) -> str:
    return f"scratch/train-{index:05d}.arrow"


def _is_done(draft: Draft, index: int) -> bool:
    """The scratch file is a chunk's last."""
    return draft.has(_scratch_name(index))


def _unit(x_bd: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x_bd.float(), dim=1).cpu()


def _summarise(
    params: ExtractParams, model: VisionModel, judge: Judge, hookpoint: Hookpoint, picker: TokenPicker, images: Artefact
) -> dict[str, Any]:
    n_tokens = len(picker.places)
    return {
        "model": model.name,
        "judge": judge.name,
        "hookpoint": params.hookpoint,
        "d_model": hookpoint.d_model,
        "d_joint": model.d_embed,
        "d_judge": judge.d_embed,
        "grid": picker.grid,
        "tokens_per_image": n_tokens,
        "n_train_tokens": images.summary["n_train"] * n_tokens,
        "n_eval_tokens": images.summary["n_eval"] * n_tokens,
        "preprocessing": dict(model.preprocessing),
    }
