"""The source `webdataset`: images in tar archives, called shards, in one file or in every .tar file below a folder.

Members whose names differ only after the first dot of their last part belong to one sample: `dog/1.jpg`, `dog/1.cls` and
`dog/1.txt` are the image, the label and a caption of the sample `dog/1`.
"""

import hashlib
import io
import json
import os
import posixpath
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from typing import IO, Any, cast

from ommatid.config import WebDatasetSource
from ommatid.errors import SourceError, gist
from ommatid.images.decode import MAX_BYTES, Unreadable
from ommatid.images.reference import Reference
from ommatid.images.source import Item, normalise
from ommatid.store.code import digest_of
from ommatid.store.filesystem import cache_folder, replace_text
from ommatid.store.filesystem.listing import Listed, Listing, count_of, list_shards, some_of

ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm", "jp2", "jpx", "ico")
"""Endings of the names of images."""
MOST_TEXT = 2**20
"""Largest size of a label or caption, in bytes."""
CACHE = "shards"
"""Folder, in the cache folder, of the indexes of shards that have not changed."""
_N_READERS = 8
_BUFFER = 2**20
"""Bytes that are read at a time while an archive is indexed."""


@dataclass(frozen=True)
class Sample:
    """A sample of a shard that has an image."""

    name: str
    """Name of the member that is the image."""
    offset: int
    size: int
    label: str | None = None
    captions: tuple[str, ...] = ()
    taxonomy: str | None = None


@dataclass
class Shard:
    """What a shard contains, as far as it can be read."""

    samples: list[Sample] = field(default_factory=list)
    """Samples in the order of their images."""
    broken: str | None = None
    """Why the archive cannot be read to its end; None if it can."""
    without_image: list[str] = field(default_factory=list)
    """Samples that have no image."""
    with_several: list[str] = field(default_factory=list)
    """Samples that have several images, of which one is used."""
    repeated: list[str] = field(default_factory=list)
    """Members that are there more than once, of which the last is used."""
    bad_texts: list[str] = field(default_factory=list)
    """Members with labels or captions that are not what their ending says, and are not used."""


def open_source(params: WebDatasetSource) -> "WebDataset":
    """Open the source that the params describe; see `WebDataset`."""
    return WebDataset(params.path)


class WebDataset:
    """The images of all shards, in order of shard and place in it; an image's path is `<shard>/<member>`.

    A shard that is broken is an item of its own after the samples before the damage, which are used; it is always rejected.

    Raises:
        SourceError: There are no shards, or no images in them.
        ArtefactError: The URL cannot be reached.
    """

    def __init__(self, place: str):
        self._place = place
        self._listing = list_shards(place)
        self.fingerprint = self._listing.fingerprint
        code = digest_of(__name__)
        with ThreadPoolExecutor(_N_READERS) as pool:
            self._shards = list(pool.map(partial(_index_once, self._listing, code), self._listing.files))
        self._ends = list(accumulate(len(shard.samples) + (shard.broken is not None) for shard in self._shards))
        self.total = self._ends[-1]
        if not any(shard.samples for shard in self._shards):
            broken = [str(file) for file, shard in zip(self._listing.files, self._shards, strict=True) if shard.broken]
            why = f"; {count_of(broken, 'archive')} broken: {some_of(broken)}" if broken else f"; images end in {', '.join(ENDINGS)}"
            raise SourceError(f"{place}: there are no images in {len(self._shards)} archives{why}; change images.source.path")
        self.notices = [f"{place}: {sentence}" for sentence in (*self._listing.notice([".tar"]), *self._report())]

    def names(self) -> Iterator[str]:
        """Return the path of every image, in order, and that of each broken archive after its images."""
        for file, shard in zip(self._listing.files, self._shards, strict=True):
            yield from (f"{file.name}/{sample.name}" for sample in shard.samples)
            if shard.broken is not None:
                yield file.name

    def iter_items(self, positions: Sequence[int]) -> Iterator[Item]:
        """Iterate over the images at these positions, in order."""
        for position in positions:
            index = bisect_right(self._ends, position)
            file, shard = self._listing.files[index], self._shards[index]
            i = position - (self._ends[index - 1] if index else 0)
            if i < len(shard.samples):
                yield self._item(file, shard.samples[i])
            else:
                yield Item(file.name, partial(_refuse, Unreadable("truncated", shard.broken or "")))

    def _item(self, file: Listed, sample: Sample) -> Item:
        return Item(
            f"{file.name}/{sample.name}",
            partial(_read, file, sample),
            sample.label,
            tuple(sample.captions),
            sample.taxonomy,
            Reference(file.folder.url, file.inside, sample.size, sample.offset),
            self._listing.token(file, f"{sample.offset} {sample.size}"),
            file.is_unchanged,
        )

    def _report(self) -> Iterator[str]:
        """Yield sentences about what of the shards is not used."""
        named = list(zip(self._listing.files, self._shards, strict=True))
        without, several, repeated, bad = (
            [f"{file.name}/{name}" for file, shard in named for name in getattr(shard, kind)]
            for kind in ("without_image", "with_several", "repeated", "bad_texts")
        )
        if without:
            yield f"{count_of(without, 'sample')} left out, having no image: {some_of(without)}"
        if several:
            yield f"{count_of(several, 'sample')} used with one of several images: {some_of(several)}"
        if repeated:
            yield f"{count_of(repeated, 'member')} there more than once, of which the last is used, as when unpacked: {some_of(repeated)}"
        if bad:
            yield f"{count_of(bad, 'text')} not used, being empty, too long or not what their ending says: {some_of(bad)}"


