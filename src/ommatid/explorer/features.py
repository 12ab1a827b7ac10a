"""The pages that list features: filters, any sort, pages by key, the SQL behind them, and the same as JSON, CSV and Parquet."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import pydantic
from fastapi import APIRouter, Request
from fastapi import Query as Parameters
from fastapi.responses import Response, StreamingResponse
from pydantic import Field
from pydantic_core import to_json

from ommatid.catalog.question import Question
from ommatid.catalog.reader import QueryResult
from ommatid.explorer.cards import load_features, previews
from ommatid.explorer.web import BadRequest, Query, TheExplorer, View, link
from ommatid.show.doses import STATUSES_IN_WORDS

router = APIRouter()

Sort = Literal[
    "latent", "label", "label_score", "over_control", "auroc", "ms", "over_floor", "density", "n_images", "purity", "label_entropy",
    "uniqueness", "max_act", "mean_act", "effect", "over_best",
]  # fmt: skip
State = Literal["live", "dead", "dense", "rare", "duplicate", "unnamed", "doubtful"]

Causal = Literal["causal", "reads_only", "breaks_model", "untested"]

EXPRESSIONS = {
    "label": "lower(left(label, 80))",
    "over_control": "label_score - control_score",
    "over_floor": "ms - ms_floor",
    "over_best": "effect - best_control",
}
"""SQL of the sorts that are not columns; only the beginning of a label counts, as it becomes part of an address."""
STATES = {
    "live": "NOT is_dead",
    "dead": "is_dead",
    "dense": "is_dense",
    "rare": "is_rare",
    "duplicate": "duplicate_of IS NOT NULL",
    "unnamed": "label IS NULL AND NOT is_dead",
    "doubtful": "label_score <= control_score",
}
"""SQL of each state."""
FORMULAS = tuple("=+-@\t\r\n＝＋－＠")
"""Characters with which a spreadsheet takes a text for a formula."""
MOST_EXPORTED = 200_000
"""Largest number of rows of a download; every feature of the largest dictionaries."""


class FeatureQuery(Query):
    """Which features, in which order, and which of their pages."""

    label: Annotated[str | None, Field(max_length=200)] = None
    """Text that the label contains, in any case."""
    class_: Annotated[str | None, Field(alias="class", max_length=500)] = None
    """Class that is among the three most common of the images on which a feature fires."""
    labeller: Annotated[str | None, Field(max_length=200)] = None
    """Labeller that made the label."""
    status: Annotated[str | None, Field(pattern="^(ok|unparsed|refused|failed|over_budget|too_few_examples)$")] = None
    """Status of the label."""
    state: State | None = None
    """live, dead, dense, rare, duplicate, unnamed, or doubtful: the label scores no better than another latent's."""
    causal: Causal | None = None
    """What the stage intervene found of the feature: causal, reads_only, breaks_model or untested."""
    over_control: Annotated[float | None, Field(ge=-1, le=1)] = None
    """Least difference of label score and control."""
    over_floor: Annotated[float | None, Field(ge=-2, le=2)] = None
    """Least difference of MS and its floor."""
    ms_min: Annotated[float | None, Field(ge=-1, le=1)] = None
    """Least MS."""
    ms_max: Annotated[float | None, Field(ge=-1, le=2)] = None
    """Number that MS is less than."""
    density_min: Annotated[float | None, Field(ge=0, le=1)] = None
    """Least share of tokens on which a feature fires."""
    density_max: Annotated[float | None, Field(ge=0, le=2)] = None
    """Number that the share of tokens on which a feature fires is less than."""
    purity_min: Annotated[float | None, Field(ge=0, le=1)] = None
    """Least share of the most common class among the 16 strongest images."""
    images_min: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    """Least number of evaluation images on which a feature fires."""
    unmatched: Annotated[str | None, Field(max_length=500)] = None
    """Another SAE, such as the last champion, in which no latent has a similar direction (cosine of at least 0.9)."""
    flagged: bool | None = None
    """Whether a person has flagged the feature."""
    rated: Annotated[int | None, Field(ge=1, le=5)] = None
    """Least mean rating by people."""
    listed: Annotated[str | None, Field(max_length=200)] = None
    """Name of a list that people made."""
    sort: Sort = "over_floor"
    """Column to sort by; over_control, over_floor and over_best (effect less that of the best control) are the differences."""
    order: Literal["asc", "desc"] = "desc"
    """Direction of the sort; features without a value come last in both."""
    after: Annotated[str | None, Field(max_length=2000)] = None
    """Key of the last feature on the page before."""
    before: Annotated[str | None, Field(max_length=2000)] = None
    """Key of the first feature on the page after."""
    view: Literal["grid", "table"] = "grid"
    """How the features are shown."""
    n: Annotated[int, Field(ge=1, le=200)] = 24
    """Features on a page."""

    @property
    def filters(self) -> dict[str, Any]:
        """The parameters that choose features, as an address writes them."""
        left_out = {"sae", "sort", "order", "after", "before", "view", "n"}
        return {name: value for name, value in self.model_dump(by_alias=True, exclude_none=True).items() if name not in left_out}

    @property
    def has_more_filters(self) -> bool:
        """Whether a filter is set that the page shows on request only."""
        return bool(set(self.filters) - {"label", "class", "state", "causal"})

    def url(self, path: str = "/features", **changes: Any) -> str:
        """Address of this list with some parameters changed; None leaves one out."""
        values = self.model_dump(by_alias=True, exclude_defaults=True) | {name.rstrip("_"): value for name, value in changes.items()}
        return link(path, **{name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()})


