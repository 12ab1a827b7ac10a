"""Disk space of an extraction, computed in advance, so that an extraction is refused if the disk is too small for it."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ommatid.config import ExtractParams
from ommatid.errors import ArtefactError
from ommatid.extract.networks import Networks
from ommatid.extract.plan import IMAGES_PER_SHARD
from ommatid.store import Draft
from ommatid.store.caches import activations_to_remove
from ommatid.store.filesystem import in_words

ROW = 4
"""Bytes of a row besides its vector: those of `image`. The other columns are dictionary-encoded and take next to nothing."""
SPILLED = 29
"""Bytes of a spilled training row besides its vector: those of image, place, round, stratum and draw."""
MARGIN = 1.02
"""Factor that allows for page headers, footers, dictionary indices and manifests."""


@dataclass(frozen=True)
class Size:
    """Disk space that an extraction needs."""

    final: int
    """Bytes of the finished artefacts."""
    spilled: int
    """Bytes of the spilled chunks of the largest shard, while it is being made."""


def size_of(params: ExtractParams, images: Mapping[str, Any], towers: Networks) -> Size:
    """Return the disk space that an extraction needs, including space for tokens that `max_norm` will leave out.

    Args:
        params: The `extract` section of the params.
        images: Summary of the images artefact.
        towers: Networks of the extraction.

    Returns:
        The disk space in bytes.
    """
    n, n_train, n_eval = (images[key] for key in ("n_images", "n_train", "n_eval"))
    embedding = 4 * (1 + towers.d_joint + sum(judge.d_embed for judge in towers.judges))
    tokens = 0.0
    spilled = 0.0
    for picker in towers.pickers.values():
        width, per_image = 2 * picker.hookpoint.d_model, len(picker.places)
        kept = min(per_image, params.sample or per_image)
        tokens += (n_train * kept + n_eval * per_image) * (width + ROW)
        spilled += (n_train * kept + n_eval * per_image) * (width + SPILLED)
    share = min(1.0, IMAGES_PER_SHARD / max(1, n))
    return Size(int((tokens + n * embedding) * MARGIN), int((spilled + n * embedding) * share))


def check_disk_space(draft: Draft, params: ExtractParams, images: Mapping[str, Any], towers: Networks) -> int:
    """Check that an extraction fits on the disk.

    Returns:
        The bytes that will be left free, at least.

    Raises:
        ArtefactError: The disk is too small. The message names the space needed and free, and params that would make it fit.
    """
    size, free = size_of(params, images, towers), shutil.disk_usage(draft.scratch).free
    # If the draft is in an object store, the disk holds a shard's finished files only until they are uploaded.
    final, copies = (0, 2) if "://" in draft.url else (size.final, 1)
    spilled = size.spilled * copies * (params.executor.workers_here or max(1, torch.cuda.device_count()))
    need = final + spilled - _bytes_written(draft.scratch.parent)
    if need <= free:
        return free - need
    ways = []
    if limit := int(images["n_images"] * max(0, free) / need * 0.95):
        ways.append(f"images.limit={limit}")
    most = max(len(picker.places) for picker in towers.pickers.values())
    if sample := int((params.sample or most) * free / need * 0.8):
        ways.append(f"extract.sample={sample} (fewer tokens of each training image)")
    if params.tokens in ("patch", "all") and any(picker.grid for picker in towers.pickers.values()):
        ways.append("extract.tokens=pooled")
    if len(params.hookpoints) > 1:
        ways.append("fewer extract.hookpoints")
    raise ArtefactError(
        f"{draft.url}: extraction needs {in_words(need)} ({in_words(size.final)} of activations and embeddings, "
        f"{in_words(spilled)} while shards are made), but only {in_words(free)} is free; make room"
        + activations_to_remove(draft.scratch)
        + (f", or set {', or '.join(ways)}" if ways else "")
    )


def _bytes_written(folder: Path) -> int:
    """Return the bytes that an earlier run wrote. A file with two names counts once."""
    found = (path.stat() for path in folder.rglob("*") if path.is_file())
    return sum({status.st_ino: status.st_size for status in found}.values())
