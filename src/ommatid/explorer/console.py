"""The SQL console: statements of visitors over the read-only catalogue, and the list of the JSON API."""

import asyncio
import math
import threading
import time
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi import Query as Parameters
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import Field
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from ommatid.catalog.reader import QueryResult, Stop
from ommatid.errors import QueryError
from ommatid.explorer.features import as_csv
from ommatid.explorer.library import NoCatalogue
from ommatid.explorer.web import Explorer, Json, Query, TheExplorer, View, feature_url, image_url, link, thumb_url
from ommatid.show.svg import Plot, draw_points

router = APIRouter()

MOST_CHARACTERS = 15_000
"""Longest statement. It is part of the page's address, and the server takes 64 kB of an address and headers."""
MOST_ROWS = 10_000
"""Most rows of an answer."""
MOST_SECONDS = 60.0
"""Longest time limit."""
AT_ONCE = 2
"""Statements that run at the same time; further ones are refused at once, so that they take no thread from pages."""
MOST_SHOWN = 1_000
"""Most rows in the page's table; the plot and the downloads have all."""
MOST_CELLS = 20_000
"""Most cells in the page's table."""
MOST_COLUMNS = 100
"""Most columns in the page's table."""
MOST_PICTURES = 100
"""Most pictures in the page's table."""
LONGEST_CELL = 500
"""Most characters of a value in the page's table."""
LATENTS = {"latent": "sae", "other": "sae", "duplicate_of": "sae", "other_latent": "other_sae"}
"""Columns with latents, and the column with the SAE of each."""
NUMBERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE", "DECIMAL")
"""Beginnings of the types whose values can be plotted, after an optional U."""
EXAMPLES = (
    (
        "The most monosemantic features",
        {},
        """SELECT sae, latent, label, round(ms, 3) AS ms, round(ms_floor, 3) AS floor, n_images
FROM features
WHERE n_images >= 16
ORDER BY ms - ms_floor DESC""",
    ),
    (
        "Do monosemantic features have better names?",
        {"x": "ms", "y": "label_score", "rows": 5000},
        """SELECT ms, label_score, sae, latent, label
FROM features
WHERE ms IS NOT NULL AND label_score IS NOT NULL""",
    ),
    (
        "Names that score no better than another latent's",
        {},
        """SELECT sae, latent, label, label_score, control_score
FROM features
WHERE label_score <= control_score
ORDER BY control_score - label_score DESC""",
    ),
    (
        "Features that move the model toward their names",
        {},
        """SELECT sae, latent, label, causal, effect, effect_low, best_control, dose, ms
FROM features
WHERE causal <> 'untested'
ORDER BY causal, effect - best_control DESC""",
    ),
    (
        "Classes that a single feature tells best",
        {},
        """SELECT sae, class, round(auroc, 3) AS auroc, latents[1] AS latent
FROM probes
WHERE k = 1
ORDER BY auroc DESC""",
    ),
    (
        "How many features fire on an image",
        {"x": "n_features", "y": "n_images", "kind": "line"},
        """SELECT n_features, count(*) AS n_images
FROM (SELECT image, count(*) AS n_features FROM firings WHERE sae = (SELECT min(sae) FROM runs) GROUP BY image)
GROUP BY n_features
ORDER BY n_features""",
    ),
    (
        "Features that fire together far more often than by chance",
        {},
        """SELECT c.sae, c.latent, a.label, c.other, b.label AS other_label, c.lift, c.n_both
FROM cofiring AS c
JOIN features AS a ON a.sae = c.sae AND a.latent = c.latent
JOIN features AS b ON b.sae = c.sae AND b.latent = c.other
WHERE c.latent < c.other
ORDER BY c.lift DESC""",
    ),
    (
        "The image on which each feature fires most",
        {"rows": 60},
        """SELECT e.image, e.sae, e.latent, f.label, e.act, i.label AS class
FROM examples AS e JOIN features AS f USING (sae, latent) JOIN images AS i USING (image)
WHERE e.decile = 10 AND e.rank = 1
ORDER BY f.ms DESC NULLS LAST""",
    ),
    ("What a relation holds", {}, "SUMMARIZE features"),
)
"""Title, further parameters and statement of the examples."""


