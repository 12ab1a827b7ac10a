"""What a run shows in the Prefect UI, as Markdown made from the files that its stages left. Imports no Prefect."""

import base64
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ommatid.catalog.reader import Catalog
from ommatid.pipeline import STAGES
from ommatid.publish.champion import Decision
from ommatid.stage import HEALTH, QUALITY, REPORT

HEADLINES = ("evaluate", "label")
N_FEATURES = 10
N_DICTIONARIES = 8
"""Whose pictures of health are shown: each takes some 50 kB of Prefect's database."""


def progress_in(line: str) -> tuple[str, float] | None:
    """`extract images: 2048 of 8192` -> ("extract images", 25.0); None where a line tells no progress."""
    found = re.fullmatch(r"(.*\S): (\d+) of ([1-9]\d*)", line)
    return (found[1], min(100.0, 100 * int(found[2]) / int(found[3]))) if found else None


def quality(root: Path, stage: str) -> str | None:
    """The report of a stage's gate: a row for each check."""
    report = _read(root, stage)
    if not report:
        return None
    rows = [
        (f"{'passed' if check['success'] else '**failed**'}", _title(check), check["observed"], check["detail"] or check["reason"])
        for check in report.get("checks", ())
    ]
    rejected = [f"{one['sae']} is **rejected**: {one['reason']}" for one in report.get("rejected", ())]
    verdict = "passed" if report.get("success") else f"{len(rejected)} rejected" if rejected else "**failed**"
    return "\n\n".join([f"# {stage}: {verdict}", *rejected, _table(("", "check", "found", "why, or what failed"), rows)])


def _title(check: dict[str, Any]) -> str:
    return f"{check['sae']}: {check['name']}" if check.get("sae") else check["name"]


def health(root: Path) -> str | None:
    """Pictures of the dictionaries that were trained; None where there are none."""
    pictures = sorted((root / QUALITY / HEALTH).glob("*.png"))
    shown = [f"![latents and curves of {path.stem}]({_embed(path.read_bytes())})" for path in pictures[:N_DICTIONARIES]]
    more = [f"{len(pictures) - len(shown)} more in `{QUALITY / HEALTH}`"] if len(pictures) > len(shown) else []
    return "\n\n".join(["# What training made", *shown, *more]) if shown else None


def headline(root: Path) -> str | None:
    """The numbers of evaluation and labels."""
    parts = []
    for stage in HEADLINES:
        if report := _read(root, stage):
            parts.append(f"# {stage}\n\n" + _numbers(report.get("summary", {})))
    return "\n\n".join(parts) or None


def _numbers(summary: dict[str, float]) -> str:
    """A row for each number, with a column for each SAE where there are several: then keys are `<sae>.<number>`."""
    columns: dict[str, dict[str, float]] = {}
    for key, value in summary.items():
        sae, _, number = key.rpartition(".")
        columns.setdefault(sae, {})[number] = value
    keys = list(dict.fromkeys(number for column in columns.values() for number in column))
    rows = [(f"`{key}`", *(f"{column[key]:.4g}" if key in column else "" for column in columns.values())) for key in keys]
    return _table(("", *(sae or "value" for sae in columns)), rows)


def features(root: Path) -> str | None:
    """The best features of the best SAE as a picture that needs no network; None where the pipeline has made no catalogue."""
    from ommatid.show.pictures import draw_best

    picture = _picture(root, lambda catalog, png: draw_best(catalog, png, N_FEATURES))
    return picture and f"# The {N_FEATURES} features with the highest monosemanticity\n\n![examples of each feature]({picture})"


def comparison(root: Path) -> str | None:
    """All SAEs beside one another, likewise."""
    from ommatid.show.pictures import draw_comparison

    picture = _picture(root, draw_comparison)
    return picture and f"# The SAEs beside raw neurons and untrained ones\n\n![fidelity and monosemanticity of each]({picture})"


def report(root: Path) -> str | None:
    """What was found in the best SAE: numbers, tables and plots; the page `report.html` of the quality reports has features as well."""
    from ommatid.show.report import make_report

    catalogue = root / STAGES["catalog"].place / "catalog.duckdb"
    if not catalogue.exists():
        return None
    with Catalog(catalogue) as catalog:
        made = make_report(catalog)
    first = _table(("", "", ""), [(f"**{headline.value}**", headline.name, headline.meaning) for headline in made.headlines])
    parts = [f"# {_cell(made.title)}, {_cell(made.sae)}", first, f"With features as pictures: `{QUALITY / REPORT}`"]
    for section in made.sections:
        if section.table or section.picture:
            parts += [f"## {section.title}", section.reading]
        if section.table:
            parts.append(_table(section.table.head, list(section.table.rows)))
        if section.picture:
            parts.append(f"![{section.title}]({_embed(section.picture)})")
    return "\n\n".join(parts)


def _picture(root: Path, draw: Callable[[Catalog, Path], None]) -> str | None:
    """A picture of the catalogue inside its own address."""
    catalogue = root / STAGES["catalog"].place / "catalog.duckdb"
    if not catalogue.exists():
        return None
    with tempfile.TemporaryDirectory() as folder, Catalog(catalogue) as catalog:
        png = Path(folder) / "picture.png"
        draw(catalog, png)
        return _embed(png.read_bytes())


def _embed(png: bytes) -> str:
    """A picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def decision(made: Decision) -> str:
    """Champion and challenger side by side."""
    keys = ("sae", "ms", "ms_floor", "fvu", "dead", "l0")
    sides = (made.champion, made.challenger)
    rows = [(key, *(_number(getattr(scores, key)) if scores else "" for scores in sides)) for key in keys]
    return f"# {made.decision}: {made.reason}\n\n" + _table(("", "champion before", "challenger"), rows)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _read(root: Path, stage: str) -> dict[str, Any] | None:
    path = root / QUALITY / f"{stage}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
