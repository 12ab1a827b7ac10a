"""The output of `ommatid drift`: whether new images differ from the champion's, and the latents that fire differently."""

import json
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from ommatid.cli.terminal import align, say, showing
from ommatid.config import load_params
from ommatid.publish.drift import Outcome, check_drift, stop_if_drifted
from ommatid.show.drift import TESTS, VERDICTS

NAME = 40
"""Characters of a name of a latent that are printed."""


def run(params_file: Path, overrides: list[str], limit: int, as_json: bool) -> None:
    """Compare the checkout's new images with the champion's, and print what was found.

    Args:
        params_file: The params file.
        overrides: Values to override.
        limit: Number of changed latents to print, those with the strongest evidence first.
        as_json: Whether to print JSON.

    Raises:
        DriftError: There is drift, and `drift.action` is `stop`.
    """
    params = load_params(params_file, overrides)
    with showing(sys.stderr if as_json else sys.stdout) as on_event:
        outcome = check_drift(params, on_event)
    if as_json:
        say(json.dumps(_as_json(outcome, limit), indent=1, default=_text))
    else:
        for line in iter_lines(outcome, limit):
            say(line)
    stop_if_drifted(params, outcome)


def _as_json(outcome: Outcome, limit: int) -> dict[str, Any]:
    rows = [row for row in outcome.check.latents(limit) if row["is_changed"]] if outcome.check else []
    return {"verdict": outcome.verdict, "reason": outcome.reason, "check": outcome.check and outcome.check.row, "latents": rows}


def _text(value: Any) -> str:
    return value.isoformat(" ", "seconds") if isinstance(value, datetime) else str(value)


def iter_lines(outcome: Outcome, limit: int) -> Iterator[str]:
    """Iterate over the lines that say what was found."""
    if outcome.check is None:
        yield f"not compared: {outcome.reason}"
        return
    row = outcome.check.row
    yield f"{VERDICTS[outcome.verdict]}: {outcome.reason}"
    tests = [
        (test.title, test.value(row), test.chance(row), f"{row[test.p]:.2g}{' *' if row[test.p] <= row['alpha'] else ''}")
        for test in TESTS
        if row[test.p] is not None
    ]
    if tests:
        yield from align([("compared", "found", "by chance", "p, adjusted"), *tests])
    changed = [one for one in outcome.check.latents(limit) if one["is_changed"]]
    if changed:
        head = ("latent", "name", "change", "new images", "before", "activation", "before")
        yield from align([head, *(_cells(one) for one in changed)])
        yield f"pictures  /drift?check={row['check_id']} of `ommatid serve --published`"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    acts = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("act", "act_before")]
    rates = [f"{100 * row[key]:.1f} %" for key in ("rate", "rate_before")]
    return (str(row["latent"]), (row["label"] or "without a name")[:NAME], row["change"], *rates, *acts)