class ConsoleQuery(Query):
    """A statement, its limits, and what of its answer is plotted."""

    q: Annotated[str | None, Field(max_length=MOST_CHARACTERS)] = None
    """One SELECT statement; 15,000 characters at most, as it is part of the address. `Catalog` of the Python API takes longer ones."""
    rows: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 200
    """Most rows of the answer."""
    timeout: Annotated[float, Field(ge=0.1, le=MOST_SECONDS)] = 10.0
    """Seconds after which the statement is stopped."""
    x: Annotated[str | None, Field(max_length=500)] = None
    """Column of numbers that is plotted horizontally."""
    y: Annotated[str | None, Field(max_length=500)] = None
    """Column of numbers that is plotted vertically."""
    kind: Literal["points", "line"] = "points"
    """What is plotted."""

    def url(self, path: str) -> str:
        """Address of the same statement in another form."""
        return link(path, **self.model_dump(exclude_defaults=True, exclude={"x", "y", "kind"} if path != "/sql" else None))


@dataclass(frozen=True)
class Answer:
    """What became of a statement."""

    found: QueryResult | None
    """The answer; None if there is none."""
    seconds: float = 0.0
    """Time that it took."""
    problem: str = ""
    """Why there is no answer."""
    status: int = 200
    """Status of HTTP."""


@dataclass(frozen=True)
class Cell:
    """A value in the table."""

    text: str
    """The value as text, shortened if it is long."""
    kind: str = ""
    """Class of the cell in the style sheet."""
    href: str | None = None
    """Address that the value leads to."""
    picture: str | None = None
    """Address of a picture of it."""


@dataclass
class Table:
    """An answer as the page shows it."""

    columns: list[tuple[str, str]]
    """Name and type of each column shown."""
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""
    """What of the answer is not shown, and why."""
    axes: list[str] = field(default_factory=list)
    """Columns that can be plotted."""
    plot: Plot | None = None
    plot_note: str = ""


_PLACES = threading.BoundedSemaphore(AT_ONCE)
"""Places of the statements that run."""


async def run(request: Request, explorer: Explorer, query: ConsoleQuery) -> Answer | None:
    """Run the statement, and stop it as soon as the visitor leaves, who then wants no answer; None if there is no statement."""
    if query.q is None or not query.q.strip():
        return None
    if not _PLACES.acquire(blocking=False):
        return Answer(None, 0, f"{AT_ONCE} other statements are running; run it again when one of them has ended", 429)
    stop = Stop()

    async def watch() -> None:
        with suppress(HTTPException):  # a request that is too large
            while (await request.receive())["type"] != "http.disconnect":
                pass
        stop()

    watching = asyncio.create_task(watch())
    try:
        return await run_in_threadpool(_run, explorer, query, stop)
    except asyncio.CancelledError:
        return Answer(None, 0, "the server is about to end", 503)
    finally:
        stop()  # of use only if the server ends
        watching.cancel()


def _run(explorer: Explorer, query: ConsoleQuery, stop: Stop) -> Answer:
    began = time.monotonic()
    try:
        with explorer.console.open() as opened:
            found = opened.catalog.ask(query.q or "", None, query.rows, query.timeout, stop)
        return Answer(found, time.monotonic() - began)
    except NoCatalogue:
        raise
    except QueryError as error:
        hint = str(error).replace("raise --timeout", f"raise the time limit, up to {MOST_SECONDS:.0f} s")
        return Answer(None, time.monotonic() - began, hint.replace(", or raise --memory-limit", ""), 400)
    finally:
        _PLACES.release()


@router.get("/sql", include_in_schema=False)
async def sql_page(request: Request, explorer: TheExplorer, query: Annotated[ConsoleQuery, Parameters()]) -> Response:
    """Show the console, and the answer to a statement."""
    answer = await run(request, explorer, query)
    return await run_in_threadpool(_render, request, explorer, query, answer)


@router.get("/sql.csv", include_in_schema=False)
async def sql_csv(request: Request, explorer: TheExplorer, query: Annotated[ConsoleQuery, Parameters()]) -> Response:
    """Download the answer to a statement as CSV."""
    answer = await run(request, explorer, query) or Answer(None, 0, "q: a statement is needed", 400)
    if not answer.found:
        return await run_in_threadpool(_render, request, explorer, query, answer)
    return as_csv(answer.found, "answer.csv")


