"""Drafts: artefacts in the making, locked, kept when their process dies, and moved into place whole."""

import functools
import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock

from ommatid.errors import ArtefactError
from ommatid.schemas import SCHEMA_VERSION
from ommatid.store.artefact import Artefact, open_artefact
from ommatid.store.damage import differences, is_whole, raise_damage
from ommatid.store.filesystem import Folder, open_folder, writing
from ommatid.store.manifest import MANIFEST, File, Manifest, child_of, describe_in
from ommatid.store.workspace import (
    OPEN,
    RECEIPTS,
    SCRATCH,
    artefact_of,
    find_published,
    fits_note,
    here_of,
    note_published,
    remove_asides,
    write_note,
)
from ommatid.store.writer import Writer


class Draft(Writer):
    """An artefact in the making: a folder of its own, kept when the process dies, continued when it runs again."""

    published: Artefact | None = None
    """Set where another process published this very artefact while this one waited for it: there is nothing to make."""

    def __init__(self, folder: Folder, here: Path, kind: str, params: Mapping[str, Any], inputs: Mapping[str, str]):
        super().__init__(folder, here)
        self.kind = kind
        self._params = dict(params)
        self._inputs = dict(inputs)
        self._made: Artefact | None = None
        self._sound: set[Path] = set()
        """Files on this machine that this process wrote, or found to be what a run before it wrote."""
        self._on_notice: Callable[[str], None] = lambda line: None

    def has(self, name: str) -> bool:
        """Whether this file was finished, now or by a run that died, and on this machine's disk still is as it was written.

        One that is not is removed, to be made again.
        """
        home = self._home(name)
        if home.size(name) is None:
            return False
        path = home.local_path(name)
        if path is None or path in self._sound:
            return True
        if fits_note(self._here, path):
            self._sound.add(path)
            return True
        self._on_notice(f"{path}: damaged since a run that was stopped wrote it; it is made again")
        home.remove(name)
        return False

    def _note(self, path: Path, source: Path) -> None:
        write_note(self._here, path, source)
        self._sound.add(path)

    def whole_receipts(self, names: Iterable[str], files_of: Callable[[Any], Iterable[File]]) -> set[str]:
        """Those of some receipts that are there and undamaged, and whose files are; others are removed: their shards are made again.

        What an object store holds is not read for that: it is checked when it is read next, by the gate at the latest.

        Args:
            names: Of the receipts.
            files_of: The files that a receipt tells of, by their names in this draft.
        """
        found = set(self.names(RECEIPTS)).intersection(names)
        if not self.folder.is_local:
            return found
        whole = {name for name in sorted(found) if self._is_whole(name, files_of)}
        for name in sorted(found - whole):
            self._on_notice(f"{self.url}/{name}: what it tells of was damaged since a stopped run wrote it; it is made again")
            self.remove(name)
        return whole

    def _is_whole(self, receipt: str, files_of: Callable[[Any], Iterable[File]]) -> bool:
        try:
            return all(is_whole(self.folder, file) for file in files_of(self.read_json(receipt)))
        except ArtefactError:
            return False

    def child(self, name: str, kind: str, params: Mapping[str, Any] | None = None, inputs: Mapping[str, Artefact] | None = None) -> "Draft":
        """An artefact inside this one, with a manifest of its own; seal it first.

        Args:
            name: Of its folder.
            kind: Its kind.
            params: Those that made it; None: the same as of this one.
            inputs: Artefacts that it is made from; None: the same as of this one.
        """
        folder = self.folder / name
        folder.make()
        digests = self._inputs if inputs is None else _digests(inputs)
        child = Draft(folder, self._here, kind, self._params if params is None else params, digests)
        child._top = self._top
        child._on_notice = self._on_notice
        mine = {own: file for own, file in self._described.items() if own.startswith(f"{name}/")}
        child._described = {(inside := own.removeprefix(f"{name}/")): replace(file, name=inside) for own, file in mine.items()}
        return child

    def sealed(self) -> Artefact | None:
        """The artefact, if the manifest is written already: the process died before publishing.

        One on this machine's disk that is damaged is removed, to be made again.
        """
        if self.folder.size(MANIFEST) is None:
            return None
        path = self.folder.local_path()
        try:
            made = open_artefact(self.folder, self.kind)
            if path:
                made.verify()
        except ArtefactError as error:
            if path is None:
                raise
            self._on_notice(f"{error}; it is made again")
            self.folder.remove("")
            (path if self.folder is not self._top else self.scratch).mkdir(parents=True)
            return None
        self._clean()
        return made

    def seal(self, summary: Mapping[str, Any], files: Sequence[File] | None = None) -> Artefact:
        """Write the manifest over all files and children, and drop scratch folder and receipts.

        Args:
            summary: Statistics for the quality gate and later stages.
            files: Descriptions of files that workers wrote: these are not read again. Others are described here.

        Raises:
            ArtefactError: a file that `files` describes is missing or of another size; or another machine took the draft away.
        """
        given = self._described | {file.name: file for file in files or ()}
        found = self.folder.sizes() | self._child_manifests()
        self._check_open()  # after the listing: what it lacks then was never there
        raise_damage(self.folder, differences(found, [given[file.name] for file in files or ()]))
        names = sorted(name for name in found if name not in (MANIFEST, OPEN))
        # what a run before this one left is only taken as it was written
        raise_damage(self.folder, [f"{name}: checksum differs" for name in names if name not in given and not self._is_sound(name)])
        listed = tuple(given[name] if name in given else describe_in(self.folder, name) for name in names)
        plain = json.loads(json.dumps([self._params, summary]))  # as a reader will find it: lists for tuples
        manifest = Manifest(self.kind, SCHEMA_VERSION, plain[0], self._inputs, listed, _versions(), plain[1])
        return self._write_manifest(manifest)

    def reseal(self, made: Artefact, summary: Mapping[str, Any]) -> Artefact:
        """Write the manifest of what is sealed once more, with another summary; all else stays as it is."""
        self.scratch.mkdir(parents=True, exist_ok=True)  # an object is written there first
        return self._write_manifest(replace(made.manifest, summary=json.loads(json.dumps(summary))))

    def _write_manifest(self, manifest: Manifest) -> Artefact:
        with self.write_file(MANIFEST) as path, path.open("wb") as file:
            file.writelines(manifest.iter_json())
        self._clean()
        self._made = Artefact(self.folder, manifest, self.describe(MANIFEST).sha256)
        return self._made

    def _is_sound(self, name: str) -> bool:
        path = self.folder.local_path(name)
        return path is None or child_of(name) is not None or path in self._sound or fits_note(self._here, path)

    def _child_manifests(self) -> dict[str, int]:
        """Size of each child's manifest by its name in this artefact."""
        names = [f"{name}/{MANIFEST}" for name in self.folder.folders() if name not in (SCRATCH, RECEIPTS)]
        sizes = {name: self.folder.size(name) for name in names}
        unsealed = [name for name, size in sizes.items() if size is None]
        assert not unsealed, f"{self.url}: a child is not sealed: {unsealed}"
        return {name: size for name, size in sizes.items() if size is not None}

    def _clean(self) -> None:
        """Drop what is not part of the artefact; a child has nothing of that kind."""
        if self.folder is self._top:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.folder.remove(OPEN)  # first: who misses a receipt then knows why
            self.folder.remove(RECEIPTS)

    def discard(self) -> None:
        """Remove the draft: its gate failed, so nothing of it may be continued."""
        self.folder.remove("")
        shutil.rmtree(self._here, ignore_errors=True)

    def publish(self, place: Folder | Path | str) -> Artefact:
        """Move the sealed draft to `place`, replacing what was there."""
        assert self.folder.size(MANIFEST) is not None, f"{self.url} is not sealed"
        target = open_folder(place)
        made = self._made or open_artefact(self.folder, self.kind)
        with writing(self._here):
            self.folder.move(target, last=MANIFEST)
            note_published(self._here, made.digest)
            shutil.rmtree(self._here, ignore_errors=True)
        return Artefact(target, made.manifest, made.digest)


