"""The pages of classes: how well each is told from the others, by which features, and which of its images no feature tells."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi import Query as Parameters
from fastapi.responses import Response
from pydantic import Field

from ommatid.catalog.question import Question
from ommatid.explorer.audit import find_suspicious
from ommatid.explorer.cards import load_features, load_images, previews
from ommatid.explorer.heat import make_tile
from ommatid.explorer.web import Json, NotFound, Query, TheExplorer, View, link

router = APIRouter()

PURE = 0.75
"""Least purity of a feature that is of one class, as in `comparisons.coverage`."""
N_BEST = 10
"""Features that are the best of a class without a probe: the first of `class_latents` whose lift is above 1."""
LEAST_LIFT = 1.5
"""Least lift of the features in the order of coverage, as a feature that fires on everything covers every class."""
N_TELLING = 24
"""Features listed in order of lift or coverage."""
N_CARDS = 4
"""Features shown with pictures, of those in order of lift or coverage."""
N_TILES = 3
"""Images shown of a feature."""
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
_TELLING = """
    SELECT latent, n_both, recall AS coverage, precision AS share, lift
    FROM class_latents WHERE sae = $sae AND class = $class ORDER BY rank
"""
_IMAGES = """
    WITH fired AS (
        {fired}
    ), told AS (
        SELECT image, count(*) AS n_told FROM fired GROUP BY image
    ), found AS (
        SELECT image, width, height, label, coalesce(n_told, 0) AS n_told
        FROM images LEFT JOIN told USING (image) WHERE split = 'eval' AND label = $class
    ), counted AS (
        SELECT
            count(*) FILTER (n_told = 0) AS n_missing, $n_eval - count(*) AS n_others,
            (SELECT count(*) FROM told) - count(*) FILTER (n_told > 0) AS n_others_told
        FROM found
    ), shown AS (
        SELECT * FROM found WHERE (n_told = 0 OR NOT $only_missing) AND image > $after ORDER BY image LIMIT $n
    )
    SELECT * FROM counted LEFT JOIN shown ON true ORDER BY image
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
    rows = _all_classes(view, sae)
    if query.text:
        rows = [row for row in rows if query.text.lower() in row["class"].lower()]
    known = sorted((row for row in rows if row[query.sort] is not None), key=lambda row: row[query.sort], reverse=query.order == "desc")
    rows = [*known, *(row for row in rows if row[query.sort] is None)]
    first = (query.page - 1) * query.n
    where = "WHERE contains(lower(class), lower($text))\n    " if query.text else ""
    order = f"ORDER BY {query.sort} {query.order.upper()} NULLS LAST, class\n    LIMIT {query.n} OFFSET {first}"
    return {
        "classes": rows[first : first + query.n],
        "total": len(rows),
        "next": query.url(page=query.page + 1) if first + query.n < len(rows) else None,
        "previous": query.url(page=query.page - 1) if query.page > 1 else None,
        "sql": Question(f"{_CLASSES}    {where}{order}", {"sae": sae} | ({"text": query.text} if query.text else {})).text,
    }


def _all_classes(view: View, sae: str) -> list[dict[str, Any]]:
    """All classes by name. They are kept while the catalogue is open: there are few, and to count them takes all images and features."""
    return view.opened.kept(f"{_CLASSES} ORDER BY class", sae=sae)


def describe_class(view: View, query: ClassQuery) -> dict[str, Any]:
    """Collect what the catalogue says of a class.

    Raises:
        NotFound: No image is of this class.
    """
    sae, name = view.choose_sae(query.sae), query.name
    keys = {"sae": sae, "class": name}
    asked = view.opened.rows_of({"size": _CLASS, "probes": _PROBES, "telling": _TELLING}, **keys)
    (size,), probes = asked["size"], asked["probes"]
    if not size["n_images"] and not size["n_training"]:
        near = {row["label"][:80]: link("/class", name=row["label"], sae=query.sae) for row in view.rows(_NEAR, **{"class": name})}
        raise NotFound(f"No image is of the class {name[:200]!r}.", near)
    sums = view.opened.kept(_SUMS, sae=sae)[0]
    probed = max((row["latents"] for row in probes if row["latents"]), key=len, default=[])
    telling = {row["latent"]: row for row in asked["telling"]}
    telling_more = [latent for latent, row in telling.items() if row["lift"] > 1]
    best = [latent for latent in probed if latent in telling_more] or telling_more[:N_BEST]
    counts, images = _find_images(view, query, best)
    last = images[query.n - 1]["image"] if len(images) > query.n else None
    return {
        "sae": sae,
        "class": name,
        **size,
        "n_eval": sums["n_eval"],
        "n_classes": sums["n_classes"],
        "n_own": next((row["n_own"] for row in _all_classes(view, sae) if row["class"] == name), 0),
        "probes": probes,
        "telling": telling,
        "by_lift": _order(telling, "lift", 1),
        "by_coverage": _order(telling, "coverage", LEAST_LIFT),
        "probed": probed,
        "best": best,
        **counts,
        "images": images[: query.n],
        "next": query.url(after=last) if last is not None else None,
    }


