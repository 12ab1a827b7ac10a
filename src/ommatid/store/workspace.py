"""Local state of drafts on a machine's own disk: folders, scratch files, and notes by which a later run recognises their files."""

import hashlib
import shutil
from pathlib import Path

from ommatid.store.artefact import Artefact, open_artefact
from ommatid.store.filesystem import Folder, is_temporary, open_folder, replace_text
from ommatid.store.manifest import MANIFEST
from ommatid.store.sums import block_sums

SCRATCH = "scratch"
"""Subfolder of a draft for chunks and checkpoints. They stay on this machine, and are never part of the artefact."""
NOTES = f"{SCRATCH}/notes"
"""Subfolder with a note of the size and checksums of each file that the driver finished here, so that a later run can recognise it."""
WORK = Path("data/.work")
"""Local folder for the scratch files and locks of drafts that lie in an object store."""
RECEIPTS = "receipts"
"""Subfolder of a draft for what workers report to the driver. It is never part of the artefact."""
OPEN = ".open"
"""Object that marks a draft in an object store as open, because there are no folders: workers and driver may write while it exists."""


def local_folder_of(folder: Folder) -> Path:
    """Return the local folder of a draft: the draft's own folder if it is on a disk, else a folder under `WORK`."""
    if path := folder.local_path():
        return path
    root = hashlib.sha256(folder.parent.parent.url.encode()).hexdigest()[:8]
    return WORK / root / folder.name


def artefact_of(draft: str) -> str:
    """Return the name of the artefact from the name of its draft's folder."""
    return draft.rpartition("-")[0]


def remove_old_scratch(local: Path) -> None:
    """Remove scratch folders that workers left for earlier drafts of the same artefact; only a driver's machine is cleaned otherwise."""
    for other in open_folder(local.parent).folders():
        if artefact_of(other) == artefact_of(local.name) and other != local.name:
            shutil.rmtree(local.parent / other, ignore_errors=True)  # Another worker may remove it at the same time.


def remove_temporaries(local: Path) -> None:
    """Remove unfinished files, and folders of unfinished chunks, that dead writers left."""
    for leftover in [path for path in local.rglob("*") if is_temporary(path.name)]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def write_note(local: Path, path: Path, source: Path) -> None:
    """Write the note of a file of a draft, which is at `source` now and is about to be renamed to `path`.

    If the process dies before the file is renamed, an older file at `path` does not match the note: it counts as damaged and is made again.
    """
    note = _note_of(local, path)
    replace_text(note, _facts(source))


def fits_note(local: Path, path: Path) -> bool:
    """Return whether a file of a draft matches its note. A file without a note counts as matching: workers describe theirs in receipts."""
    note = _note_of(local, path)
    return not note.exists() or note.read_bytes() == _facts(path).encode()


def _note_of(local: Path, path: Path) -> Path:
    return local / NOTES / path.relative_to(local).as_posix().replace("/", "~")


def _facts(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.stat().st_size} {block_sums(file)}"


def note_published(local: Path, digest: str) -> None:
    """Record beside the lock which draft became which artefact, for processes that wait for the lock to make the same artefact."""
    note = local.with_name(f"{artefact_of(local.name)}.published")
    replace_text(note, f"{local.name} {digest}\n")


def find_published(target: Folder, kind: str, local: Path) -> Artefact | None:
    """Return the artefact at `target` if it was made from the same params, inputs and code as this draft; else None."""
    note = local.with_name(f"{target.name}.published")
    if not note.exists():
        return None
    name, _, digest = note.read_text(encoding="utf-8").strip().rpartition(" ")
    if name != local.name or target.size(MANIFEST) is None or target.sha256(MANIFEST) != digest:
        return None
    return open_artefact(target, kind)
