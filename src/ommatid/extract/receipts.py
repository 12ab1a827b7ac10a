"""Merging of receipts, each of which lists what one shard wrote."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

from ommatid.extract.shard import EMBEDDINGS, receipt_name
from ommatid.store import Draft, File, part_name


@dataclass
class Merged:
    """The merged receipts of one hookpoint's artefact."""

    files: list[File] = field(default_factory=list)
    """Files of all shards."""
    window: int | None = None
    """Number of consecutive training rows that come from different images, in every shard."""
    rounding: float = 0.0
    """Rounding error of the activations relative to float32 (see `Networks.rounding`)."""
    failed: list[int] = field(default_factory=list)
    """Number of images that each judge failed on."""
    n_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("train", "eval"), 0))
    """Number of rows by table."""

    def add(self, receipt: dict[str, Any], embeddings: dict[str, Any], rounding: float | None) -> None:
        """Add the receipt of one shard.

        Args:
            receipt: Part of the receipt about the hookpoint.
            embeddings: Part of the receipt about embeddings.
            rounding: Rounding error at the hookpoint; None from all shards but the one that measures it.
        """
        for values in (*receipt["files"], *embeddings["files"]):
            file = File(**values)
            self.files.append(file)
            table = file.name.partition("-")[0]
            if table in self.n_tokens:
                self.n_tokens[table] += file.rows or 0
        self.failed = [sum(counts) for counts in zip_longest(self.failed, embeddings["failed"], fillvalue=0)]
        self.window = receipt["window"] if self.window is None else min(self.window, receipt["window"])
        self.rounding = self.rounding if rounding is None else rounding


def merge(draft: Draft, hookpoints: Sequence[str], n_shards: int) -> dict[str, Merged]:
    """Merge the receipts of all shards, in order; return the result for each hookpoint."""
    merged = {name: Merged() for name in hookpoints}
    for receipt in draft.iter_json([receipt_name(shard) for shard in range(n_shards)]):
        for name in hookpoints:
            rounding = receipt["rounding"] and receipt["rounding"][name]
            merged[name].add(receipt["hookpoints"][name], receipt[EMBEDDINGS], rounding)
    return merged


def iter_missing(draft: Draft, hookpoints: Sequence[str], n_shards: int) -> Iterator[int]:
    """Yield the shards whose receipt, or one of whose files, is missing or damaged."""
    names = [receipt_name(shard) for shard in range(n_shards)]
    done = draft.whole_receipts(names, partial(_iter_files, hookpoints))
    existing = [(name, set(draft.names(name))) for name in hookpoints]
    for shard in range(n_shards):
        files = [part_name(table, shard) for table in ("train", "eval", EMBEDDINGS)]
        if names[shard] not in done or any(f"{folder}/{file}" not in found for folder, found in existing for file in files):
            draft.remove(names[shard])
            yield shard


def _iter_files(hookpoints: Sequence[str], receipt: dict[str, Any]) -> Iterator[File]:
    """Yield the files that a receipt describes, under their names in the draft."""
    for hookpoint in hookpoints:
        for values in (*receipt["hookpoints"][hookpoint]["files"], *receipt[EMBEDDINGS]["files"]):
            yield File(**(values | {"name": f"{hookpoint}/{values['name']}"}))