def _refuse(error: Unreadable) -> bytes:
    raise error


def _read(file: Listed, sample: Sample) -> bytes:
    if sample.size > MAX_BYTES:
        raise Unreadable("too_large", f"more than {MAX_BYTES} bytes")
    found = file.folder.read_range(file.inside, sample.offset, sample.offset + sample.size) if sample.size else b""
    if len(found) < sample.size:
        raise OSError("the archive was shortened while it was read")
    return found


def _index_once(listing: Listing, code: str, file: Listed) -> Shard:
    """Index a shard, or load its index from the cache if neither the file nor the code with the digest `code` has changed."""
    token = listing.token(file, f"index {code}")
    path = cache_folder() / CACHE / f"{hashlib.sha256(token.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"
    if token:
        with suppress(OSError, ValueError, TypeError, KeyError):
            values = json.loads(path.read_text(encoding="utf-8"))
            os.utime(path)  # by which `ommatid gc` knows that it is used
            return Shard(**values | {"samples": [Sample(**sample) for sample in values["samples"]]})
    shard = index(file)
    if token:
        with suppress(OSError):  # without the cache the archive is indexed again, which is only slower
            replace_text(path, json.dumps(asdict(shard)))
    return shard


def index(file: Listed) -> Shard:
    """Read the headers of a shard, and its labels and captions.

    Raises:
        SourceError: The file cannot be read.
    """
    members: dict[str, dict[str, tuple[str, tarfile.TarInfo]]] = {}
    texts: dict[str, bytes] = {}
    repeated: dict[str, None] = {}
    broken = None
    try:
        with _open(file) as opened:
            try:
                for member in _iter_members(opened):
                    key, ending = _split(member.name)
                    of_sample = members.setdefault(key, {})
                    if member.name in of_sample:
                        repeated[_text(member.name)] = None
                    of_sample[member.name] = ending, member
                    if _last(ending) in ("cls", "txt", "json"):
                        opened.seek(member.offset_data)
                        texts[member.name] = opened.read(member.size) if member.size <= MOST_TEXT else b""
            except tarfile.TarError as error:
                broken = f"the archive is broken after {sum(map(len, members.values()))} members ({gist(error)})"
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({gist(error)}); make it readable, or move it away") from None
    return _group(members, texts, Shard(broken=broken, repeated=list(repeated)))


def _open(file: Listed) -> IO[bytes]:
    opened = file.folder.open(file.inside, file.size)
    return opened if file.path else io.BufferedReader(cast(Any, opened), _BUFFER)


def _iter_members(opened: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of an archive, without keeping them.

    Raises:
        TarError: The archive is broken.
    """
    with tarfile.open(fileobj=opened, mode="r:") as tar:
        while member := tar.next():
            tar.members = []  # type: ignore[assignment]  # which would hold all that were read
            if member.isreg():
                yield member
        opened.seek(tar.offset)
        if opened.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes any damage for the end
            raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _split(name: str) -> tuple[str, str]:
    """Split the name of a member into the key of its sample and its ending: `a.b/1.seg.png` is `a.b/1` and `seg.png`."""
    folder, last = posixpath.split(name)
    first, _, ending = last.partition(".")
    return posixpath.join(folder, first), ending.lower()


def _last(ending: str) -> str:
    return ending.rpartition(".")[2]


def _group(members: dict[str, dict[str, tuple[str, tarfile.TarInfo]]], texts: dict[str, bytes], shard: Shard) -> Shard:
    for key, found in members.items():
        images = [(ending, member) for ending, member in found.values() if _last(ending) in ENDINGS]
        if not images:
            shard.without_image.append(_text(key))
            continue
        if len(images) > 1:
            shard.with_several.append(_text(key))
        _, image = min(images, key=lambda one: one[0].count("."))  # 1.jpg before 1.seg.png
        notes = _Notes()
        for ending, member in found.values():
            if _last(ending) in ("cls", "txt", "json") and not notes.add(ending, texts[member.name]):
                shard.bad_texts.append(_text(member.name))
        shard.samples.append(Sample(_text(image.name), image.offset_data, image.size, notes.label, tuple(notes.captions), notes.taxonomy))
    shard.samples.sort(key=lambda sample: sample.offset)
    return shard


class _Notes:
    """What the members beside an image say of it. A label in a member of its own goes before that in JSON."""

    def __init__(self) -> None:
        self.label: str | None = None
        self.captions: dict[str, None] = {}
        self.taxonomy: str | None = None
        self._has_own_label = False

    def add(self, ending: str, content: bytes) -> bool:
        """Add the content of a member, and return whether it is what its ending says."""
        try:
            text = content.decode("utf-8-sig").strip()
            if not text:
                return False
            match _last(ending):
                case "cls":
                    self.label, self._has_own_label = text, True
                case "txt":
                    self.captions[text] = None
                case _:
                    self._add_json(json.loads(text))
        except (ValueError, RecursionError):
            return False
        return True

    def _add_json(self, values: Any) -> None:
        if not isinstance(values, dict):
            raise ValueError("not an object")
        label, captions, taxonomy = values.get("label"), values.get("captions", values.get("caption")), values.get("taxonomy")
        if isinstance(label, str | int) and not isinstance(label, bool) and not self._has_own_label:
            self.label = str(label).strip() or None
        for caption in captions if isinstance(captions, list) else [captions]:
            if isinstance(caption, str) and caption.strip():
                self.captions[caption.strip()] = None
        if isinstance(taxonomy, str):
            self.taxonomy = normalise(taxonomy)


def _text(name: str) -> str:
    """Return the name of a member as valid Unicode."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