@router.get("/api/sql", tags=["sql"])
async def sql_json(request: Request, explorer: TheExplorer, query: Annotated[ConsoleQuery, Parameters()]) -> Response:
    """The answer to a SELECT statement: columns, their types, rows, and whether there are more than were asked for."""
    answer = await run(request, explorer, query) or Answer(None, 0, "q: a statement is needed", 400)
    if not answer.found:
        return Json({"error": answer.problem}, answer.status)
    found = answer.found
    values = {"columns": found.columns, "types": found.types, "rows": found.rows, "more": found.more}
    return await run_in_threadpool(Json, values)


def _render(request: Request, explorer: Explorer, query: ConsoleQuery, answer: Answer | None) -> Response:
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
        table = _make_table(view, sae, query, answer.found) if answer and answer.found else None
        page = view.render(
            "console.html",
            sae,
            answer.status if answer else 200,
            query=query,
            answer=answer,
            table=table,
            relations=view.opened.relations,
            about={row["name"]: row["comment"] for row in view.opened.kept(_COMMENTS)},
            examples=[(title, link("/sql", q=sql, **parameters)) for title, parameters, sql in EXAMPLES],
            limits={"rows": MOST_ROWS, "seconds": MOST_SECONDS, "characters": MOST_CHARACTERS},
        )
    if answer and answer.status == 429:
        page.headers["retry-after"] = "5"
    return page


def _make_table(view: View, sae: str, query: ConsoleQuery, found: QueryResult) -> Table:
    """Turn an answer into cells with links and pictures, as many as a page can hold."""
    n_columns = min(len(found.columns), MOST_COLUMNS)
    n_rows = min(len(found.rows), MOST_SHOWN, MOST_CELLS // max(n_columns, 1))
    table = Table(list(zip(found.columns, found.types, strict=True))[:n_columns])
    notes = []
    if found.more:
        notes.append(f"there are more than {query.rows:,} rows, the limit")
    if n_rows < len(found.rows):
        notes.append(f"the table shows the first {n_rows:,}, the plot and the downloads all {len(found.rows):,}")
    if n_columns < len(found.columns):
        notes.append(f"the table shows the first {n_columns} of {len(found.columns):,} columns")
    table.note = "; ".join(notes)
    hashes = _find_hashes(view, found)
    n_pictures = 0
    for row in found.rows[:n_rows]:
        values = dict(zip(found.columns, row, strict=True))
        cells = []
        for name, value in zip(found.columns[:n_columns], row, strict=False):
            cell = _make_cell(name, value, values, sae, hashes, has_picture=n_pictures < MOST_PICTURES)
            n_pictures += cell.picture is not None
            cells.append(cell)
        table.rows.append(cells)
    table.axes = [name for name, kind in table.columns if kind.removeprefix("U").startswith(NUMBERS) and not kind.endswith("]")]
    table.plot, table.plot_note = _draw(query, found, table.axes)
    return table


def _find_hashes(view: View, found: QueryResult) -> dict[int, str]:
    """Beginnings of the checksums of the first images of the column `image`, which the addresses of thumbnails hold."""
    if "image" not in found.columns:
        return {}
    place = found.columns.index("image")
    images = {row[place] for row in found.rows[:MOST_PICTURES] if type(row[place]) is int and 0 <= row[place] < 2**31}
    return {row["image"]: row["hash"] for row in view.rows(_HASHES, images=sorted(images))} if images else {}


def _make_cell(name: str, value: Any, row: Mapping[str, Any], sae: str, hashes: Mapping[int, str], has_picture: bool) -> Cell:
    if value is None:
        return Cell("NULL", "none")
    if isinstance(value, (bytes, bytearray)):
        is_webp = value[:4] == b"RIFF" and value[8:12] == b"WEBP" and len(value) < 2**15
        picture = f"data:image/webp;base64,{b64encode(value).decode()}" if is_webp and has_picture else None
        return Cell(f"{len(value):,} bytes", "none", picture=picture)
    if isinstance(value, float):
        return Cell(f"{value:.6g}", "value")
    if type(value) is int:
        if name == "image" and 0 <= value < 2**31:
            picture = thumb_url(value, hashes[value]) if has_picture and value in hashes else None
            return Cell(str(value), "value", image_url(value), picture)
        of = row.get(LATENTS[name], sae if name == "latent" else None) if name in LATENTS else None
        return Cell(str(value), "value", feature_url(of, value) if isinstance(of, str) and of else None)
    text = (
        to_json(value, inf_nan_mode="null", bytes_mode="base64", fallback=str).decode() if isinstance(value, (list, dict)) else str(value)
    )
    return Cell(text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]}…", "" if isinstance(value, str) else "plain")


