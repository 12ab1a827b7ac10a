"""The gate behind every stage: profile an artefact, hold the profile against the stage's suite, report.

`profiles` reduces an artefact to small frames, `suites` says what must hold of them and why, `gate` asks Great Expectations
whether it does (the only file that imports it), `report` writes the result as JSON and as a page.
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ommatid.config import Params, TrainParams
from ommatid.quality.report import Check, Report, write_report
from ommatid.store import Artefact

__all__ = ["Check", "Report", "check", "write_report"]


def check(stage: str, artefact: Artefact, params: Params, saes: Mapping[str, TrainParams]) -> Report:
    """Hold the artefact that `stage` made against the suite of that stage; reads it in a stream, in bounded memory.

    Args:
        stage: Which.
        artefact: What it made.
        params: Of the run.
        saes: Of a stage with an artefact inside for each SAE: what each was trained by. The suite holds for each, and its
            checks name the SAE where there are several.
    """
    with _uncollected():
        from ommatid.quality import gate, profiles, suites  # great_expectations takes seconds to import

    frames, rules = {}, []
    for sae, one, own in _subjects(artefact, params, saes):
        frames |= {f"{sae or ''}{frame}": rows for frame, rows in profiles.PROFILES[stage](one, own).items()}
        rules += [replace(rule, frame=f"{sae or ''}{rule.frame}", sae=sae) for rule in suites.SUITES[stage](own)]
    return Report(stage, tuple(gate.validate(frames, rules)), _summary(artefact, saes))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage in this block: imports leave next to none, and looking for it takes a seventh of Great Expectations' import."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _subjects(artefact: Artefact, params: Params, saes: Mapping[str, TrainParams]) -> Iterator[tuple[str | None, Artefact, Params]]:
    """What the suite must hold of: the SAE that its checks name, the artefact, and its params."""
    if not saes:
        yield None, artefact, params
    inside = artefact.each() if saes else {}
    for name, train in saes.items():
        yield name if len(saes) > 1 else None, inside[name], params.model_copy(update={"train": train})


def _summary(artefact: Artefact, saes: Mapping[str, TrainParams]) -> dict[str, Any]:
    """The numbers of the report: of a single SAE its own, so that runs with one SAE compare whatever it is called."""
    of = {name: one.summary for name, one in artefact.each().items()} if saes else {}
    return artefact.summary if not of else of if len(of) > 1 else next(iter(of.values()))
