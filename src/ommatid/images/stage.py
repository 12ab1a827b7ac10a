"""Stage `images`: makes the data set from a source of images."""

from collections.abc import Mapping

from ommatid.config import ImagesParams
from ommatid.events import Listener, Progress, Warned, ignore
from ommatid.images.dataset import Collection
from ommatid.images.examine import REMARKS, Earlier, Examiner, settings_of
from ommatid.images.memory import Memory
from ommatid.images.source import choose, open_source
from ommatid.images.workers import look_elsewhere
from ommatid.store import Artefact, Draft

_ITEMS_PER_EVENT = 256
"""Images between two progress events."""


def run(params: ImagesParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Make the data set: read all images of a source and write the tables `images` and `rejected`.

    Only what is new is read and decoded: what earlier runs found is remembered (see `memory.py`), and the bytes of images that the artefact
    to be replaced holds already are copied from it. The result is the same.

    Unreadable and repeated images never stop the run; they are listed in `rejected`. Warnings say which files of the source are not used.
    Apart from ids and paths, memory does not grow with the number of images. A draft begun on the same content is continued.

    Args:
        params: The `images` section of the params.
        inputs: Not used, because the stage has no inputs.
        draft: Draft of the data set.
        on_event: Called with each progress event and warning.

    Returns:
        The sealed data set.

    Raises:
        SourceError: The source is missing or empty, or differs from what the params say; the message has the path and what to do.
        OSError: The draft cannot be written.
    """
    source = open_source(params.source)
    for notice in source.notices:
        on_event(Warned(notice))
    positions = choose(source, params.limit)
    collection = Collection(draft, params.eval_share, source.fingerprint)
    with Memory(settings_of(params.thumbnail), lambda line: on_event(Warned(line))) as memory:
        left, earlier = positions[collection.n_seen :], Earlier(draft.place)
        if params.executor.kind != "local":
            done = lambda *counts: on_event(Progress("images decoded by workers", *counts))  # noqa: E731
            look_elsewhere(params, source, left, draft, memory, earlier, done)
        examiner = Examiner(params.thumbnail, memory, earlier, params.by_reference, "://" in params.source.path)
        for result in examiner.examine_all(source.iter_items(left)):
            collection.add(result)
            if collection.n_seen % _ITEMS_PER_EVENT == 0 or collection.n_seen == len(positions):
                memory.flush()
                on_event(Progress("images", collection.n_seen, len(positions)))
    for key, what in REMARKS.items():
        if n := collection.remarks[key]:
            on_event(Warned(f"{n} of {collection.n_images} images {'is' if n == 1 else 'are'} {what}"))
    return collection.seal()
