"""Drafts: artefacts in the making, locked, kept when their process dies, and moved into place whole."""

import functools
import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock

from ommatid.folder import Disk, Folder, open_folder, writing
from ommatid.schemas import SCHEMA_VERSION
from ommatid.store.artefact import Artefact, open_artefact
from ommatid.store.damage import differences, raise_damage
from ommatid.store.manifest import MANIFEST, File, Manifest, describe_in
from ommatid.store.workplace import OPEN, RECEIPTS, SCRATCH, artefact_of, find_published, here_of, note_published, remove_asides
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

    def child(self, name: str, kind: str, params: Mapping[str, Any] | None = None, inputs: Mapping[str, Artefact] | None = None) -> "Draft":
        """An artefact inside this one, with a manifest of its own; seal it first.

        Args:
            name: Of its folder.
            kind: Its kind.
            params: Those that made it; None: the same as of this one.
            inputs: Artefacts that it is made from; None: the same as of this one.
        """
        folder = self.folder / name
        if isinstance(folder, Disk):
            with writing(folder.path):
                folder.path.mkdir(exist_ok=True)
        digests = self._inputs if inputs is None else _digests(inputs)
        child = Draft(folder, self._here, kind, self._params if params is None else params, digests)
        child._top = self._top
        mine = {own: file for own, file in self._described.items() if own.startswith(f"{name}/")}
        child._described = {(inside := own.removeprefix(f"{name}/")): replace(file, name=inside) for own, file in mine.items()}
        return child

    def sealed(self) -> Artefact | None:
        """The artefact, if the manifest is written already: the process died before publishing."""
        if not self.has(MANIFEST):
            return None
        self._clean()
        return open_artefact(self.folder, self.kind)

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
        listed = tuple(given[name] if name in given else describe_in(self.folder, name) for name in names)
        plain = json.loads(json.dumps([self._params, summary]))  # as a reader will find it: lists for tuples
        manifest = Manifest(self.kind, SCHEMA_VERSION, plain[0], self._inputs, listed, _versions(), plain[1])
        with self.write_file(MANIFEST) as path, path.open("wb") as file:
            file.writelines(manifest.iter_json())
        self._clean()
        self._made = Artefact(self.folder, manifest, self.describe(MANIFEST).sha256)
        return self._made

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
        assert self.has(MANIFEST), f"{self.url} is not sealed"
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
        on_wait: Hears one line when another process is making the artefact now.

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
            for drafts in {folder.parent.url: folder.parent, str(here.parent): Disk(here.parent)}.values():
                _remove_others(drafts, target.name, folder.name)
            remove_asides(here)
            found = find_published(target, kind, here) if waited else None
            if found is None:
                _begin(folder, here)
        draft = Draft(folder, here, kind, params, _digests(inputs))
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
    if not isinstance(folder, Disk):
        mark = here / SCRATCH / OPEN
        mark.touch()
        folder.put(mark, OPEN)


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
