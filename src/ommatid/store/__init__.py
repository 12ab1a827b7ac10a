"""Artefacts: folders of Parquet files and a manifest. Each is written as a draft elsewhere, and moved into place once it is complete.

A folder lies on a disk or in an object store (see filesystem/). Each machine keeps locks, scratch files and copies of objects on its own
disk, so a lock excludes only other processes of the same machine. Two machines that make the same artefact write identical files under the
same names, and no file appears before it is complete. If one of them publishes or removes the draft, the other notices before it seals the
draft, and stops.
"""

from ommatid.store.artefact import Artefact, checked_folder, list_artefacts, open_artefact, read_part
from ommatid.store.draft import Draft, open_draft
from ommatid.store.manifest import INSIDE, MANIFEST, File, Manifest, describe, part_name
from ommatid.store.workspace import RECEIPTS, SCRATCH
from ommatid.store.writer import Writer

__all__ = [
    "INSIDE",
    "MANIFEST",
    "RECEIPTS",
    "SCRATCH",
    "Artefact",
    "Draft",
    "File",
    "Manifest",
    "Writer",
    "checked_folder",
    "describe",
    "list_artefacts",
    "open_artefact",
    "open_draft",
    "part_name",
    "read_part",
]
