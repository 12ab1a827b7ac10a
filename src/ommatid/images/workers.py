"""Decoding of new images by the workers of an executor, which fills the memory from which this process then makes the data set.

Workers read the source under the same path or URL as this process, and leave what they find in the draft. The result does not depend on
them: what they did not find, this process decodes itself.
"""

import functools
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ommatid import executors
from ommatid.config import ImagesParams
from ommatid.errors import ExecutorError
from ommatid.images.decode import Unreadable
from ommatid.images.examine import Earlier, look
from ommatid.images.memory import Memory, Seen
from ommatid.images.source import Item, Source, open_source
from ommatid.store import RECEIPTS, Draft, Writer, part_name

PER_SHARD = 256
"""Number of images that a worker decodes before it writes what it found."""
_N_THREADS = 4
"""Threads of a worker: enough to decode some images while others are fetched."""
_POSITIONS = f"{RECEIPTS}/positions.json"
"""Positions of the items that are dealt, and the sha256 of contents that are remembered."""
_FOUND = pa.schema([
    pa.field("path", pa.string()),
    pa.field("token", pa.binary()),
    pa.field("image_id", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("thumbnail", pa.binary()),
    pa.field("remarks", pa.list_(pa.string())),
    pa.field("reason", pa.string()),
    pa.field("detail", pa.string()),
])  # fmt: skip


def look_elsewhere(
    params: ImagesParams,
    source: Source,
    positions: Sequence[int],
    draft: Draft,
    memory: Memory,
    earlier: Earlier,
    on_done: Callable[[int, int], None],
) -> None:
    """Let the workers of `params.executor` decode the images that are not remembered, and remember what they find.

    Args:
        params: The `images` section of the params.
        source: The source.
        positions: Positions of its items.
        draft: Draft of the data set, through which the workers answer.
        memory: What earlier runs found, to which the new findings are added.
        earlier: The artefact that is about to be replaced. Its images are not decoded again if they are remembered.
        on_done: Called with the number of images that are done, and that of all that are dealt to workers.

    Raises:
        ExecutorError: No cluster answers, its workers run other versions, or the workers of one shard died repeatedly.
        OmmatidError: Workers cannot read the source, or the draft cannot be written.
    """
    new, items, known = list(positions), {}, list[str]()
    if not params.source.has_files:  # Its items can only be told once they are read, which the workers do.
        known = [image_id for image_id in earlier.image_ids if memory.find(image_id)]
    else:
        found = {at: item for at, item in zip(positions, source.iter_items(positions), strict=True) if _is_new(item, memory)}
        new, items = list(found), {item.path: item for item in found.values()}
    draft.remove(RECEIPTS)
    draft.write_json(_POSITIONS, [new, known])
    n_done = 0

    def collect(shard: int) -> None:
        nonlocal n_done
        name = _answer(shard)
        for row in draft.read(name).to_pylist():
            _remember(row, items, memory)
        memory.flush()
        draft.remove(name)
        n_done += len(new[shard * PER_SHARD : (shard + 1) * PER_SHARD])
        on_done(n_done, len(new))

    try:
        job = LookJob(
            params.model_dump_json(), draft.url, hashlib.sha256(repr((source.fingerprint, new, known)).encode()).hexdigest(), PER_SHARD
        )
        executors.run(params.executor, job, range(-(-len(new) // PER_SHARD)), collect)
    except ExecutorError as error:
        raise ExecutorError(str(error).replace("extract.executor", "images.executor")) from None


def _is_new(item: Item, memory: Memory) -> bool:
    known = memory.content_of(item.token)
    return known is None or memory.find(known) is None


def _remember(row: Mapping[str, Any], items: Mapping[str, Item], memory: Memory) -> None:
    if row["image_id"] is None:  # It could not be read there, or is remembered here.
        return
    item = items.get(row["path"])
    if row["reason"] is None:
        found = Seen(row["width"], row["height"], row["thumbnail"], tuple(row["remarks"]))
    else:
        found = Unreadable(row["reason"], row["detail"])
    is_same = item is not None and _as_bytes(item.token) == row["token"]  # and not another file that is there under this path
    memory.add(item.token if item and is_same else "", row["image_id"], found)


def _as_bytes(token: str) -> bytes:
    return token.encode("utf-8", "surrogateescape")


def _answer(shard: int) -> str:
    return f"{RECEIPTS}/{part_name('looked', shard)}"


@dataclass(frozen=True)
class LookJob:
    """The job that executors call for each shard."""

    params: str
    """`ImagesParams` as JSON."""
    draft: str
    """Path or URL of the draft."""
    key: str
    """Digest of the source and of what is dealt, by which a worker that stays knows that they are others."""
    per_shard: int
    """Number of images of a shard."""

    def __call__(self, shard: int) -> None:
        """Decode the images of a shard, and write what was found.

        Raises:
            OmmatidError: The source cannot be read, or the draft cannot be written.
        """
        params, source, positions, known, draft = _open(self)
        mine = positions[shard * self.per_shard : (shard + 1) * self.per_shard]
        with ThreadPoolExecutor(_N_THREADS) as pool:
            rows = list(pool.map(functools.partial(_look, params.thumbnail, known), source.iter_items(mine)))
        draft.write_table(_answer(shard), pa.Table.from_pylist(rows, schema=_FOUND))


@functools.lru_cache(1)
def _open(job: LookJob) -> tuple[ImagesParams, Source, list[int], frozenset[str], Writer]:
    params, draft = ImagesParams.model_validate_json(job.params), Draft.attach(job.draft)
    positions, known = draft.read_json(_POSITIONS)
    return params, open_source(params.source), positions, frozenset(known), draft


def _look(thumbnail: int, known: Collection[str], item: Item) -> dict[str, Any]:
    """Return a row of the answer."""
    row: dict[str, Any] = {"path": item.path}
    try:
        encoded = item.read()
        image_id = hashlib.sha256(encoded).hexdigest()
        if image_id in known:
            return row
        found = look(encoded, thumbnail)
    except (OSError, Unreadable):  # This process will find out itself, and report it.
        return row
    token = item.token if item.is_unchanged() else ""
    row |= {"token": _as_bytes(token), "image_id": image_id}
    if isinstance(found, Unreadable):
        return row | {"reason": found.reason, "detail": found.detail}
    return row | vars(found)
