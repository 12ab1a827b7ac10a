"""The pages that a run shows in the Prefect UI, in Markdown made from the files that its stages wrote. Imports no Prefect."""

import base64
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ommatid.catalog.identity import KINDS
from ommatid.catalog.reader import Catalog
from ommatid.pipeline import STAGES
from ommatid.publish.champion import folder_of
from ommatid.publish.decisions import Decision, find_champion
from ommatid.publish.drift import Outcome
from ommatid.show.drift import TESTS, VERDICTS, describe_change, draw_changed
from ommatid.stage import HEALTH, QUALITY, REPORT

if TYPE_CHECKING:
    from ommatid.backfill.measure import Backfill

HEADLINES = ("evaluate", "label", "intervene")
PAST_SAES = """
    SELECT sae, decided_at, hookpoint, ms - ms_floor, fvu, dead, label_score, control_score FROM runs ORDER BY decided_at NULLS LAST, sae
"""
SCORES = {
    "sae": ("SAE", ""),
    "ms": ("MS", "MonoSemanticity score, how similar the images are on which a latent fires (more is better)"),
    "ms_floor": ("MS by chance", "MS of unrelated images"),
    "fvu": ("FVU", "share of the activations' variance that it does not explain (less is better)"),
    "dead": ("dead", "share of latents that never fire (less is better)"),
    "l0": ("L0", "number of latents that fire per token"),
}
"""Name and meaning of each score of champion and challenger."""
N_FEATURES = 10
N_CHANGED = 8
"""Number of changed features that are shown of a check of drift."""
N_DICTIONARIES = 8
"""Maximum number of dictionaries whose health is shown; each picture takes about 50 kB of Prefect's database."""


def progress_in(line: str) -> tuple[str, float] | None:
    """Parse a line of progress: `extract images: 2048 of 8192` gives ("extract images", 25.0), any other line gives None."""
    found = re.fullmatch(r"(.*\S): (\d+) of ([1-9]\d*)", line)
    return (found[1], min(100.0, 100 * int(found[2]) / int(found[3]))) if found else None


def quality(root: Path, stage: str) -> str | None:
    """Make the page of a stage's quality gate, with a row for each check; None if the stage has no report."""
    report = _read(root, stage)
    if not report:
        return None
    rows = [
        (f"{'passed' if check['success'] else '**failed**'}", _title(check), check["observed"], check["detail"] or check["reason"])
        for check in report.get("checks", ())
    ]
    rejected = [f"{entry['sae']} is **rejected**: {entry['reason']}" for entry in report.get("rejected", ())]
    verdict = "passed" if report.get("success") else f"{len(rejected)} rejected" if rejected else "**failed**"
    return "\n\n".join([f"# {stage}: {verdict}", *rejected, _table(("", "check", "observed", "reason or failure"), rows)])


def _title(check: dict[str, Any]) -> str:
    return f"{check['sae']}: {check['name']}" if check.get("sae") else check["name"]


def health(root: Path) -> str | None:
    """Make the page with pictures of the trained dictionaries; None if there are none."""
    pictures = sorted((root / QUALITY / HEALTH).glob("*.png"))
    shown = [f"![latents and curves of {path.stem}]({_embed(path.read_bytes())})" for path in pictures[:N_DICTIONARIES]]
    more = [f"{len(pictures) - len(shown)} more in `{QUALITY / HEALTH}`"] if len(pictures) > len(shown) else []
    return "\n\n".join(["# Trained dictionaries", *shown, *more]) if shown else None


def headline(root: Path) -> str | None:
    """Make the page with the numbers of evaluation, labels and interventions; None if there are none yet."""
    parts = []
    for stage in HEADLINES:
        if report := _read(root, stage):
            parts.append(f"# {stage}\n\n" + _numbers(report.get("summary", {})))
    return "\n\n".join(parts) or None


def _numbers(summary: dict[str, float]) -> str:
    """Make a table with a row for each number; for several SAEs, keys are `<sae>.<number>`, and each SAE has a column."""
    columns: dict[str, dict[str, float]] = {}
    for key, value in summary.items():
        sae, _, number = key.rpartition(".")
        columns.setdefault(sae, {})[number] = value
    keys = list(dict.fromkeys(number for column in columns.values() for number in column))
    rows = [(f"`{key}`", *(f"{column[key]:.4g}" if key in column else "" for column in columns.values())) for key in keys]
    return _table(("", *(sae or "value" for sae in columns)), rows)


