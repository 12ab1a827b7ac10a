"""The data set in the making: rows are collected, duplicates are dropped, and the rest are written as parts of the artefact."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from ommatid.images.examine import Rejected, Row
from ommatid.schemas import IMAGES, REJECTED
from ommatid.store import SCRATCH, Artefact, Draft, part_name
from ommatid.summaries import ImagesSummary

ROWS_PER_PART = 4096
"""Largest number of rows in a part, which is held in memory until it is written."""
BYTES_PER_PART = 2**26
"""Bytes of images and thumbnails at which a part ends even if it has fewer rows."""

_SOURCE = f"{SCRATCH}/source.json"
PARQUET: dict[str, Any] = {
    "row_group_size": 128,  # extraction reads and shuffles row groups as blocks
    "write_batch_size": 16,  # pages end only after a batch, and large pages would have to be read whole
    "compression": {**dict.fromkeys(IMAGES.names, "zstd"), "thumbnail": "none", "encoded": "none"},  # images are compressed already
    "use_dictionary": ["split", "label", "taxonomy"],
    "write_statistics": ["image", "split", "label"],
}


class _Kept(NamedTuple):
    """The fields of a row that stay in memory after its part is written."""

    image_id: str
    path: str
    split: str
    label: str | None


class Collection:
    """Collects rows in order of arrival, drops duplicates by image_id, and writes the rest as the parts of a draft.

    For each part, a note in the draft's scratch folder says how many items of the source were examined up to its end, and which were
    rejected. From parts and notes an interrupted run continues, and ends with the same bytes.
    """

    def __init__(self, draft: Draft, eval_share: float, fingerprint: str):
        self._draft = draft
        self._eval_share = eval_share
        self.n_seen = 0
        """Number of items of the source that were examined and need not be examined again."""
        self._paths: dict[bytes, str] = {}
        self._splits: Counter[str] = Counter()
        self._labels: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()
        """Number of images to which each of `REMARKS` applies."""
        self._rejected: list[Rejected] = []
        self._n_noted = 0
        self._n_parts = 0
        self._waiting: list[Row] = []
        self._n_bytes = 0
        if self._is_of(fingerprint):
            self._continue()
        else:
            self._start(fingerprint)

    @property
    def n_images(self) -> int:
        """Number of images kept."""
        return len(self._paths)

    def add(self, result: Row | Rejected) -> None:
        """Add the next result, and write a part when one is full."""
        self.n_seen += 1
        if isinstance(result, Rejected):
            self._rejected.append(result)
        elif (first := self._paths.get(bytes.fromhex(result.image_id))) is not None:
            self._rejected.append(Rejected(result.path, "duplicate", first))
        else:
            self._keep(_Kept(result.image_id, result.path, split_of(result.image_id, self._eval_share), result.label))
            self.remarks.update(result.remarks)
            self._waiting.append(result)
            self._n_bytes += len(result.encoded) + len(result.thumbnail)
        if len(self._waiting) >= ROWS_PER_PART or self._n_bytes >= BYTES_PER_PART:
            self._write_part()

    def seal(self) -> Artefact:
        """Write the last part, the table of rejected items, and the manifest with the counts; return the artefact."""
        if self._waiting or not self._n_parts:
            self._write_part()
        rejected = pa.Table.from_pylist([vars(row) for row in self._rejected], schema=REJECTED)
        self._draft.write_table("rejected.parquet", rejected, compression="zstd")
        return self._draft.seal(self._summary())

    def _keep(self, kept: _Kept) -> None:
        self._paths[bytes.fromhex(kept.image_id)] = kept.path
        self._splits[kept.split] += 1
        if kept.label is not None:
            self._labels[kept.label] += 1

    def _write_part(self) -> None:
        note = {"n_seen": self.n_seen, "remarks": self.remarks, "rejected": [vars(row) for row in self._rejected[self._n_noted :]]}
        self._draft.write_json(_note_name(self._n_parts), note)
        # after the note, which counts only if its part exists
        self._draft.write_table(part_name("images", self._n_parts), self._table(), **PARQUET)
        self._n_parts += 1
        self._n_noted = len(self._rejected)
        self._waiting = []
        self._n_bytes = 0

    def _table(self) -> pa.Table:
        start = len(self._paths) - len(self._waiting)
        rows = ({**vars(row), "image": start + i, "split": split_of(row.image_id, self._eval_share)} for i, row in enumerate(self._waiting))
        return pa.Table.from_pylist(list(rows), schema=IMAGES)

    def _is_of(self, fingerprint: str) -> bool:
        """Whether the draft was begun on the same content of the source, and no note is missing."""
        if not self._draft.has(_SOURCE) or self._draft.read_json(_SOURCE) != fingerprint:
            return False
        return all(self._draft.has(_note_name(index)) for index in self._parts_found())

    def _parts_found(self) -> Iterator[int]:
        index = 0
        while self._draft.has(part_name("images", index)):
            yield index
            index += 1

    def _start(self, fingerprint: str) -> None:
        for index in reversed([*self._parts_found()]):
            self._draft.remove(part_name("images", index))
        self._draft.write_json(_SOURCE, fingerprint)

    def _continue(self) -> None:
        for index in self._parts_found():
            table = self._draft.read(part_name("images", index), columns=list(_Kept._fields))
            for values in zip(*(table[name].to_pylist() for name in _Kept._fields), strict=True):
                self._keep(_Kept(*values))
            note = self._draft.read_json(_note_name(index))
            self.n_seen = note["n_seen"]
            self.remarks = Counter(note["remarks"])
            self._rejected += [Rejected(**row) for row in note["rejected"]]
            self._n_parts = index + 1
        self._n_noted = len(self._rejected)

    def _summary(self) -> ImagesSummary:
        n_duplicates = sum(row.reason == "duplicate" for row in self._rejected)
        n_rejected = len(self._rejected) - n_duplicates
        return ImagesSummary(
            n_seen=self.n_seen,
            n_images=self.n_images,
            n_train=self._splits["train"],
            n_eval=self._splits["eval"],
            n_duplicates=n_duplicates,
            n_rejected=n_rejected,
            rejected_share=n_rejected / self.n_seen if self.n_seen else 0.0,
            n_nearly_black=self.remarks["n_nearly_black"],
            n_nearly_white=self.remarks["n_nearly_white"],
            n_of_several_frames=self.remarks["n_of_several_frames"],
            labels=dict(sorted(self._labels.items())),
        )


def split_of(image_id: str, eval_share: float) -> str:
    """Return `train` or `eval` by the id alone, so that an image stays in its split when others are added or removed."""
    return "eval" if int(image_id[:8], 16) / 2**32 < eval_share else "train"


def _note_name(index: int) -> str:
    return f"{SCRATCH}/images-{index:05d}.json"
