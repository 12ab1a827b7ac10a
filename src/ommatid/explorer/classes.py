"""The pages of classes: how well each is told from the others, by which features, and which of its images no feature tells."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi import Query as Parameters
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from ommatid.catalog.question import Question
from ommatid.explorer.features import previews, scales
from ommatid.explorer.heat import make_tile
from ommatid.explorer.web import NotFound, Query, TheExplorer, View, link

router = APIRouter()

PURE = 0.75
"""Least purity of a feature that is of one class, as in `comparisons.coverage`."""
N_PUREST = 16
"""Features counted beside those of the probe: the purest of those whose strongest images are often of the class."""
N_BEST = 10
"""Features that are the best of a class whose probe has none that fire more on it than on others: the first by lift."""
LEAST_IMAGES = 16
"""Images on which a feature must fire for its lift to be listed; that of rarer ones rests on too little."""
LEAST_LIFT = 1.5
"""Least lift of the features in the order of coverage, as a feature that fires on everything covers every class."""
N_CARDS = 4
"""Features shown with pictures, of those in order of lift or coverage."""
N_TILES = 3
"""Images shown of a feature."""
COUNTS = ("n_missing", "n_others", "n_others_told")
"""Columns of the images of a class that count: on how many no best feature fires; other images; those of them that fire one."""
COLUMNS = (
    ("class", "class"),
    ("n_images", "images"),
    ("auroc", "best latent, AUROC"),
    ("x_auroc", "all of x, AUROC"),
    ("gap", "x − best latent"),
    ("n_own", "features of it alone"),
)
"""Sort and title of the columns of the table of classes."""

_CLASSES = f"""
    WITH sizes AS (
        SELECT label AS class, count(*) AS n_images FROM images WHERE split = 'eval' AND label IS NOT NULL GROUP BY label
    ), best AS (
        SELECT class, auroc, auroc_low, auroc_high, latents[1] AS latent FROM probes WHERE sae = $sae AND probe = 'latents' AND k = 1
    ), activations AS (
        SELECT class, auroc AS x_auroc, auroc_low AS x_low, auroc_high AS x_high FROM probes WHERE sae = $sae AND probe = 'x'
    ), own AS (
        SELECT top_classes[1] AS class, count(*) AS n_own FROM features WHERE sae = $sae AND purity >= {PURE} GROUP BY ALL
    )
    SELECT
        sizes.class, sizes.n_images, best.auroc, auroc_low, auroc_high, best.latent, features.label, x_auroc, x_low, x_high,
        x_auroc - best.auroc AS gap, coalesce(n_own, 0) AS n_own
    FROM sizes LEFT JOIN best USING (class) LEFT JOIN activations USING (class) LEFT JOIN own USING (class)
    LEFT JOIN features ON features.sae = $sae AND features.latent = best.latent
"""
_SUMS = """
    SELECT
        count(DISTINCT label) FILTER (split = 'eval') AS n_classes, count(*) FILTER (split = 'eval') AS n_eval,
        count(DISTINCT label) FILTER (split = 'eval' AND label IN (SELECT class FROM probes WHERE sae = $sae)) AS n_probed
    FROM images
"""
_CLASS = """
    SELECT count(*) FILTER (split = 'eval') AS n_images, count(*) FILTER (split = 'train') AS n_training FROM images WHERE label = $class
"""
_NEAR = """
    SELECT label FROM images WHERE label IS NOT NULL GROUP BY label
    ORDER BY jaro_winkler_similarity(lower(left(label, 100)), lower(left($class, 100))) DESC, label LIMIT 5
"""
_PROBES = """
    SELECT probe, k, auroc, auroc_low, auroc_high, accuracy, n_positive, latents
    FROM probes WHERE sae = $sae AND class = $class ORDER BY probe, k
"""
_PUREST = f"""
    SELECT latent, count(*) FILTER (purity >= {PURE} AND top_classes[1] = $class) OVER () AS n_own
    FROM features WHERE sae = $sae AND list_contains(top_classes, $class) AND n_images >= {LEAST_IMAGES}
    ORDER BY purity DESC NULLS LAST, list_position(top_classes, $class), n_images DESC, latent LIMIT {N_PUREST}
"""
_COUNTED = """
    SELECT latent, count(*) AS n_both FROM firings
    WHERE sae = $sae AND latent IN (SELECT unnest($latents::INTEGER[]))
        AND image IN (SELECT image FROM images WHERE split = 'eval' AND label = $class)
    GROUP BY latent
"""
_FEATURES = """
    SELECT sae, latent, label, label_score, control_score, ms, ms_floor, n_images, max_act, purity
    FROM features WHERE sae = $sae AND latent IN (SELECT unnest($latents::INTEGER[])) ORDER BY latent