def features(root: Path) -> str | None:
    """Make the page with an embedded picture of the best SAE's best features; None if there is no catalogue."""
    from ommatid.show.pictures import draw_best

    picture = _picture(_catalog_in(root), lambda catalog, png: draw_best(catalog, png, N_FEATURES))
    return picture and f"# The {N_FEATURES} features with the highest monosemanticity\n\n![examples of each feature]({picture})"


def comparison(root: Path) -> str | None:
    """Make the page with an embedded picture that compares all SAEs; None if there is no catalogue."""
    from ommatid.show.pictures import draw_comparison

    picture = _picture(_catalog_in(root), draw_comparison)
    return picture and f"# The SAEs compared with raw neurons and untrained SAEs\n\n![fidelity and monosemanticity of each]({picture})"


def report(root: Path) -> str | None:
    """Make the report on the best SAE, with numbers, tables and plots but without features; None if there is no catalogue."""
    from ommatid.show.report import make_report

    catalogue = root / STAGES["catalog"].place / "catalog.duckdb"
    if not catalogue.exists():
        return None
    with Catalog(catalogue) as catalog:
        made = make_report(catalog)
    first = _table(("", "", ""), [(f"**{headline.value}**", headline.name, headline.meaning) for headline in made.headlines])
    parts = [f"# {_cell(made.title)}, {_cell(made.sae)}", first, f"The full report, with pictures of features, is `{QUALITY / REPORT}`."]
    for section in made.sections:
        if section.table or section.picture:
            parts += [f"## {section.title}", section.reading]
        if section.table:
            parts.append(_table(section.table.head, list(section.table.rows)))
        if section.picture:
            parts.append(f"![{section.title}]({_embed(section.picture)})")
    return "\n\n".join(parts)


def explorer(root: Path) -> str | None:
    """Make the page that leads to the explorer of `make up`; None if there is no catalogue, or no explorer that could show it."""
    from ommatid.explorer.web import link

    address, catalogue = os.environ.get("OMMATID_EXPLORER_URL"), root / STAGES["catalog"].place / "catalog.duckdb"
    if not address or not catalogue.exists():
        return None
    with Catalog(catalogue) as catalog:
        found = catalog.rows("SELECT sae, coalesce(name, sae), n_latents FROM runs WHERE sae IN (SELECT sae FROM comparisons) ORDER BY ALL")
    rows = [
        (f"[{name}]({address}{link('/', sae=sae)})", f"{n_latents:,}", f"[features]({address}{link('/features', sae=sae)})")
        for sae, name, n_latents in found
    ]
    return f"# [Explorer]({address}/)\n\nIt shows what the checkout holds while `make up` runs.\n\n" + _table(("SAE", "latents", ""), rows)


def _catalog_in(root: Path) -> Path:
    return root / STAGES["catalog"].place / "catalog.duckdb"


def _picture(catalogue: Path, draw: Callable[[Catalog, Path], None]) -> str | None:
    """Draw a picture of a catalogue and return it as a data URL of a WebP; None if there is no catalogue.

    Prefect writes the page of an artifact into an event, too, which it refuses above 1.5 MB; the features' photographs take 1.6 MB as PNG.
    """
    if not catalogue.exists():
        return None
    with tempfile.TemporaryDirectory() as folder, Catalog(catalogue) as catalog:
        png = Path(folder) / "picture.png"
        draw(catalog, png)
        smaller = io.BytesIO()
        Image.open(png).convert("RGB").save(smaller, "WEBP", quality=90)
        return _embed(smaller.getvalue(), "webp")


