"""Drafts: artefacts in the making, which are locked, survive the death of their process, and are moved into place once complete."""

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
    local_folder_of,
    note_published,
    remove_temporaries,
    write_note,
)
from ommatid.store.writer import Writer


class Draft(Writer):
    """An artefact in the making, in a folder of its own that survives the death of the process, so that the next run continues it."""

    published: Artefact | None = None
    """The artefact, if another process published the same one while this process waited for the lock. Nothing is left to make then."""

    def __init__(self, folder: Folder, local: Path, place: Folder, kind: str, params: Mapping[str, Any], inputs: Mapping[str, str]):
        super().__init__(folder, local)
        self.place = place
        """Folder where the artefact will be published, and where an earlier one may be."""
        self.kind = kind
        self._params = dict(params)
        self._inputs = dict(inputs)
        self._sealed: Artefact | None = None
        self._sound: set[Path] = set()
        """Local files that this process wrote, or found unchanged since an earlier run wrote them."""
        self._on_notice: Callable[[str], None] = lambda line: None

    def has(self, name: str) -> bool:
        """Return whether a file was finished, by this run or by one that died, and is unchanged since.

        A file on this machine's disk that has changed is removed, so that it is made again. Objects are assumed to be unchanged.
        """
        home = self._home(name)
        if home.size(name) is None:
            return False
        path = home.local_path(name)
        if path is None or path in self._sound:
            return True
        if fits_note(self._local, path):
            self._sound.add(path)
            return True
        self._on_notice(f"{path}: damaged since an interrupted run wrote it; it is made again")
        home.remove(name)
        return False

    def _note(self, path: Path, source: Path) -> None:
        write_note(self._local, path, source)
        self._sound.add(path)

    def whole_receipts(self, names: Iterable[str], files_of: Callable[[Any], Iterable[File]]) -> set[str]:
        """Find the receipts that are undamaged and whose files are undamaged, and remove the others, so that their shards are made again.

        In an object store, all receipts that exist count as undamaged: their files are checked when they are next read, by the gate at the
        latest.

        Args:
            names: Names of the receipts to look for.
            files_of: Function from the content of a receipt to the files that it describes, under their names in this draft.

        Returns:
            The names of the undamaged receipts.
        """
        found = set(self.names(RECEIPTS)).intersection(names)
        if not self.folder.is_local:
            return found
        whole = {name for name in sorted(found) if self._is_whole(name, files_of)}
        for name in sorted(found - whole):
            self._on_notice(f"{self.url}/{name}: its files were damaged since an interrupted run wrote them; they are made again")
            self.remove(name)
        return whole

    def _is_whole(self, receipt: str, files_of: Callable[[Any], Iterable[File]]) -> bool:
        try:
            return all(is_whole(self.folder, file) for file in files_of(self.read_json(receipt)))
        except ArtefactError:
            return False

    def child(self, name: str, kind: str, params: Mapping[str, Any] | None = None, inputs: Mapping[str, Artefact] | None = None) -> "Draft":
        """Begin an inner artefact with a manifest of its own. It must be sealed before this one.

        Args:
            name: Name of its folder.
            kind: Kind of artefact.
            params: Params for its manifest; None means those of this draft.
            inputs: Artefacts that it is made from, by name; None means those of this draft.

        Returns:
            The draft of the inner artefact.
        """
        folder = self.folder / name
        folder.make()
        digests = self._inputs if inputs is None else _digests(inputs)
        child = Draft(folder, self._local, self.place / name, kind, self._params if params is None else params, digests)
        child._top = self._top
        child._on_notice = self._on_notice
        inner = {path.removeprefix(f"{name}/"): file for path, file in self._described.items() if path.startswith(f"{name}/")}
        child._described = {path: replace(file, name=path) for path, file in inner.items()}
        return child

    def sealed(self) -> Artefact | None:
        """Return the artefact if an earlier process sealed it but died before publishing it, else None.

        A damaged artefact on this machine's disk is removed, so that it is made again.

        Raises:
            ArtefactError: The artefact is in an object store, and is damaged.
        """
        if self.folder.size(MANIFEST) is None:
            return None
        path = self.folder.local_path()
        try:
            artefact = open_artefact(self.folder, self.kind)
            if path:
                artefact.verify()
        except ArtefactError as error:
            if path is None:
                raise
            self._on_notice(f"{error}; it is made again")
            self.folder.remove("")
            (path if self.folder is not self._top else self.scratch).mkdir(parents=True)
            return None
        self._clean()
        return artefact

    def seal(self, summary: Mapping[str, Any], files: Sequence[File] | None = None) -> Artefact:
        """Write the manifest, which lists all files and children, and remove the scratch folder and the receipts.

        Args:
            summary: Statistics for the quality gate and later stages.
            files: Descriptions of files that workers wrote, so that these need not be read again. All other files are described here.

        Returns:
            The sealed artefact, still in the draft's folder.

        Raises:
            ArtefactError: A file is missing, damaged or has the wrong size, or another machine published or removed the draft.
        """
        described = self._described | {file.name: file for file in files or ()}
        found = self.folder.sizes() | self._child_manifests()
        self._check_open()  # After the listing: if the draft is still open, a file missing from the listing was never written.
        raise_damage(self.folder, differences(found, [described[file.name] for file in files or ()]))
        names = sorted(name for name in found if name not in (MANIFEST, OPEN))
        # Files of an earlier run are accepted only if they are unchanged.
        raise_damage(self.folder, [f"{name}: checksum differs" for name in names if name not in described and not self._is_sound(name)])
        listed = tuple(described[name] if name in described else describe_in(self.folder, name) for name in names)
        plain = json.loads(json.dumps([self._params, summary]))  # As readers will get them: tuples become lists.
        manifest = Manifest(self.kind, SCHEMA_VERSION, plain[0], self._inputs, listed, _versions(), plain[1])
        return self._write_manifest(manifest)

    def reseal(self, artefact: Artefact, summary: Mapping[str, Any]) -> Artefact:
        """Replace the summary in the manifest of a sealed draft, change nothing else, and return the artefact."""
        self.scratch.mkdir(parents=True, exist_ok=True)  # Objects are written there before they are uploaded.
        return self._write_manifest(replace(artefact.manifest, summary=json.loads(json.dumps(summary))))

    def _write_manifest(self, manifest: Manifest) -> Artefact:
        with self.write_file(MANIFEST) as path, path.open("wb") as file:
            file.writelines(manifest.iter_json())
        self._clean()
        self._sealed = Artefact(self.folder, manifest, self.describe(MANIFEST).sha256)
        return self._sealed

    def _is_sound(self, name: str) -> bool:
        path = self.folder.local_path(name)
        return path is None or child_of(name) is not None or path in self._sound or fits_note(self._local, path)

    def _child_manifests(self) -> dict[str, int]:
        """Return the size of each child's manifest in bytes, by the name of the manifest in this artefact."""
        names = [f"{name}/{MANIFEST}" for name in self.folder.folders() if name not in (SCRATCH, RECEIPTS)]
        sizes = {name: self.folder.size(name) for name in names}
        unsealed = [name for name, size in sizes.items() if size is None]
        assert not unsealed, f"{self.url}: a child is not sealed: {unsealed}"
        return {name: size for name, size in sizes.items() if size is not None}

    def _clean(self) -> None:
        """Remove what is not part of the artefact. A child does nothing, because it shares these files with the outermost draft."""
        if self.folder is self._top:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.folder.remove(OPEN)  # Before the receipts, so that a worker that does not find its receipt can say why.
            self.folder.remove(RECEIPTS)

    def discard(self) -> None:
        """Remove the draft after its gate failed, so that no later run continues it."""
        self.folder.remove("")
        shutil.rmtree(self._local, ignore_errors=True)

    def publish(self, place: Folder | Path | str) -> Artefact:
        """Move the sealed draft to `place`, replacing what is there, and return the artefact."""
        assert self.folder.size(MANIFEST) is not None, f"{self.url} is not sealed"
        target = open_folder(place)
        artefact = self._sealed or open_artefact(self.folder, self.kind)
        with writing(self._local):
            self.folder.move(target, last=MANIFEST)
            note_published(self._local, artefact.digest)
            shutil.rmtree(self._local, ignore_errors=True)
        return Artefact(target, artefact.manifest, artefact.digest)