"""
_IMAGES = """
    WITH told AS (
        SELECT image, count(*) AS n_told FROM firings
        WHERE sae = $sae AND latent IN (SELECT unnest($latents::INTEGER[])) GROUP BY image
    ), found AS (
        SELECT image, image_id, width, height, label, coalesce(n_told, 0) AS n_told
        FROM images LEFT JOIN told USING (image) WHERE split = 'eval'
    ), counted AS (
        SELECT
            count(*) FILTER (label = $class AND n_told = 0) AS n_missing,
            count(*) FILTER (label IS DISTINCT FROM $class) AS n_others,
            count(*) FILTER (label IS DISTINCT FROM $class AND n_told > 0) AS n_others_told
        FROM found
    ), shown AS (
        SELECT * FROM found WHERE label = $class AND (n_told = 0 OR NOT $only_missing) AND image > $after ORDER BY image LIMIT $n
    )
    SELECT counted.*, shown.* EXCLUDE (image_id), left(image_id, 12) AS hash FROM counted LEFT JOIN shown ON true ORDER BY image
"""


class ClassesQuery(Query):
    """Which classes, in which order, and which of their pages."""

    text: Annotated[str | None, Field(max_length=200)] = None
    """Text that the name contains, in any case."""
    sort: Literal["class", "n_images", "auroc", "x_auroc", "gap", "n_own"] = "auroc"
    """Column to sort by."""
    order: Literal["asc", "desc"] = "desc"
    """Direction of the sort; classes without a value come last in both."""
    page: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Number of the page, from 1."""
    n: Annotated[int, Field(ge=1, le=500)] = 100
    """Classes on a page."""

    def url(self, path: str = "/classes", **changes: Any) -> str:
        """Address of this list with some parameters changed."""
        return link(path, **(self.model_dump(exclude_defaults=True) | changes))


class ClassQuery(Query):
    """Which class, and what is shown of it."""

    name: Annotated[str, Field(max_length=20_000)]
    """Name of the class."""
    sort: Literal["lift", "coverage"] = "lift"
    """Order of the features that tell it."""
    show: Literal["all", "missing"] = "all"
    """All of its images, or those on which none of its best features fires."""
    after: Annotated[int, Field(ge=-1, le=2**31 - 1)] = -1
    """Number of the last image on the page before."""
    n: Annotated[int, Field(ge=1, le=200)] = 24
    """Images on a page."""

    def url(self, path: str = "/class", **changes: Any) -> str:
        """Address of this page with some parameters changed."""
        return link(path, **({"name": self.name} | self.model_dump(exclude_defaults=True) | changes))


def find_classes(view: View, query: ClassesQuery) -> dict[str, Any]:
    """Find a page of the list of classes: `classes`, `total`, `next` and `previous` addresses, and the `sql` behind it."""
    sae = view.choose_sae(query.sae)
    values: dict[str, Any] = {"sae": sae}
    where = ""
    if query.text:
        values["text"] = query.text
        where = "WHERE contains(lower(class), lower($text))\n    "
    sql = f"{_CLASSES}{where}ORDER BY {query.sort} {query.order.upper()} NULLS LAST, class"
    first = (query.page - 1) * query.n
    rows = view.rows(f"SELECT *, count(*) OVER () AS total FROM ({sql}) LIMIT {query.n + 1} OFFSET {first}", **values)
    if rows:
        total = rows[0]["total"]
    else:
        (counted,) = view.rows(f"SELECT count(*) AS n FROM ({sql})", **values)
        total = counted["n"]
    return {
        "classes": [{name: value for name, value in row.items() if name != "total"} for row in rows[: query.n]],
        "total": total,
        "next": query.url(page=query.page + 1) if len(rows) > query.n else None,
        "previous": query.url(page=query.page - 1) if query.page > 1 else None,
        "sql": Question(f"{sql}\n    LIMIT {query.n} OFFSET {first}", values).text,
    }


def describe_class(view: View, query: ClassQuery) -> dict[str, Any]:
    """Collect what the catalogue says of a class.

    Raises:
        NotFound: No image is of this class.
    """
    sae, name = view.choose_sae(query.sae), query.name
    keys = {"sae": sae, "class": name}
    (size,) = view.rows(_CLASS, **{"class": name})
    if not size["n_images"] and not size["n_training"]:
        near = {row["label"][:80]: link("/class", name=row["label"], sae=query.sae) for row in view.rows(_NEAR, **{"class": name})}
        raise NotFound(f"No image is of the class {name[:200]!r}.", near)
    sums = view.opened.kept(_SUMS, sae=sae)[0]
    probes = view.rows(_PROBES, **keys)
    probed = max((row["latents"] for row in probes if row["latents"]), key=len, default=[])
    purest = view.rows(_PUREST, **keys)
    latents = list(dict.fromkeys([*probed, *(row["latent"] for row in purest)]))
    counted = _count(view, keys, latents, size["n_images"], sums["n_eval"]) if latents else []
    by_lift = _order(counted, "lift")
    lifts = {row["latent"]: row["lift"] for row in counted}
    best = [latent for latent in probed if lifts.get(latent, 0) > 1] or [row["latent"] for row in by_lift[:N_BEST]]
    found = view.rows(_IMAGES, **keys, latents=best, only_missing=query.show == "missing", after=query.after, n=query.n + 1)
    images = [row for row in found if row["image"] is not None]
    last = images[query.n - 1]["image"] if len(images) > query.n else None
    return {
        "sae": sae,
        "class": name,
        **size,
        "n_eval": sums["n_eval"],
        "n_own": purest[0]["n_own"] if purest else 0,
        "probes": probes,
        "features": {row["latent"]: row for row in counted},
        "by_lift": [row["latent"] for row in by_lift],
        "by_coverage": [row["latent"] for row in _order(counted, "coverage")],
        "probed": probed,
        "best": best,
        **{key: found[0][key] for key in COUNTS},
        "images": [{key: value for key, value in row.items() if key not in COUNTS} for row in images[: query.n]],
        "next": query.url(after=last) if last is not None else None,
    }


