"""The quality gate after every stage: it reduces an artefact to small frames, checks them against the stage's rules, and writes a report.

Each `<stage>.py` has two functions: `profile(artefact, params)` makes the frames, and `rules(params)` returns what must hold of them, and
why. `base` has what these files share, `gate` checks the rules with Great Expectations, which no other file imports, and `report` writes
the result as JSON and as a page. A new check is a rule in the file of its stage: docs/developers/add-a-gate.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from ommatid.compute.collector import collector_paused
from ommatid.config import Params, TrainParams
from ommatid.quality.report import Check, Report, write_report
from ommatid.store import Artefact

__all__ = ["Check", "Report", "check", "write_report"]


def check(stage: str, artefact: Artefact, params: Params, saes: Mapping[str, TrainParams]) -> Report:
    """Check an artefact against the rules of the stage that made it. It is read as a stream, in bounded memory.

    Args:
        stage: Name of the stage; its profile and rules are in the module of this name.
        artefact: Artefact that the stage made.
        params: Parameters of the run.
        saes: Training parameters of each SAE, by folder name, if the artefact has a child for each SAE; else empty. Each child is
            checked, and the checks name the SAE if there are several.

    Returns:
        The checks in the order of the rules, and the artefact's numbers.
    """
    with collector_paused():
        from ommatid.quality import gate  # great_expectations takes seconds to import

        module = import_module(f"{__name__}.{stage}")

    frames, rules = {}, []
    for sae, checked, its_params in _subjects(artefact, params, saes):
        frames |= {f"{sae or ''}{frame}": rows for frame, rows in module.profile(checked, its_params).items()}
        rules += [replace(rule, frame=f"{sae or ''}{rule.frame}", sae=sae) for rule in module.rules(its_params)]
    with collector_paused():  # a collection would walk through all that was imported
        checks = tuple(gate.validate(frames, rules))
    return Report(stage, checks, _summary(artefact, saes))


def _subjects(artefact: Artefact, params: Params, saes: Mapping[str, TrainParams]) -> Iterator[tuple[str | None, Artefact, Params]]:
    """Yield, for each artefact to check, the name of its SAE (None unless there are several), the artefact, and its parameters."""
    if not saes:
        yield None, artefact, params
    inside = artefact.each() if saes else {}
    for name, train in saes.items():
        yield name if len(saes) > 1 else None, inside[name], params.model_copy(update={"train": train})


def _summary(artefact: Artefact, saes: Mapping[str, TrainParams]) -> dict[str, Any]:
    """Return the summary for the report. That of a single SAE is not nested, so that runs can be compared whatever its name."""
    of = {name: child.summary for name, child in artefact.each().items()} if saes else {}
    return artefact.summary if not of else of if len(of) > 1 else next(iter(of.values()))
