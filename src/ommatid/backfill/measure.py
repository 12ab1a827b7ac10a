"""The backfill: measures every past SAE under the present params, computing only what is not there yet, and writes the catalogue."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ommatid.backfill.past import LeftOut, PastSAE, find_past, select_inputs
from ommatid.backfill.table import write_catalog
from ommatid.backfill.work import Counts, Measured, Work
from ommatid.config import ExtractFiles, Params
from ommatid.errors import ArtefactError, ConfigError
from ommatid.events import Listener, Warned, ignore
from ommatid.pipeline import open_stage
from ommatid.store import Artefact


@dataclass(frozen=True)
class Backfill:
    """What a backfill did."""

    catalog: Path
    """The catalogue, a DuckDB file."""
    saes: tuple[str, ...]
    """Names of the SAEs that were measured, oldest first."""
    left_out: tuple[LeftOut, ...]
    """SAEs that could not be measured, with the reasons."""
    computed: Mapping[str, int]
    """Number of results that were computed: by evaluation, judge (from the firings of an evaluation that was there) and labeller."""
    reused: Mapping[str, int]
    """Number of results that were there, by the same kinds."""

    @property
    def summary(self) -> str:
        """A sentence with all numbers."""
        kinds = ("evaluation", "judge", "labeller")
        counts = ", ".join(f"{kind}s: {self.computed.get(kind, 0)} computed, {self.reused.get(kind, 0)} found" for kind in kinds)
        left_out = f"; {len(self.left_out)} left out" if self.left_out else ""
        return f"{len(self.saes)} SAE{'s' * (len(self.saes) != 1)} in {self.catalog}{left_out}; {counts}"


def backfill(params: Params, on_event: Listener = ignore) -> Backfill:
    """Measure the past SAEs of the current directory.

    Args:
        params: All params. `evaluate` and `label` say what is measured; the images and activations are those that the checkout has.
        on_event: Called with each progress event and warning.

    Returns:
        What was done.

    Raises:
        ArtefactError: The checkout has no images or activations.
        ConfigError: The activations were imported from files, or there is no past SAE that fits the activations.
        OmmatidError: A measurement failed; what is finished is kept, and the next backfill continues.
    """
    if isinstance(params.extract, ExtractFiles):
        raise ConfigError("extract.source: files: a backfill evaluates SAEs on images, which imported activations do not have")
    images, extraction = open_stage("images"), open_stage("extract")
    past, gone = find_past()
    fitting: list[tuple[PastSAE, dict[str, Artefact]]] = []
    for one in past:
        try:
            inputs = select_inputs(one, images, extraction)
            one.artefact.verify()
            fitting.append((one, inputs))
        except ArtefactError as error:
            gone.append(LeftOut(one.name, one.decided_at, str(error)))
    for left in gone:
        on_event(Warned(f"{left.sae} is left out: {left.reason}"))
    if not fitting:
        raise ConfigError("there is no past SAE that fits these activations: train one, or let the flow retrain choose a champion")
    counts = Counts()
    work = Work(params, [one.artefact for one, _ in fitting], counts, on_event)
    measured: list[Measured] = [work.measure(one, inputs) for one, inputs in fitting]
    return Backfill(
        write_catalog(measured, gone), tuple(one.past.name for one in measured), tuple(gone), dict(counts.computed), dict(counts.reused)
    )