def _count(view: View, keys: Mapping[str, str], latents: Sequence[int], size: int, n_eval: int) -> list[dict[str, Any]]:
    """Features with the number of images of a class on which they fire, and their share of the feature's images, coverage and lift."""
    both = {row["latent"]: row["n_both"] for row in view.opened.kept(_COUNTED, **keys, latents=tuple(latents))}
    rows = view.rows(_FEATURES, sae=keys["sae"], latents=latents)
    for row in rows:
        n_both = both.get(row["latent"], 0)
        share = n_both / row["n_images"] if row["n_images"] else 0.0
        row |= {
            "n_both": n_both,
            "share": share,
            "coverage": n_both / size if size else 0.0,
            "lift": share * n_eval / size if size else 0.0,
        }
    return rows


def _order(features: Sequence[Mapping[str, Any]], by: str) -> list[Mapping[str, Any]]:
    """Order features by lift or by coverage, without those of which it says little."""
    least = LEAST_LIFT if by == "coverage" else 1
    found = [row for row in features if row["n_both"] and row["n_images"] >= LEAST_IMAGES and row["lift"] >= least]
    return sorted(found, key=lambda row: (-row[by], row["latent"]))


@router.get("/classes", include_in_schema=False)
def classes_page(request: Request, explorer: TheExplorer, query: Annotated[ClassesQuery, Parameters()]) -> Response:
    """Show all classes."""
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
        page = find_classes(view, query)
        sums = view.opened.kept(_SUMS, sae=sae)[0]
        return view.render("classes.html", sae, sae_page="/classes", query=query, page=page, sums=sums, columns=COLUMNS)


@router.get("/api/classes", tags=["classes"])
def classes_json(request: Request, explorer: TheExplorer, query: Annotated[ClassesQuery, Parameters()]) -> Response:
    """A page of classes with their numbers of evaluation images and how well the best latent and all of x tell each."""
    with explorer.open(request) as view:
        found = find_classes(view, query)
        turned = {name: found[name] and found[name].replace("/classes", "/api/classes", 1) for name in ("next", "previous")}
        return JSONResponse(found | turned)


@router.get("/class", include_in_schema=False)
def class_page(request: Request, explorer: TheExplorer, query: Annotated[ClassQuery, Parameters()]) -> Response:
    """Show a class: the features that tell it, its images, and those that nothing tells."""
    with explorer.open(request) as view:
        found = describe_class(view, query)
        sae, features = found["sae"], found["features"]
        telling = [features[latent] for latent in found[f"by_{query.sort}"]]
        leading = found["probed"] or found["best"]
        first = [row["latent"] for row in telling[:N_CARDS]]
        shown = sorted({*leading, *first} & set(features))
        probes = {row["k"] if row["probe"] == "latents" else "x": row for row in found["probes"]}
        n_best = len(found["best"])
        return view.render(
            "class.html",
            sae,
            query=query,
            found=found,
            leading=[features[latent] for latent in leading if latent in features],
            probes=probes,
            telling=telling,
            n_cards=len(first),
            tiles=previews(view, sae, shown, scales([features[latent] for latent in shown]), N_TILES),
            images=[make_tile(row, note=f"{row['n_told']} of {n_best} fire" if n_best else " ") for row in found["images"]],
            own_url=link("/features", sae=query.sae, class_=query.name, sort="purity") if len(query.name) <= 500 else None,
            limits={"pure": PURE, "images": LEAST_IMAGES, "lift": LEAST_LIFT, "purest": N_PUREST},
            sql="\n;\n".join(_questions(found)),
        )


@router.get("/api/class", tags=["classes"])
def class_json(request: Request, explorer: TheExplorer, query: Annotated[ClassQuery, Parameters()]) -> Response:
    """What tells a class: probes, features by lift and by coverage, its images, and how many of them no best feature tells."""
    with explorer.open(request) as view:
        found = describe_class(view, query)
        return JSONResponse(found | {"next": found["next"] and found["next"].replace("/class", "/api/class", 1)})


def _questions(found: Mapping[str, Any]) -> list[str]:
    """The questions behind the page of a class, as people can ask them."""
    keys = {"sae": found["sae"], "class": found["class"]}
    return [
        Question(_PROBES, keys).text,
        Question(_COUNTED, {**keys, "latents": [*found["features"]]}).text,
        Question(_IMAGES, {**keys, "latents": found["best"], "only_missing": False, "after": -1, "n": 24}).text,
    ]