@contextmanager
def open_draft(
    place: Folder | Path | str,
    kind: str,
    params: Mapping[str, Any],
    inputs: Mapping[str, Artefact],
    on_wait: Callable[[str], None] = lambda line: None,
) -> Iterator[Draft]:
    """The draft of the artefact that will be at `place`, locked; drafts made by other params, inputs or code are removed.

    Where another process of this machine holds it, this one waits for it, and looks at `Draft.published` afterwards.

    Args:
        place: Where the artefact goes, a path or URL.
        kind: Its kind.
        params: The section of Params, without what only says how to compute.
        inputs: Artefacts that it is made from.
        on_wait: Hears a line when another process is making the artefact now, and when what a run left is damaged and made again.

    Raises:
        ArtefactError: the folder may not be written to, or not be reached.
    """
    target = open_folder(place)
    folder = target.parent / ".work" / f"{target.name}-{_key(kind, params, inputs)}"
    here = here_of(folder)
    lock = filelock.FileLock(here.parent / f"{target.name}.lock")
    with writing(here.parent):
        here.parent.mkdir(parents=True, exist_ok=True)
        waited = _acquire(lock, lambda: on_wait(f"waiting for another process that makes {target}"))
    try:
        with writing(here.parent):
            for drafts in {folder.parent.url: folder.parent, str(here.parent): open_folder(here.parent)}.values():
                _remove_others(drafts, target.name, folder.name)
            remove_asides(here)
            found = find_published(target, kind, here) if waited else None
            if found is None:
                _begin(folder, here)
        draft = Draft(folder, here, kind, params, _digests(inputs))
        draft._on_notice = on_wait
        draft.published = found
        yield draft
    finally:
        lock.release()


def _acquire(lock: filelock.BaseFileLock, on_wait: Callable[[], None]) -> bool:
    """Lock; gives whether it took waiting."""
    try:
        lock.acquire(timeout=0)
        return False
    except filelock.Timeout:
        on_wait()
        lock.acquire(timeout=-1)
        return True


def _remove_others(drafts: Folder, name: str, mine: str) -> None:
    """Drafts of other params, inputs or code."""
    for other in drafts.folders():
        if artefact_of(other) == name and other != mine:
            drafts.remove(f"{other}/{OPEN}")  # first: another machine that is at work there finds out
            drafts.remove(other)


def _begin(folder: Folder, here: Path) -> None:
    (here / SCRATCH).mkdir(parents=True, exist_ok=True)
    folder.make(OPEN)


def _key(kind: str, params: Mapping[str, Any], inputs: Mapping[str, Artefact]) -> str:
    parts = [kind, dict(params), _digests(inputs), _code_digest(), SCHEMA_VERSION]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _digests(inputs: Mapping[str, Artefact]) -> dict[str, str]:
    return {name: artefact.digest for name, artefact in inputs.items()}


@functools.cache
def _code_digest() -> str:
    """sha256 of this package's sources: a draft is only continued by the code that began it."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    libraries = ("ommatid", "torch", "transformers", "numpy", "pyarrow", "duckdb", "pillow")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in libraries}}
