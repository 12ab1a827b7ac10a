"""The report of a gate: as values, as JSON that `dvc metrics show` reads, and as a page that needs no network."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from ommatid.config import dotted
from ommatid.store.filesystem import replace_text


@dataclass(frozen=True)
class Check:
    """One expectation and its outcome."""

    name: str
    """What must hold, in a few words."""
    reason: str
    """Why it must hold: what would go wrong later if it did not."""
    success: bool
    """Whether it holds."""
    observed: str
    """Values that were found."""
    detail: str
    """Failing rows or parts; empty if the check passed."""
    sae: str | None = None
    """Name of the SAE that the check is about, if the artefact holds several; None if it is about the artefact as a whole."""

    @property
    def title(self) -> str:
        """Name of the check, preceded by that of the SAE if there is one."""
        return f"{self.sae}: {self.name}" if self.sae else self.name


@dataclass(frozen=True)
class Report:
    """All checks of one stage's artefact."""

    stage: str
    """Stage that made the artefact."""
    checks: tuple[Check, ...]
    """Checks in the order of the rules."""
    summary: dict[str, Any]
    """Summary from the artefact's manifest."""

    @property
    def success(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """Checks that failed."""
        return tuple(check for check in self.checks if not check.success)

    @property
    def rejected(self) -> dict[str, str]:
        """SAEs that failed a check while others passed, with the reason. The rest of the artefact can be published without them.

        Empty if all SAEs passed, all failed, or the artefact as a whole failed.
        """
        reasons: dict[str, list[str]] = {}
        for check in self.failures:
            if check.sae is None:
                return {}
            reasons.setdefault(check.sae, []).append(f"{check.name}: {check.detail}")
        saes = {check.sae for check in self.checks}
        return {sae: "; ".join(its_reasons) for sae, its_reasons in reasons.items()} if len(reasons) < len(saes) else {}

    @property
    def numbers(self) -> dict[str, float]:
        """Finite numbers of the summary, by dotted key."""
        flat = dotted(self.summary)
        return {key: value for key, value in flat.items() if isinstance(value, int | float) and math.isfinite(value)}


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `<stage>.json` and `<stage>.html`. Both are outputs of DVC, so the same report always makes the same bytes.

    Returns:
        The paths of the JSON file and of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    json_path, html_path = folder / f"{report.stage}.json", folder / f"{report.stage}.html"
    replace_text(json_path, json.dumps(_as_json(report), indent=2) + "\n")
    replace_text(html_path, _as_html(report))
    return json_path, html_path


def _as_json(report: Report) -> dict[str, Any]:
    # `dvc metrics show` makes a column of every number and string that is not in a list, so details go into lists.
    counts = {
        "success": report.success,
        "n_checks": len(report.checks),
        "n_failed": len(report.failures),
        "n_rejected": len(report.rejected),
    }
    rejected = [{"sae": sae, "reason": reason} for sae, reason in report.rejected.items()]
    return {**counts, "summary": report.numbers, "rejected": rejected, "checks": [asdict(check) for check in report.checks]}


def _as_html(report: Report) -> str:
    loader = jinja2.PackageLoader("ommatid", "show/templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    return environment.get_template("quality.html").render(report=report)


def _number(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
