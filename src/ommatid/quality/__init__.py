"""The gate behind every stage: it reduces an artefact to small frames, holds them against the rules of its stage, and reports.

`<stage>.py` has both for one stage: `profile(artefact, params)` makes the frames, `rules(params)` says what must hold of them and
why. `base` has what these files share, `gate` asks Great Expectations whether the rules hold (no other file imports it), and `report`
writes the answer as JSON and as a page. A new check is a rule in the file of its stage: docs/developers/add-a-gate.md.
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

from ommatid.config import Params, TrainParams
from ommatid.quality.report import Check, Report, write_report
from ommatid.store import Artefact

__all__ = ["Check", "Report", "check", "write_report"]


def check(stage: str, artefact: Artefact, params: Params, saes: Mapping[str, TrainParams]) -> Report:
    """Hold an artefact against the rules of the stage that made it; reads it as a stream, in bounded memory.

    Args:
        stage: Name of the stage; its profile and rules are in the module of this name.
        artefact: Artefact that the stage made.
        params: Parameters of the run.
        saes: Training parameters of each SAE, for a stage whose artefact has one inside for each SAE. The rules hold for each,
            and the checks name the SAE where there are several.

    Returns:
        The checks in the order of the rules, and the artefact's numbers.
    """
    with _uncollected():
        from ommatid.quality import gate  # great_expectations takes seconds to import

        made_by = import_module(f"{__name__}.{stage}")

    frames, rules = {}, []
    for sae, one, own in _subjects(artefact, params, saes):
        frames |= {f"{sae or ''}{frame}": rows for frame, rows in made_by.profile(one, own).items()}
        rules += [replace(rule, frame=f"{sae or ''}{rule.frame}", sae=sae) for rule in made_by.rules(own)]
    return Report(stage, tuple(gate.validate(frames, rules)), _summary(artefact, saes))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause garbage collection: imports leave next to no garbage, and the search takes a seventh of Great Expectations' import."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _subjects(artefact: Artefact, params: Params, saes: Mapping[str, TrainParams]) -> Iterator[tuple[str | None, Artefact, Params]]:
    """Each thing that the rules must hold for: name of its SAE, None where there is only one, its artefact and its parameters."""
    if not saes:
        yield None, artefact, params
    inside = artefact.each() if saes else {}
    for name, train in saes.items():
        yield name if len(saes) > 1 else None, inside[name], params.model_copy(update={"train": train})


def _summary(artefact: Artefact, saes: Mapping[str, TrainParams]) -> dict[str, Any]:
    """The numbers of the report. A single SAE's stand at the top, so that runs with one SAE compare whatever it is called."""
    of = {name: one.summary for name, one in artefact.each().items()} if saes else {}
    return artefact.summary if not of else of if len(of) > 1 else next(iter(of.values()))
