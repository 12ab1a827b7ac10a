"""What differs between an artefact's files and its manifest."""

from collections.abc import Mapping, Sequence

from ommatid.errors import ArtefactError
from ommatid.folder import Disk, Folder
from ommatid.store.manifest import File, child_of

_MOST_NAMED = 100
"""Files that an error names; the rest are counted."""


def size_damage(folder: Folder, files: Sequence[File]) -> list[str]:
    """What is missing or of another size; children are looked at by their manifests."""
    found = folder.sizes()
    for file in files:
        if child_of(file.name) and (size := folder.size(file.name)) is not None:
            found[file.name] = size
    return differences(found, files)


def differences(found: Mapping[str, int], files: Sequence[File]) -> list[str]:
    """Of sizes found on the disk from those listed."""
    missing = [f"{file.name}: missing" for file in files if file.name not in found]
    wrong = [(file, found[file.name]) for file in files if found.get(file.name, file.bytes) != file.bytes]
    return missing + [f"{file.name}: {size} bytes, the manifest says {file.bytes}" for file, size in wrong]


def raise_damage(folder: Folder, damage: list[str]) -> None:
    """Say what is damaged, if anything is.

    Raises:
        ArtefactError: naming it, and what to do.
    """
    if damage:
        more = f"; and {len(damage) - _MOST_NAMED} more" if len(damage) > _MOST_NAMED else ""
        repro = "bring it back with `dvc checkout`, or delete the folder and run `dvc repro`"
        todo = repro if isinstance(folder, Disk) else "delete what is there and make it again"
        raise ArtefactError(f"{folder}: damaged ({len(damage)}): {'; '.join(damage[:_MOST_NAMED])}{more}; {todo}")