def _embed(picture: bytes, kind: str = "png") -> str:
    """Encode a picture as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def decision(made: Decision, is_asked: bool = False) -> str:
    """Make the page that compares champion and challenger.

    Args:
        made: The decision.
        is_asked: Whether a person has to approve it. The page then shows the best features of both, those of the champion from its kept
            catalogue, and those of the challenger from the checkout's.
    """
    sides = {"challenger": made.challenger}
    if made.champion:
        sides = {"champion" if is_asked or made.decision == "challenger" else "champion before": made.champion} | sides
    rows = [(name, *(_number(getattr(scores, key)) for scores in sides.values())) for key, (name, _) in SCORES.items()]
    title = f"{made.challenger.sae} waits for approval" if is_asked else "Promoted" if made.decision == "champion" else "Kept"
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in SCORES.values() if meaning)
    parts = [f"# {title}", f"{_cell(made.reason)}.", _table(("", *sides), rows), f"{meanings}."]
    if made.matched:
        counts = made.matched.model_dump()
        parts.append("## The champion's features in the challenger")
        meanings = {kind: text.replace("second", "challenger").replace("first", "champion") for kind, text in KINDS.items()}
        parts.append(_list(f"{counts[kind]:,} {kind}: {meaning}" for kind, meaning in meanings.items()))
    if made.who and not is_asked:
        parts.append(f"Decided by {_cell(made.who)}{f': {_cell(made.why)}' if made.why else ''}.")
    if is_asked:
        parts += _best_of_both(made)
    return "\n\n".join(parts)


def _best_of_both(made: Decision) -> Iterator[str]:
    from ommatid.show.pictures import draw_best

    sides = [("challenger", _catalog_in(Path()), made.challenger.sae)]
    if before := find_champion():
        sides.insert(0, ("champion", folder_of(before) / "catalog.duckdb", before.challenger.sae))
    for title, file, sae in sides:
        if picture := _picture(file, lambda catalog, png, sae=sae: draw_best(catalog, png, N_FEATURES, sae)):
            yield f"## The best features of the {title}"
            yield f"![examples of each feature]({picture})"


def drift(outcome: Outcome) -> str:
    """Make the page of a check of new images, with a picture of the latents that have changed."""
    check = outcome.check
    assert check is not None, outcome
    row = check.row
    parts = [f"# {VERDICTS[outcome.verdict].capitalize()}", f"{_cell(outcome.reason)}."]
    tests = [test for test in TESTS if row[test.p] is not None]
    if tests:
        said = (f"{test.title}: **{test.value(row)}**; by chance {test.chance(row)}; adjusted p {row[test.p]:.2g}" for test in tests)
        parts.append(_list(said))
    if changed := [one for one in check.latents(N_CHANGED) if one["is_changed"]]:
        picture = draw_changed(changed, check.pictures())
        parts += [
            "## Features that fire differently: the champion's images and new ones",
            f"![changed features]({_embed(picture, 'webp')})",
        ]
        parts.append(_list(f"latent {one['latent']}, {_cell(one['label'] or 'without a name')}: {describe_change(one)}" for one in changed))
    if outcome.is_drift and row["action"] == "warn":
        parts.append("`drift.action` is `warn`, so the run goes on and trains on these images.")
    parts.append(f"The page `/drift?check={row['check_id']}` of `ommatid serve --published` has more, and the relation `drift` everything.")
    return "\n\n".join(parts)


def past_saes(made: "Backfill") -> str:
    """Make the page of a backfill: all SAEs under the params of now, the oldest first, and those that were left out."""
    with Catalog(made.catalog) as catalog:
        rows = catalog.ask(PAST_SAES).rows
    head = ("SAE", "champion since", "hookpoint", "MS − floor", "FVU", "dead", "label score", "its control")
    parts = [
        f"# {len(rows)} SAE{'s' * (len(rows) != 1)} under the params of now",
        _table(head, [tuple(map(_past, row)) for row in rows]),
        made.summary,
    ]
    if made.left_out:
        parts.append(_table(("left out", "why"), [(one.sae, one.reason) for one in made.left_out]))
    return "\n\n".join(parts)


def _past(value: Any) -> str:
    return "–" if value is None else f"{value:%Y-%m-%d %H:%M}" if isinstance(value, datetime) else _number(value)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _read(root: Path, stage: str) -> dict[str, Any] | None:
    path = root / QUALITY / f"{stage}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _list(lines: Iterable[str]) -> str:
    """Make a list, whose lines wrap in the Prefect UI, unlike the cells of a table."""
    return "\n".join(f"- {line}" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
