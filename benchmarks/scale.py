"""Measures time and memory of planning and merging an extraction of a million shards, without running any image.

python benchmarks/scale.py [shards]     needs 2 inodes per shard in $TMPDIR; writes benchmarks/results/scale.json
Blocks, receipts and (empty) files are made up; planning, the lookup of a shard's lines, merging, the manifest and opening are the
stage's own code.
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from report import Row, publish

from ommatid import store
from ommatid.extract.plan import IMAGES_PER_SHARD, make_plan, shard_blocks
from ommatid.extract.receipts import merge
from ommatid.extract.shard import EMBEDDINGS, PLAN, receipt_name
from ommatid.store import part_name
from ommatid.store.writer import _sum_of

IMAGES_PER_BLOCK = 128
BLOCKS_PER_FILE = 32
T = TypeVar("T")


class Clock:
    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __call__(self, what: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = work()
        self.rows.append(Row(what, time.perf_counter() - start, "s", better="lower"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{what}: {self.rows[-1].value:.1f} s, peak so far {peak:.0f} MB", flush=True)
        return result


def make_blocks(n_shards: int) -> np.ndarray:
    n = n_shards * IMAGES_PER_SHARD // IMAGES_PER_BLOCK
    index = np.arange(n, dtype=np.int32)
    return np.stack([index // BLOCKS_PER_FILE, index % BLOCKS_PER_FILE, np.full(n, IMAGES_PER_BLOCK, np.int32)], axis=1)


def write_receipts(draft: store.Draft, n_shards: int) -> None:
    """Write a receipt for each shard, and the files that it lists, all empty."""
    for folder in ("receipts", "block"):
        (draft.path / folder).mkdir(exist_ok=True)
    for shard in range(n_shards):
        names = [part_name(table, shard) for table in ("train", "eval", EMBEDDINGS)]
        files = [{"name": name, "bytes": 0, "rows": 8192, "sha256": f"{shard:064x}", "blocks": ""} for name in names]
        activations = {"files": files[:2], "window": 6144}
        receipt = {"hookpoints": {"block": activations}, EMBEDDINGS: {"files": files[2:], "failed": [0]}, "rounding": None}
        # as `Writer.write_json` does, but without an fsync for each
        text = json.dumps({"value": receipt, "checksum": _sum_of(receipt)})
        (draft.path / receipt_name(shard)).write_text(text, encoding="utf-8")
        for name in names:
            os.close(os.open(draft.path / "block" / name, os.O_CREAT | os.O_WRONLY))


def write_plan(draft: store.Draft, n_shards: int, clock: Clock) -> None:
    blocks = make_blocks(n_shards)
    plan = clock(f"plan of {n_shards:,} shards ({len(blocks):,} blocks)", lambda: make_plan(blocks))
    clock("write the plan", lambda: draft.write_table(PLAN, plan, row_group_size=2**16))


def write_manifest(draft: store.Draft, n_shards: int, clock: Clock) -> None:
    merged = clock("merge the receipts", lambda: merge(draft, ["block"], n_shards))["block"]
    counts = {"n_train_tokens": merged.n_tokens["train"], "n_eval_tokens": merged.n_tokens["eval"], "window": merged.window}
    clock("check the files, write the manifest", lambda: draft.child("block", "activations").seal(counts, merged.files))


def run(folder: Path, n_shards: int) -> list[Row]:
    clock = Clock()
    with store.open_draft(folder / "activations", "extraction", {}, {}) as draft:
        write_plan(draft, n_shards, clock)
        found = clock("one worker finds its shard's lines", lambda: shard_blocks(draft.read(PLAN, [("shard", "=", n_shards // 2)])))
        assert sum(block.n_images for block in found) >= IMAGES_PER_SHARD - IMAGES_PER_BLOCK
        clock("(making up receipts and files)", lambda: write_receipts(draft, n_shards))
        names = clock("list the receipts", lambda: draft.names("receipts"))
        assert len(names) == n_shards
        write_manifest(draft, n_shards, clock)
        clock("seal the whole", lambda: draft.seal({}))
        clock("publish", lambda: draft.publish(folder / "activations"))
    opened = clock("open the artefact, every size checked", lambda: store.open_artefact(folder / "activations/block", "activations"))
    size = (folder / "activations/block/manifest.json").stat().st_size
    assert opened.rows("train") == 8192 * n_shards
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [*clock.rows, Row("manifest", size / 1e6, "MB", better="lower"), Row("peak memory", peak, "MB", better="lower")]


def main() -> None:
    n_shards = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        rows = run(Path(folder), n_shards)
        publish("scale", rows, ["ommatid", "numpy", "pyarrow"], [f"{n_shards:,} shards of {IMAGES_PER_SHARD} images"])


if __name__ == "__main__":
    main()
