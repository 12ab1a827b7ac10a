"""What a machine keeps of drafts on its own disk: their folders, scratch files, and notes of what became of them."""

import hashlib
import os
import shutil
from pathlib import Path

from ommatid.store.artefact import Artefact, open_artefact
from ommatid.store.filesystem import Folder, aside_of, is_aside, open_folder
from ommatid.store.manifest import MANIFEST
from ommatid.store.sums import block_sums

SCRATCH = "scratch"
"""Folder of a draft, on this machine only, whose files (chunks, checkpoints) never become part of the artefact."""
NOTES = f"{SCRATCH}/notes"
"""Folder in it with a note for each file that the driver finished on this machine: size and checksums, by which a later run knows it."""
WORK = Path("data/.work")
"""Where a machine keeps its scratch files and locks of drafts that are in an object store."""
RECEIPTS = "receipts"
"""Folder of a draft, where its finished files are, for what workers tell the driver; never part of the artefact."""
OPEN = ".open"
"""Object that marks a draft in an object store, which has no folders: workers see that it is there, and the driver that it may write."""


def here_of(folder: Folder) -> Path:
    """Where this machine keeps what a draft has on its disk: the draft itself, or a folder that stands for it."""
    if path := folder.local_path():
        return path
    root = hashlib.sha256(folder.parent.parent.url.encode()).hexdigest()[:8]
    return WORK / root / folder.name


def artefact_of(draft: str) -> str:
    """Name of the artefact that a draft's folder is for."""
    return draft.rpartition("-")[0]


def remove_old_scratch(here: Path) -> None:
    """What workers that died left on their own machine, where no driver looks, of drafts that are no longer."""
    for other in open_folder(here.parent).folders():
        if artefact_of(other) == artefact_of(here.name) and other != here.name:
            shutil.rmtree(here.parent / other, ignore_errors=True)  # another worker may remove it, too


def remove_asides(here: Path) -> None:
    """What dead writers left: files, and folders that were to become chunks."""
    for leftover in [path for path in here.rglob("*") if is_aside(path.name)]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def write_note(here: Path, path: Path, source: Path) -> None:
    """Note what a file will hold that gets the name `path`, inside a draft, and is at `source` until then.

    A file whose note is another's, for the process died between the two, counts as damaged, and is made again.
    """
    note = _note_of(here, path)
    note.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(note)
    aside.write_text(_facts(source), encoding="ascii")
    os.replace(aside, note)


def fits_note(here: Path, path: Path) -> bool:
    """Whether a file of a draft holds what was written to it, as far as there is a note: of what workers write, receipts tell."""
    note = _note_of(here, path)
    return not note.exists() or note.read_bytes() == _facts(path).encode()


def _note_of(here: Path, path: Path) -> Path:
    return here / NOTES / path.relative_to(here).as_posix().replace("/", "~")


def _facts(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.stat().st_size} {block_sums(file)}"


def note_published(here: Path, digest: str) -> None:
    """Remember beside the lock which draft became what: a process that waited knows its own artefact by it."""
    note = here.with_name(f"{artefact_of(here.name)}.published")
    aside = aside_of(note)
    aside.write_text(f"{here.name} {digest}\n", encoding="utf-8")
    os.replace(aside, note)


def find_published(target: Folder, kind: str, here: Path) -> Artefact | None:
    """The artefact at `target`, where it was made of the same params, inputs and code as this draft would be."""
    note = here.with_name(f"{target.name}.published")
    if not note.exists():
        return None
    name, _, digest = note.read_text(encoding="utf-8").strip().rpartition(" ")
    if name != here.name or target.size(MANIFEST) is None or target.sha256(MANIFEST) != digest:
        return None
    return open_artefact(target, kind)
