"""The declaration of a stage: what it reads, what it makes, and what is done with its artefact.

Every stage has a package of its own name. The package's `__init__.py` declares the stage as `STAGE` and imports no other module of it;
its `stage.py` computes the artefact in `run(params, inputs, draft, on_event)`. `ommatid.pipeline` finds both by the stage's name.

The stage `sources` of dvc.yaml makes no artefact and is not declared here.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ommatid.compute.collector import collector_paused

if TYPE_CHECKING:
    from ommatid.config import Section
    from ommatid.events import Listener
    from ommatid.store import Artefact, Draft
    from ommatid.store.filesystem import Folder

DATA = "data"
"""Default root of all artefacts, relative to the checkout."""
QUALITY = Path("data/quality")
"""Folder of the gates' reports, relative to the checkout. Under another root than `DATA` the folder has the same name."""
HEALTH = "health"
"""Folder in `QUALITY` with one picture of every trained dictionary."""
REPORT = "report.html"
"""Page in `QUALITY` that reports the results, written together with the catalogue."""


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Functions of other packages are named as "module:function", so that a declaration imports neither torch nor any other library.
    """

    name: str
    """Name of the stage, which is also that of its verb, of its section in params.yaml and of its package."""
    kind: str
    """Kind of the artefact that the stage makes."""
    place: Path
    """Folder of the artefact, relative to the checkout. Under another root than `DATA` the folder has the same name."""
    inputs: tuple[str, ...] = ()
    """Names of the stages whose artefacts it reads."""
    is_per_sae: bool = False
    """Whether its artefact holds one artefact for each SAE. The gate judges each, and the SAE's MLflow run records its numbers."""
    reads_target: bool = False
    """Whether it compares reconstructions with what they should be, and therefore also reads `target` for a transcoder."""
    has_binding_params: bool = True
    """Whether later stages of a study must use the params with which this stage's artefact was made."""
    memory_advice: str | None = None
    """What the user can do to reduce the stage's memory use; None if that depends little on the params."""
    opener: str | None = None
    """Function that selects the artefacts inside this stage's that another stage reads. It is called with the artefact, the reading stage
    and the params, and returns artefacts by name of the input. If None, later stages read the artefact as it is."""
    recorder: str | None = None
    """Context manager that records the stage in MLflow while it runs. It is called with params, inputs and whether DVC versions the
    artefacts, and yields an object with `tee(listener)` and `finish(artefact)`."""
    drawer: str | None = None
    """Function that draws pictures of the artefact before the gate judges it, so that they show why it failed. It is called with the
    artefact and the reports' folder, and returns the files of each SAE."""
    reporter: str | None = None
    """Function that writes a report about the artefact once it has passed the gate. It is called with the artefact and the reports'
    folder, and returns the file."""

    @property
    def is_tracked(self) -> bool:
        """Whether the results of this stage are logged to the MLflow runs of the SAEs."""
        return self.is_per_sae or self.reporter is not None

    def run(self, params: "Section", inputs: Mapping[str, "Artefact"], draft: "Draft", on_event: "Listener") -> "Artefact":
        """Compute the stage's artefact into a draft, with the function `run` of the package's module `stage`.

        Args:
            params: The stage's own section of the params.
            inputs: Artefacts to read, by name of the stage that made them.
            draft: Draft of the artefact. One that a killed run began is continued.
            on_event: Called with each progress event and warning.

        Returns:
            The sealed artefact, which is not published yet.
        """
        return load(f"ommatid.{self.name}.stage:run")(params, inputs, draft, on_event)


def load(reference: str) -> Callable[..., Any]:
    """Return the function that a reference of the form "module:function" names."""
    module, name = reference.split(":")
    with collector_paused():
        return getattr(import_module(module), name)


def is_checkouts(data: "Folder | str") -> bool:
    """Return whether a data root is the checkout's own, in which DVC versions the artefacts."""
    from ommatid.store.filesystem import open_folder

    path = open_folder(data).local_path()
    return path is not None and path.resolve() == Path(DATA).resolve()


def __getattr__(name: str) -> Any:
    """Return `open_stage` under its old name, which works for one more release."""
    if name != "open_stage":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "ommatid.stage.open_stage is now in ommatid.pipeline; the old name goes with the next release", DeprecationWarning, stacklevel=2
    )
    return load("ommatid.pipeline:open_stage")
