"""The stage `images`: a source becomes the data set."""

from collections.abc import Mapping
from pathlib import Path
from typing import assert_never

from ommatid.config import Cifar10Source, FolderSource, ImageSource, ImagesParams, ParquetSource, ShapesSource
from ommatid.events import Listener, Progress, Warned, ignore
from ommatid.images.cifar10 import Cifar10
from ommatid.images.dataset import REMARKS, Collection, examine_all
from ommatid.images.folder import Folder
from ommatid.images.parquet import ParquetFiles
from ommatid.images.shapes import Shapes
from ommatid.images.source import Source, spread
from ommatid.store import Artefact, Draft

_ITEMS_PER_EVENT = 256


def run(params: ImagesParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Read a source into the draft: the tables `images` and `rejected`, sealed. It has no `inputs`.

    What cannot be read or was there before is listed and never stops the run, and what of the source is not used is said. Memory does
    not depend on the number of images but for their ids and paths. A draft begun on the same content is continued.

    Raises:
        SourceError: the source is missing, empty or not what params say; names the path and what to do.
        OSError: the draft cannot be written.
    """
    source = open_source(params.source)
    for notice in source.notices:
        on_event(Warned(notice))
    positions = spread(source.total, params.limit)
    collection = Collection(draft, params.eval_share, source.fingerprint)
    items = source.iter_items(positions[collection.n_seen :])
    for result in examine_all(items, params.thumbnail):
        collection.add(result)
        if collection.n_seen % _ITEMS_PER_EVENT == 0 or collection.n_seen == len(positions):
            on_event(Progress("images", collection.n_seen, len(positions)))
    for key, what in REMARKS.items():
        if n := collection.remarks[key]:
            on_event(Warned(f"{n} of {collection.n_images} images {'is' if n == 1 else 'are'} {what}"))
    return collection.seal()


def open_source(params: ImageSource) -> Source:
    """The source that params name; relative paths start at the current directory.

    Raises:
        SourceError: it is missing, empty or not what params say.
    """
    match params:
        case Cifar10Source():
            return Cifar10(Path(params.path))
        case FolderSource():
            return Folder(params.path)
        case ParquetSource():
            return ParquetFiles(params)
        case ShapesSource():
            return Shapes(Path(params.path))
        case _:
            assert_never(params)
