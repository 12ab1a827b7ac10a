"""The pipeline: all stages in order, and their artefacts. `run` runs one stage from end to end, and `inputs` opens what it reads.

Stages are declared in their own packages (see ommatid/stage.py), and nothing here depends on a stage's name.
"""

from collections.abc import Mapping
from importlib import import_module

from ommatid import store
from ommatid.config import STAGE_NAMES
from ommatid.stage import DATA, Stage
from ommatid.store import Artefact
from ommatid.store.filesystem import Folder, open_folder

STAGES: Mapping[str, Stage] = {name: import_module(f"ommatid.{name}").STAGE for name in STAGE_NAMES}
"""Every stage by its name, in the order in which the pipeline runs them."""


def place_of(name: str, data: str = DATA) -> Folder:
    """Locate the artefact of a stage.

    Args:
        name: Name of the stage.
        data: Root of the artefacts, a path or URL.

    Returns:
        The artefact's folder, whether it exists or not.
    """
    return open_folder(data) / STAGES[name].place.name


def open_stage(name: str, hookpoint: str | None = None, data: str = DATA) -> Artefact:
    """Open the artefact that a stage made.

    Args:
        name: Name of the stage.
        hookpoint: Hookpoint whose activations to open inside the artefact of `extract`; None opens the artefact itself.
        data: Root of the artefacts, a path or URL.

    Returns:
        The artefact, or the activations inside it.

    Raises:
        ArtefactError: The artefact is missing or damaged, or does not contain activations of that hookpoint.
    """
    artefact = store.open_artefact(place_of(name, data), STAGES[name].kind)
    return artefact if hookpoint is None else artefact.child(hookpoint, "activations")