class Feature(pydantic.BaseModel):
    """A feature in a list: its row of the relation `features`."""

    model_config = pydantic.ConfigDict(extra="allow")

    sae: str
    latent: int
    label: str | None
    """Name in the catalogue."""
    person_label: str | None = None
    """Name that a person gave, which pages show instead."""


class FeaturePage(pydantic.BaseModel):
    """A page of a list of features."""

    features: list[Feature]
    total: int
    next: str | None
    previous: str | None
    sql: str


def make_where(view: View, sae: str, query: FeatureQuery) -> tuple[list[str], dict[str, Any]]:
    """Return the conditions of a query in SQL, and the values of their parameters.

    Raises:
        BadRequest: The catalogue does not have what the query asks about.
    """
    values: dict[str, Any] = {"sae": sae}
    conditions = ["sae = $sae"]
    if (query.causal or query.sort in ("effect", "over_best")) and not view.opened.is_intervened:
        raise BadRequest("causal, sort: this catalogue does not say what features do, as an older version of Ommatid built it")
    if query.state:
        conditions.append(STATES[query.state])
    if query.label:
        values["label"] = query.label.lower()
        condition = "contains(lower(label), $label)"
        if view.reviewed(sae).names:  # they count in place of the names that the catalogue has
            values |= {"renamed": list(view.reviewed(sae).names), "named_like": view.reviewed(sae).named_like(query.label)}
            condition = (
                f"({condition} AND latent NOT IN (SELECT unnest($renamed::INTEGER[])) OR latent IN (SELECT unnest($named_like::INTEGER[])))"
            )
        conditions.append(condition)
    if query.class_ is not None:
        values["class"] = query.class_
        conditions.append("list_contains(top_classes, $class)")
    for name, expression, sign in (
        ("labeller", "labeller", "="),
        ("status", "label_status", "="),
        ("causal", "causal", "="),
        ("over_control", EXPRESSIONS["over_control"], ">="),
        ("over_floor", EXPRESSIONS["over_floor"], ">="),
        ("ms_min", "ms", ">="),
        ("ms_max", "ms", "<"),
        ("density_min", "density", ">="),
        ("density_max", "density", "<"),
        ("purity_min", "purity", ">="),
        ("images_min", "n_images", ">="),
    ):
        if (value := getattr(query, name)) is not None:
            values[name] = value
            conditions.append(f"{expression} {sign} ${name}")
    if query.unmatched is not None:
        values["unmatched"] = query.unmatched
        if not view.rows("SELECT 1 FROM matches WHERE sae = $sae AND other_sae = $other LIMIT 1", sae=sae, other=query.unmatched):
            raise BadRequest(
                f"unmatched: the catalogue has no matches of {sae} with {query.unmatched[:80]!r}; name an SAE that /compare has"
            )
        conditions.append(
            "latent NOT IN (SELECT latent FROM matches WHERE sae = $sae AND other_sae = $unmatched AND cosine >= 0.9) AND NOT is_dead"
        )
    if (only := view.explorer.settings.only) is not None:
        values["only"] = list(only.get(sae, ()))
        conditions.append("latent IN (SELECT unnest($only::INTEGER[]))")
    _add_reviewed(view, sae, query, conditions, values)
    return conditions, values


