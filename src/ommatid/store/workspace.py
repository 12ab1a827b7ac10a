"""Local state of drafts on a machine's own disk: folders, scratch files, and notes by which a later run recognises their files."""

import hashlib
import os
import shutil
from pathlib import Path

from ommatid.store.artefact import Artefact, open_artefact
from ommatid.store.filesystem import Folder, aside_of, is_aside, open_folder
from ommatid.store.manifest import MANIFEST
from ommatid.store.sums import block_sums

SCRATCH = "scratch"
"""Subfolder of a draft for chunks and checkpoints, which stay on this machine and never become part of the artefact."""
NOTES = f"{SCRATCH}/notes"
"""Subfolder with a note for each file that the driver finished on this machine: size and checksums, by which a later run recognises it."""
WORK = Path("data/.work")
"""Local folder for the scratch files and locks of drafts that lie in an object store."""
RECEIPTS = "receipts"
"""Subfolder of a draft, beside its finished files, for what workers report to the driver; never part of the artefact."""
OPEN = ".open"
"""Object that marks an open draft in an object store, which has no folders: workers and driver may write while it exists."""


def local_folder_of(folder: Folder) -> Path:
    """Return the local folder of a draft: its own folder if that is on a disk, else one under `WORK` that stands for it."""
    if path := folder.local_path():
        return path
    root = hashlib.sha256(folder.parent.parent.url.encode()).hexdigest()[:8]
    return WORK / root / folder.name


def artefact_of(draft: str) -> str:
    """Return the name of the artefact from the name of its draft's folder."""
    return draft.rpartition("-")[0]


def remove_old_scratch(local: Path) -> None:
    """Remove scratch folders of earlier drafts of the same artefact, left by workers on machines whose disks no driver cleans."""
    for other in open_folder(local.parent).folders():
        if artefact_of(other) == artefact_of(local.name) and other != local.name:
            shutil.rmtree(local.parent / other, ignore_errors=True)  # another worker may remove it at the same time


def remove_asides(local: Path) -> None:
    """Remove unfinished files, and folders of unfinished chunks, that dead writers left."""
    for leftover in [path for path in local.rglob("*") if is_aside(path.name)]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def write_note(local: Path, path: Path, source: Path) -> None:
    """Write the note of a file that is at `source` now and is about to be renamed to `path`, inside a draft.

    If the process dies between note and rename, an older file at `path` does not fit the note: it counts as damaged and is made again.
    """
    note = _note_of(local, path)
    note.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(note)
    aside.write_text(_facts(source), encoding="ascii")
    os.replace(aside, note)


def fits_note(local: Path, path: Path) -> bool:
    """Whether a file of a draft matches its note; true if it has none, since receipts describe the files of workers."""
    note = _note_of(local, path)
    return not note.exists() or note.read_bytes() == _facts(path).encode()


def _note_of(local: Path, path: Path) -> Path:
    return local / NOTES / path.relative_to(local).as_posix().replace("/", "~")


def _facts(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.stat().st_size} {block_sums(file)}"


def note_published(local: Path, digest: str) -> None:
    """Record beside the lock which draft became which artefact, so that a process waiting to make the same one finds it."""
    note = local.with_name(f"{artefact_of(local.name)}.published")
    aside = aside_of(note)
    aside.write_text(f"{local.name} {digest}\n", encoding="utf-8")
    os.replace(aside, note)


def find_published(target: Folder, kind: str, local: Path) -> Artefact | None:
    """Return the artefact at `target` if it was made from the same params, inputs and code as this draft; else None."""
    note = local.with_name(f"{target.name}.published")
    if not note.exists():
        return None
    name, _, digest = note.read_text(encoding="utf-8").strip().rpartition(" ")
    if name != local.name or target.size(MANIFEST) is None or target.sha256(MANIFEST) != digest:
        return None
    return open_artefact(target, kind)