@contextmanager
def open_draft(
    place: Folder | Path | str,
    kind: str,
    params: Mapping[str, Any],
    inputs: Mapping[str, Artefact],
    on_wait: Callable[[str], None] = lambda line: None,
) -> Iterator[Draft]:
    """Lock and open the draft of an artefact, and remove drafts of the same artefact from other params, inputs or code.

    If another process of this machine holds the lock, wait for it. If that process published the same artefact, `Draft.published` is set.

    Args:
        place: Path or URL where the artefact will be published.
        kind: Kind of artefact.
        params: The section of Params, without the keys that do not affect the result.
        inputs: Artefacts that it is made from, by name.
        on_wait: Called with a line of text if another process holds the lock, and if damaged files of an earlier run are made again.

    Yields:
        The draft, empty or as an interrupted run left it.

    Raises:
        ArtefactError: The folder cannot be reached or written.
    """
    target = open_folder(place)
    folder = target.parent / ".work" / f"{target.name}-{_key(kind, params, inputs)}"
    local = local_folder_of(folder)
    lock = filelock.FileLock(local.parent / f"{target.name}.lock")
    with writing(local.parent):
        local.parent.mkdir(parents=True, exist_ok=True)
        waited = _acquire(lock, lambda: on_wait(f"waiting for another process that is making {target}"))
    try:
        with writing(local.parent):
            for drafts in {folder.parent.url: folder.parent, str(local.parent): open_folder(local.parent)}.values():
                _remove_others(drafts, target.name, folder.name)
            remove_temporaries(local)
            found = find_published(target, kind, local) if waited else None
            if found is None:
                _begin(folder, local)
        draft = Draft(folder, local, target, kind, params, _digests(inputs))
        draft._on_notice = on_wait
        draft.published = found
        yield draft
    finally:
        lock.release()