def _find_images(view: View, query: ClassQuery, latents: Sequence[int]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Find images of a class, and on how many of all images some latents fire.

    This answers the question of `_ask_images` in half of the time, as the server knows the class of every image.

    Returns:
        The counts, and a page of images and one more, each with the number of latents that fire on it as `n_told`.
    """
    classes = view.opened.classes
    code = classes.names.index(query.name) if query.name in classes.names else len(classes.names)
    told = _count_firing(view, view.choose_sae(query.sae), latents, len(classes.codes))
    of_class = np.flatnonzero(classes.codes == code)
    is_told = told > 0
    n_eval, n_told = view.opened.kept(_SUMS, sae=view.choose_sae(query.sae))[0]["n_eval"], int(is_told[of_class].sum())
    counts = {
        "n_missing": len(of_class) - n_told,
        "n_others": n_eval - len(of_class),
        "n_others_told": int(is_told.sum()) - n_told,
    }
    shown = of_class[~is_told[of_class]] if query.show == "missing" else of_class
    numbers = shown[shown > query.after][: query.n + 1].tolist()
    return counts, [row | {"n_told": int(told[image])} for image, row in load_images(view, numbers).items()]


def _count_firing(view: View, sae: str, latents: Sequence[int], n_images: int) -> np.ndarray:
    """Count how many of some latents fire on each image, by its number, for at least `n_images` images."""
    question = _each_firing("list(image) AS images", {"sae": sae}, latents)
    fired = view.rows(question.sql, **question.values)
    return np.bincount([image for row in fired for image in row["images"] or ()], minlength=n_images)


def _ask_images(keys: Mapping[str, str], latents: Sequence[int], **values: Any) -> Question:
    """Ask for what `_find_images` finds, as people can ask it."""
    fired = _each_firing("image", keys, latents)
    return Question(_IMAGES.format(fired=fired.sql), {**fired.values, **values})


def _each_firing(columns: str, keys: Mapping[str, str], latents: Sequence[int]) -> Question:
    """Ask for the firings of some latents. A part for each latent reads its firings alone, which one condition on all would not."""
    parts = [f"SELECT {columns} FROM firings WHERE sae = $sae AND latent = $latent_{i}" for i in range(len(latents))]
    sql = "\n        UNION ALL ".join(parts or [f"SELECT {columns} FROM firings WHERE sae = $sae AND false"])
    return Question(sql, {**keys, **{f"latent_{i}": latent for i, latent in enumerate(latents)}})


def _order(telling: Mapping[int, Mapping[str, Any]], by: str, least_lift: float) -> list[int]:
    """Order latents by lift or by coverage, without those of a smaller lift."""
    found = [row for row in telling.values() if row["lift"] >= least_lift]
    return [row["latent"] for row in sorted(found, key=lambda row: (-row[by], row["latent"]))]


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
        return Json(found | turned)


@router.get("/class", include_in_schema=False)
def class_page(request: Request, explorer: TheExplorer, query: Annotated[ClassQuery, Parameters()]) -> Response:
    """Show a class: the features that tell it, its images, and those that nothing tells."""
    with explorer.open(request) as view:
        found = describe_class(view, query)
        sae = found["sae"]
        leading, order = found["probed"] or found["best"], found[f"by_{query.sort}"][:N_TELLING]
        features = load_features(view, sae, [*leading, *order])
        probes = {row["k"] if row["probe"] == "latents" else "x": row for row in found["probes"]}
        n_best = len(found["best"])
        return view.render(
            "class.html",
            sae,
            query=query,
            found=found,
            leading=[features[latent] for latent in leading],
            probes=probes,
            telling=[features[latent] | found["telling"][latent] for latent in order],
            n_cards=N_CARDS,
            n_suspects=sum((row["class"], row["status"]) == (query.name, "suspect") for row in find_suspicious(view, sae)),
            tiles=previews(view, sae, [*leading, *order[:N_CARDS]], N_TILES),
            images=[make_tile(row, note=f"{row['n_told']} of {n_best} fire" if n_best else " ") for row in found["images"]],
            own_url=link("/features", sae=query.sae, class_=query.name, sort="purity") if len(query.name) <= 500 else None,
            limits={"pure": PURE, "lift": LEAST_LIFT, "listed": N_TELLING},
            sql="\n;\n".join(_questions(found)),
        )


@router.get("/api/class", tags=["classes"])
def class_json(request: Request, explorer: TheExplorer, query: Annotated[ClassQuery, Parameters()]) -> Response:
    """What tells a class: probes, features by lift and by coverage, its images, and how many of them no best feature tells."""
    with explorer.open(request) as view:
        found = describe_class(view, query)
        return Json(found | {"next": found["next"] and found["next"].replace("/class", "/api/class", 1)})


def _questions(found: Mapping[str, Any]) -> list[str]:
    """The questions behind the page of a class, as people can ask them."""
    keys = {"sae": found["sae"], "class": found["class"]}
    return [
        Question(_PROBES, keys).text,
        Question(_TELLING, keys).text,
        _ask_images(keys, found["best"], n_eval=found["n_eval"], only_missing=False, after=-1, n=24).text,
    ]