def _draw(query: ConsoleQuery, found: QueryResult, axes: list[str]) -> tuple[Plot | None, str]:
    """Draw two columns; if they cannot be drawn, say why."""
    if query.x is None or query.y is None:
        return None, ""
    if missing := [name for name in (query.x, query.y) if name not in axes]:
        return None, f"{missing[0]!r} is no column of numbers in this answer, so nothing is plotted"
    x, y = found.columns.index(query.x), found.columns.index(query.y)
    points = [(float(row[x]), float(row[y])) for row in found.rows if _is_plottable(row[x]) and _is_plottable(row[y])]
    left_out = len(found.rows) - len(points)
    if not points:
        return None, "no row has a number in both columns"
    title = f"{query.y} by {query.x}, {len(points):,} rows"
    note = f"{len(points):,} rows" + (f"; {left_out:,} lack a finite number in one of the columns" if left_out else "")
    return draw_points(title, query.x, query.y, points, query.kind == "line"), note


def _is_plottable(value: Any) -> bool:
    return isinstance(value, (int, float, Decimal)) and math.isfinite(value) and abs(value) < 1e300


_HASHES = "SELECT image, left(image_id, 12) AS hash FROM images WHERE image IN (SELECT unnest($images::INTEGER[]))"
_COMMENTS = "SELECT table_name AS name, coalesce(comment, '') AS comment FROM duckdb_tables() WHERE database_name = 'catalogue'"


@router.get("/openapi", include_in_schema=False)
def openapi_page(request: Request, explorer: TheExplorer) -> Response:
    """List the JSON API."""
    schema = request.app.openapi()
    known: dict[str, Any] = {"latent": 0, "q": "SELECT count(*) AS features FROM features"}
    saes: Mapping[str, Any] = {}
    with suppress(NoCatalogue), explorer.open(request) as view:
        saes = view.opened.saes
        known |= {"sae": next(iter(saes))} | view.opened.kept(_KNOWN)[0]
    groups: dict[str, list[dict[str, Any]]] = {}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parameters = [_describe(one) for one in operation.get("parameters", ())]
            entry = {
                "method": method.upper(),
                "path": path,
                "text": operation.get("description") or operation.get("summary", ""),
                "parameters": parameters,
                "url": _try(path, parameters, known) if method == "get" else None,
            }
            tag = (operation.get("tags") or ["other"])[0]
            groups.setdefault("SQL" if tag == "sql" else tag.capitalize(), []).append(entry)
    return explorer.render(request, "openapi.html", groups=groups, url=request.app.openapi_url)


_KNOWN = "SELECT min(image) AS image, min(label) AS name FROM images"


def _describe(parameter: Mapping[str, Any]) -> dict[str, Any]:
    schema = parameter["schema"]
    kinds = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    is_list = kinds[0].get("type") == "array"
    allowed = kinds[0].get("enum") or ([kinds[0]["const"]] if "const" in kinds[0] else [])
    limits = [f"{word} {kinds[0][key]:,}" for key, word in _LIMITS.items() if key in kinds[0]]
    return {
        "name": parameter["name"],
        "where": parameter["in"],
        "type": " or ".join(one.get("type", "any") for one in kinds) + (" (repeatable)" if is_list else ""),
        "text": parameter.get("description") or schema.get("description", ""),
        "allowed": ", ".join(map(str, allowed)) or ", ".join(limits),
        "default": schema.get("default"),
        "is_required": parameter.get("required", False),
    }


_LIMITS = {"minimum": "at least", "maximum": "at most", "maxLength": "characters: at most"}


def _try(path: str, parameters: list[dict[str, Any]], known: Mapping[str, Any]) -> str | None:
    """Address that tries a GET with values that exist; None if one is not known."""
    needed = [one for one in parameters if one["is_required"] or one["name"] == "q"]
    if any(known.get(one["name"]) is None for one in needed):
        return None
    from urllib.parse import quote

    for one in needed:
        path = path.replace(f"{{{one['name']}}}", quote(str(known[one["name"]]), safe=""))
    return link(path, **{one["name"]: known[one["name"]] for one in needed if one["where"] == "query"})