def _add_reviewed(view: View, sae: str, query: FeatureQuery, conditions: list[str], values: dict[str, Any]) -> None:
    """Add the conditions about what people said, which the catalogue does not know."""
    if query.flagged is None and query.rated is None and query.listed is None:
        return
    features = view.reviewed(sae).features
    if query.flagged is not None:
        values["flagged"] = [latent for latent, said in features.items() if said.flags]
        conditions.append(f"latent {'' if query.flagged else 'NOT '}IN (SELECT unnest($flagged::INTEGER[]))")
    if query.rated is not None:
        values["rated"] = [latent for latent, said in features.items() if said.rating and said.rating >= query.rated]
        conditions.append("latent IN (SELECT unnest($rated::INTEGER[]))")
    if query.listed is not None:
        values["listed"] = [latent for latent, said in features.items() if query.listed in said.lists]
        conditions.append("latent IN (SELECT unnest($listed::INTEGER[]))")


IN_TABLE = "sae, latent, label, label_score, control_score, labeller, ms, ms_floor, density, n_images, purity, top_classes"
"""Columns that pages show of a feature in a table; more would take longer."""


def find_features(view: View, query: FeatureQuery, columns: str | None = None) -> tuple[FeaturePage, str]:
    """Find a page of features.

    Args:
        view: The request.
        query: Which features.
        columns: Columns to load, as SQL; None for those that cards show.

    Returns:
        The page, and the SAE.

    Raises:
        BadRequest: A key of a page is malformed.
    """
    sae = view.choose_sae(query.sae)
    conditions, values = make_where(view, sae, query)
    questions = {"keys": _question(query, conditions, values)}
    if query.after is not None or query.before is not None:  # else the keys come with the number of all
        questions["counted"] = Question(f"SELECT count(*) AS n FROM features WHERE {' AND '.join(conditions)}", values)
    asked = view.opened.answers(questions)
    keys = asked["keys"]
    total = asked["counted"][0]["n"] if "counted" in asked else keys[0]["total"] if keys else 0
    latents = [key["latent"] for key in keys]
    if columns is None:
        described = load_features(view, sae, latents)
    else:
        if columns == IN_TABLE and view.opened.is_intervened:
            columns += ", causal, effect, best_control"
        loaded = view.rows(f"SELECT {columns} FROM features WHERE {_OF_LATENTS}", latents=latents) if latents else []
        described = {row["latent"]: row for row in loaded if row["sae"] == sae}  # a condition on it would keep DuckDB from using an index
    rows = [described[key["latent"]] | {"sort_key": key["sort_key"]} for key in keys]
    is_back = query.before is not None and query.after is None
    more, rows = len(rows) > query.n, rows[: query.n]
    if is_back:
        rows.reverse()
    has_next, has_previous = (True, more) if is_back else (more, query.after is not None)
    key = EXPRESSIONS.get(query.sort, query.sort)
    page = FeaturePage(
        features=[Feature.model_validate(row | {"person_label": view.reviewed(sae).names.get(row["latent"])}) for row in rows],
        total=total,
        next=query.url(after=_write_key(rows[-1], query.sort), before=None) if rows and has_next else None,
        previous=query.url(before=_write_key(rows[0], query.sort), after=None) if rows and has_previous else None,
        sql=shown_question(query, conditions, values, key).text,
    )
    return page, sae