def _acquire(lock: filelock.BaseFileLock, on_wait: Callable[[], None]) -> bool:
    """Acquire the lock and return whether it was necessary to wait for it."""
    try:
        lock.acquire(timeout=0)
        return False
    except filelock.Timeout:
        on_wait()
        lock.acquire(timeout=-1)
        return True


def _remove_others(drafts: Folder, name: str, mine: str) -> None:
    """Remove all drafts of the artefact `name`, which have other params, inputs or code, except the folder `mine`."""
    for other in drafts.folders():
        if artefact_of(other) == name and other != mine:
            drafts.remove(f"{other}/{OPEN}")  # First, so that another machine at work there notices.
            drafts.remove(other)


def _begin(folder: Folder, local: Path) -> None:
    (local / SCRATCH).mkdir(parents=True, exist_ok=True)
    folder.make(OPEN)


def _key(kind: str, params: Mapping[str, Any], inputs: Mapping[str, Artefact]) -> str:
    parts = [kind, dict(params), _digests(inputs), _code_digest(), SCHEMA_VERSION]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _digests(inputs: Mapping[str, Artefact]) -> dict[str, str]:
    return {name: artefact.digest for name, artefact in inputs.items()}


@functools.cache
def _code_digest() -> str:
    """Return the sha256 of this package's source files, because only the code that began a draft may continue it."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    libraries = ("ommatid", "torch", "transformers", "numpy", "pyarrow", "duckdb", "pillow")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in libraries}}
