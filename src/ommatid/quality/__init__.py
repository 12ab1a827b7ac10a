"""The gate behind every stage: profile an artefact, hold the profile against the stage's suite, report.

`profiles` reduces an artefact to small frames, `suites` says what must hold of them and why, `gate` asks Great Expectations
whether it does (the only file that imports it), `report` writes the result as JSON and as a page.
"""

from ommatid.config import Params
from ommatid.quality.report import Check, Report, write_report
from ommatid.store import Artefact

__all__ = ["Check", "Report", "check", "write_report"]


def check(stage: str, artefact: Artefact, params: Params) -> Report:
    """Hold the artefact that `stage` made against the suite of that stage; reads it in a stream, in bounded memory."""
    from ommatid.quality import gate, profiles, suites  # great_expectations takes seconds to import

    frames = profiles.PROFILES[stage](artefact, params)
    rules = suites.SUITES[stage](params)
    return Report(stage, tuple(gate.validate(frames, rules)), artefact.summary)