def shown_question(query: FeatureQuery, conditions: Sequence[str], values: Mapping[str, Any], key: str) -> Question:
    """Return the question as it is shown to people: the first rows of the list, without the key of a page."""
    order = f"ORDER BY {key} {query.order.upper()} NULLS LAST, latent"
    return Question(f"SELECT * FROM features\nWHERE {' AND '.join(conditions)}\n{order}\nLIMIT {query.n}", values)


def _question(query: FeatureQuery, conditions: Sequence[str], values: Mapping[str, Any]) -> Question:
    """Return the question for the latents of a page and one more, for the keys by which they are sorted, and for the number of all.

    Their columns are asked for afterwards: DuckDB reads those of few latents by an index, and those of all to sort them.
    """
    key = EXPRESSIONS.get(query.sort, query.sort)
    conditions, values = list(conditions), dict(values)
    is_back = query.before is not None and query.after is None
    is_ascending = (query.order == "asc") != is_back
    if (text := query.before if is_back else query.after) is not None:
        value, values["key_latent"] = _read_key(text, query.sort)
        later = "<" if is_back else ">"
        tie = f"latent {later} $key_latent"
        if value is None:
            conditions.append(f"(({key}) IS NULL AND {tie}{f' OR ({key}) IS NOT NULL' if is_back else ''})")
        else:
            values["key"] = value
            beyond = f"({key}) {'>' if is_ascending else '<'} $key"
            missing = "" if is_back else f" OR ({key}) IS NULL"
            conditions.append(f"({beyond} OR (({key}) = $key AND {tie}){missing})")
    nulls = "FIRST" if is_back else "LAST"
    order = f"({key}) {'ASC' if is_ascending else 'DESC'} NULLS {nulls}, latent {'DESC' if is_back else 'ASC'}"
    what = f"latent, ({key}) AS sort_key, count(*) OVER () AS total"
    sql = f"SELECT {what} FROM features WHERE {' AND '.join(conditions)} ORDER BY {order} LIMIT {query.n + 1}"
    return Question(sql, values)


def _write_key(row: Mapping[str, Any], sort: Sort) -> str:
    return json.dumps([row["sort_key"], row["latent"]], ensure_ascii=False, separators=(",", ":"))


def _read_key(text: str, sort: Sort) -> tuple[Any, int]:
    """Read a key that `_write_key` wrote.

    Raises:
        BadRequest: It is anything else.
    """
    try:
        value, latent = json.loads(text)
        kinds = (str, type(None)) if sort == "label" else (int, float, type(None))
        is_finite = not isinstance(value, float) or math.isfinite(value)
        if type(latent) is int and isinstance(value, kinds) and not isinstance(value, bool) and is_finite and abs(latent) < 2**31:
            if isinstance(value, str):
                value.encode()  # half of a surrogate pair raises
            return (float(value) if isinstance(value, int) else value), latent
    except (ValueError, TypeError, RecursionError, OverflowError):
        pass
    raise BadRequest(f"after, before: got {text[:80]!r}; expected the key of a page, as the links to other pages have it")


_OF_LATENTS = "latent IN (SELECT unnest($latents::INTEGER[]))"


@router.get("/features", include_in_schema=False)
def features_page(request: Request, explorer: TheExplorer, query: Annotated[FeatureQuery, Parameters()]) -> Response:
    """Show a page of features as pictures or as a table."""
    with explorer.open(request) as view:
        page, sae = find_features(view, query, IN_TABLE if query.view == "table" else None)
        rows = [feature.model_dump() for feature in page.features]
        shown = [row["latent"] for row in rows] if query.view == "grid" else []
        options = {
            "labellers": [row["labeller"] for row in view.opened.kept(_LABELLERS, sae=sae)],
            "classes": [row["class"] for row in view.opened.kept(_CLASSES)],
            "sorts": [sort for sort in get_args(Sort) if view.opened.is_intervened or sort not in ("effect", "over_best")],
            "states": get_args(State),
            "causal": get_args(Causal) if view.opened.is_intervened else (),
        }
        is_pending = view.reviewed(sae).is_pending
        return view.render(
            "features.html",
            sae,
            query=query,
            page=page,
            rows=rows,
            tiles=previews(view, sae, shown),
            options=options,
            is_pending=is_pending,
            statuses=STATUSES_IN_WORDS,
        )


@router.get("/api/features", tags=["features"])
def features_json(request: Request, explorer: TheExplorer, query: Annotated[FeatureQuery, Parameters()]) -> FeaturePage:
    """A page of features, with the address of the next one."""
    with explorer.open(request) as view:
        page, _ = find_features(view, query, "*")
        to_api = {
            name: value.replace("/features", "/api/features", 1) if value else None
            for name, value in (("next", page.next), ("previous", page.previous))
        }
        return page.model_copy(update=to_api)


@router.get("/features.csv", include_in_schema=False)
def features_csv(request: Request, explorer: TheExplorer, query: Annotated[FeatureQuery, Parameters()]) -> Response:
    """Download all features that a query chooses, as CSV."""
    with explorer.open(request) as view:
        return as_csv(view.opened.ask(_download(view, query)), f"features-{view.choose_sae(query.sae)}.csv")


@router.get("/features.parquet", include_in_schema=False)
def features_parquet(request: Request, explorer: TheExplorer, query: Annotated[FeatureQuery, Parameters()]) -> Response:
    """Download all features that a query chooses, as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with explorer.open(request) as view:
        question, name = _download(view, query), view.choose_sae(query.sae)
        table = view.opened.catalog.arrow(question.sql, dict(question.values), timeout=30)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return Response(
        sink.getvalue().to_pybytes(), media_type="application/vnd.apache.parquet", headers=as_download(f"features-{name}.parquet")
    )


def _download(view: View, query: FeatureQuery) -> Question:
    conditions, values = make_where(view, view.choose_sae(query.sae), query)
    key = EXPRESSIONS.get(query.sort, query.sort)
    order = f"ORDER BY {key} {query.order.upper()} NULLS LAST, latent LIMIT {MOST_EXPORTED}"
    return Question(f"SELECT * FROM features WHERE {' AND '.join(conditions)} {order}", values)


def as_csv(found: QueryResult, name: str) -> Response:
    """Return an answer of the catalogue as a CSV file of a name, written while it is sent."""

    def iter_lines() -> Iterator[str]:
        out = io.StringIO()
        writer = csv.writer(out)  # ends lines with both characters, so that it quotes texts that hold either
        for row in (found.columns, *found.rows):
            writer.writerow([safe_cell(cell) for cell in row])
            if out.tell() > 2**16:
                yield out.getvalue()
                out.seek(0)
                out.truncate()
        yield out.getvalue()

    return StreamingResponse(iter_lines(), media_type="text/csv; charset=utf-8", headers=as_download(name))


def as_download(name: str) -> dict[str, str]:
    """Headers that make a browser save an answer as a file."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)
    return {"content-disposition": f'attachment; filename="{plain}"'}


def safe_cell(value: Any) -> Any:
    """Return a cell of a CSV file; text that a spreadsheet would take for a formula gets a leading apostrophe."""
    if isinstance(value, (list, dict, bytes)):
        return to_json(value, inf_nan_mode="null", bytes_mode="base64", fallback=str).decode()
    return f"'{value}" if isinstance(value, str) and value[:1] in FORMULAS else value


_LABELLERS = "SELECT DISTINCT labeller FROM labels WHERE sae = $sae ORDER BY labeller"
_CLASSES = "SELECT label AS class FROM images WHERE label IS NOT NULL GROUP BY label ORDER BY count(*) DESC, label LIMIT 200"
