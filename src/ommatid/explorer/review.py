"""The pages of review: people name, rate, flag, list and discuss features; a queue of names to look at; the log, lists, and CSV."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Depends, File, HTTPException, Request, UploadFile
from fastapi import Query as Parameters
from fastapi.responses import RedirectResponse, Response
from jaxtyping import Bool, Int32
from pydantic import BaseModel, ConfigDict, Field

from ommatid.errors import ReviewError
from ommatid.explorer.feature import find_feature
from ommatid.explorer.features import as_download
from ommatid.explorer.heat import Tile, make_tile
from ommatid.explorer.reviewed import WHO, Reviewed, find_direction, find_who, is_closed, make_box
from ommatid.explorer.security import check_form, check_program, form_token
from ommatid.explorer.web import BadRequest, Json, Query, TheExplorer, View, link
from ommatid.reviews import Event, Feature, from_csv, history_to_csv, to_csv
from ommatid.reviews.event import FLAGS, clean, clean_who

router = APIRouter()

LEAST_IMAGES = 16
"""Images on which a feature must fire to be in a queue; the scores of rarer ones rest on too little."""
N_IMAGES, BOX = 12, 196
"""Images of a feature in the queue, and their longest side in pixels."""
N_SUGGESTED = 6
"""Names that one click gives to a feature, of each source."""
N_EVENTS = 50
"""Events on a page of the log."""

QueueName = Literal["doubtful", "unnamed", "flagged", "unrated"]
QUEUES: dict[QueueName, tuple[str, str]] = {
    "doubtful": ("Doubtful names", "Names that score no better than another latent's, the worst first."),
    "unnamed": ("Unnamed", "Features that no labeller could name, the most monosemantic first."),
    "flagged": ("Flagged by others", "Features to which other people object."),
    "unrated": ("Unrated", "Named features that nobody has rated, the worst names first."),
}
"""Title and meaning of each queue."""
_OVER = "label_score - control_score"
_ORDERS = {
    "doubtful": (f"label IS NOT NULL AND {_OVER} <= 0", _OVER),
    "unnamed": ("label IS NULL", "ms_floor - ms"),
    "flagged": ("true", _OVER),
    "unrated": ("label IS NOT NULL", _OVER),
}
"""SQL of the features that the catalogue puts into a queue, and of what orders them."""

_TILES = """
    SELECT rank, act, heat, e.rows, cols, image, left(image_id, 12) AS hash, width, height, label, seen_width, seen_height
    FROM examples AS e JOIN images USING (image) WHERE sae = $sae AND latent = $latent ORDER BY decile DESC, rank LIMIT $n
"""
_MISTAKES = """
    SELECT m.kind, image, left(image_id, 12) AS hash, width, height, label
    FROM mistakes AS m JOIN images USING (image)
    WHERE sae = $sae AND latent = $latent AND labeller = $labeller ORDER BY kind, rank
"""
_LABELS = "SELECT labeller, label, score FROM labels WHERE sae = $sae AND latent = $latent AND label IS NOT NULL ORDER BY place, labeller"
_NEAR = """
    SELECT n.other, n.cosine, f.label FROM neighbours AS n JOIN features AS f ON f.sae = n.sae AND f.latent = n.other
    WHERE n.sae = $sae AND n.latent = $latent ORDER BY n.rank
"""


class ReviewQuery(Query):
    """Which feature of which queue."""

    queue: QueueName = "doubtful"
    """doubtful, unnamed, flagged or unrated."""
    at: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    """Latent that is shown; left out: the first of the queue that is not done."""


class LogQuery(Query):
    """Which part of the log."""

    before: Annotated[str | None, Field(pattern="^[0-9a-f]{32}$")] = None
    """Id of the last event on the page before; left out: the latest events."""


class ExportQuery(Query):
    """What to export."""

    what: Literal["state", "history"] = "state"
    """state: what is said now; history: every event, so that another log can take them over."""


class Statement(BaseModel):
    """What a program says of a feature."""

    model_config = ConfigDict(extra="forbid")

    sae: str
    latent: Annotated[int, Field(ge=0, le=2**31 - 1)]
    kind: str
    value: str | int
    who: str
    seen: str | None = None
    """Id of the last event about the feature that the author had seen; empty if there was none."""


async def read_form(request: Request) -> dict[str, str]:
    """Return the texts of a form, also those that are empty."""
    return {name: value for name, value in (await request.form()).multi_items() if isinstance(value, str)}


TheForm = Annotated[Mapping[str, str], Depends(read_form)]


def check_writable(explorer: TheExplorer) -> None:
    """Refuse changes where reviews are shown only; a dependency of every route that changes something."""
    if is_closed(explorer):
        raise HTTPException(403, "This explorer shows reviews and takes none, as it was started with --read-only.")


WRITES = [Depends(check_form), Depends(check_writable)]
"""Dependencies of forms."""


@router.get("/review", include_in_schema=False)
def review_page(request: Request, explorer: TheExplorer, query: Annotated[ReviewQuery, Parameters()]) -> Response:
    """Show a feature of a queue, or go to the first that is not done."""
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
        queue = load_queue(view, sae, query.queue)
        if query.at is None and (first := queue.after(None)) is not None:
            return RedirectResponse(_queue_url(query, first), 303)
        context = {"query": query, "queue": queue, "queues": QUEUES, "queue_url": _queue_url, "least": LEAST_IMAGES}
        if query.at is None:
            return view.render("review.html", sae, feature=None, **context)
        feature = find_feature(view, sae, query.at)
        return view.render("review.html", sae, feature=feature, box=make_box(view, sae, query.at), **_describe(view, feature), **context)


def _queue_url(query: ReviewQuery, at: int | None = None, queue: QueueName | None = None) -> str:
    return link("/review", sae=query.sae, queue=queue or query.queue, at=at)


def _describe(view: View, feature: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the catalogue says of a feature in the queue."""
    sae, latent = feature["sae"], feature["latent"]
    mistakes: dict[str, list[Tile]] = {}
    for row in view.rows(_MISTAKES, sae=sae, latent=latent, labeller=feature["labeller"]):
        mistakes.setdefault(row["kind"], []).append(make_tile(row, box=84))
    tiles = [make_tile(row, feature["max_act"], BOX) for row in view.rows(_TILES, sae=sae, latent=latent, n=N_IMAGES)]
    return {"tiles": tiles, "mistakes": mistakes, "suggestions": _suggest(view, feature)}


def _suggest(view: View, feature: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return names that one click can give to a feature, by where they come from; none twice, and none that cannot be a name."""
    keys = {"sae": feature["sae"], "latent": feature["latent"]}
    near = [event.value if (event := view.named(feature["sae"], row["other"])) else row["label"] for row in view.rows(_NEAR, **keys)]
    found: list[tuple[str, list[str]]] = []
    taken = {view.reviewed(feature["sae"]).names.get(feature["latent"], feature["label"])}
    for source, names in (
        ("other labellers", [row["label"] for row in view.rows(_LABELS, **keys)]),
        ("classes of its images", feature["top_classes"] or []),
        ("nearest directions", near),
    ):
        fresh = [name for name in dict.fromkeys(filter(None, map(_as_name, names))) if name not in taken][:N_SUGGESTED]
        taken |= {*fresh}
        if fresh:
            found.append((source, fresh))
    return found


def _as_name(text: Any) -> str | None:
    try:
        return str(clean("rename", text))
    except ReviewError:
        return None


@dataclass(frozen=True)
class Queue:
    """Features to look at, in an order that the catalogue alone decides, so that nobody's reviews move what comes next."""

    order: Int32[np.ndarray, " n"]
    """Latents in order."""
    is_done: Bool[np.ndarray, " n"]
    """Whether somebody has dealt with each."""

    @property
    def n_done(self) -> int:
        """Number of features that are done."""
        return int(self.is_done.sum())

    def after(self, latent: int | None) -> int | None:
        """Return the first feature after another that is not done; None if there is none."""
        left = np.flatnonzero(~self.is_done)
        found = left[left > self._place(latent)]
        return int(self.order[found[0]]) if len(found) else None

    def before(self, latent: int | None) -> int | None:
        """Return the feature before another, done or not, so that a person can go back; None if there is none."""
        place = self._place(latent)
        return int(self.order[place - 1]) if place > 0 else None

    def position(self, latent: int) -> int | None:
        """Return the place of a feature, from 1; None if it is not in the queue."""
        place = self._place(latent)
        return place + 1 if place >= 0 else None

    def _place(self, latent: int | None) -> int:
        if latent is None:
            return -1
        found = np.flatnonzero(self.order == latent)
        return int(found[0]) if len(found) else -1


def load_queue(view: View, sae: str, name: QueueName) -> Queue:
    """Load a queue.

    The first three orders do not depend on what people say. Features that are flagged by others come and go, but keep their order.
    """
    condition, order = _ORDERS[name]
    key = ("queue", sae, name)
    if key not in view.opened.cache:
        sql = f"""
            SELECT list(latent ORDER BY {order} NULLS LAST, latent) AS latents FROM features
            WHERE sae = $sae AND NOT is_dead AND n_images >= $least AND {condition}
        """
        (row,) = view.rows(sql, sae=sae, least=LEAST_IMAGES)
        view.opened.cache[key] = np.array(row["latents"] or [], dtype=np.int32)
    latents = view.opened.cache[key]
    features = view.reviewed(sae).features
    who = find_who(view.request)
    match name:
        case "flagged":
            flagged = [latent for latent, said in features.items() if any(by.keys() - {who} for by in said.flags.values())]
            latents = latents[np.isin(latents, flagged)]
            done = [latent for latent in flagged if who and _has_answered(features[latent], who)]
        case "unrated":
            done = [latent for latent, said in features.items() if said.ratings]
        case _:
            done = [latent for latent, said in features.items() if said.rename or said.ratings or said.flags]
    return Queue(latents, np.isin(latents, done))


def _has_answered(said: Feature, who: str) -> bool:
    """Return whether a person has said something since somebody else flagged a feature."""
    latest = max(event.when for by in said.flags.values() for event in by.values() if event.who != who)
    return any(event.who == who and event.when > latest and event.id not in said.undone for event in said.history)


@router.post("/review/who", include_in_schema=False, dependencies=WRITES)
def set_who(form: TheForm) -> Response:
    """Remember who reviews."""
    return _remember(_back(form), _checked_who(form.get("who", "")))


@router.post("/review/event", include_in_schema=False, dependencies=WRITES)
def add_event(request: Request, explorer: TheExplorer, form: TheForm) -> Response:
    """Record what a person says in a form."""
    who = _checked_who(form["who"] if "who" in form else find_who(request) or "")
    latent, value, kind = form.get("latent", ""), form.get("value", ""), form.get("kind", "")
    if not (latent.isascii() and latent.isdecimal() and len(latent) < 10):
        raise BadRequest(f"latent: got {latent[:80]!r}; a whole number from 0 on is expected")
    given = int(value) if kind == "rate" and value in ("1", "2", "3", "4", "5") else value
    with explorer.open(request) as view:
        record(view, Statement(sae=form.get("sae", ""), latent=int(latent), kind=kind, value=given, who=who, seen=form.get("seen")))
    return _remember(_back(form), who) if "who" in form else RedirectResponse(_back(form), 303)


def record(view: View, said: Statement) -> Event:
    """Record a statement.

    Raises:
        BadRequest: It is not allowed; the message says what is.
        NotFound: There is no such feature.
        ReviewError: It cannot be written.
    """
    sae = view.choose_sae(said.sae)
    find_feature(view, sae, said.latent)
    try:
        value, who = clean(said.kind, said.value), clean_who(said.who)
    except ReviewError as error:
        raise BadRequest(f"{str(error)[:1].upper()}{str(error)[1:]}") from None
    log, seen = view.explorer.reviews.log, said.seen
    known = view.reviewed(sae).feature(said.latent)
    if seen and seen not in {event.id for event in known.history}:
        seen = None
    if said.kind == "undo":
        if value not in {event.id for event in known.history}:
            raise BadRequest(f"Undo: latent {said.latent} has no event {value}; take an id from its history")
        return log.undo(who, str(value), seen=seen)
    return log.append(who, sae, said.latent, said.kind, value, seen=seen, direction=lambda: find_direction(view.opened, sae, said.latent))


def _checked_who(text: str) -> str:
    try:
        return clean_who(text)
    except ReviewError as error:
        raise BadRequest(f"Your name: {str(error).partition(': ')[2]}") from None


def _back(form: Mapping[str, str]) -> str:
    """Return the page of this explorer to which a form leads back."""
    back = form.get("back", "")
    is_own = back.startswith(("/features/", "/review")) and back.isprintable() and "\\" not in back
    return back if is_own else "/review"


def _remember(address: str, who: str) -> Response:
    answer = RedirectResponse(address, 303)
    answer.set_cookie(WHO, quote(who, safe=""), max_age=31_536_000, path="/", httponly=True, samesite="strict")
    return answer


@router.get("/review/log", include_in_schema=False)
def log_page(request: Request, explorer: TheExplorer, query: Annotated[LogQuery, Parameters()]) -> Response:
    """Show everything that was said, the latest first."""
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
        reviewed = view.reviewed(sae)
        events, more = _events_before(reviewed, query.before)
        shown = {
            "events": events,
            "next": events[-1].id if more else None,
            "known": reviewed.known,
            "flags": FLAGS,
            "who": find_who(request),
        }
        return view.render("review_log.html", sae, query=query, reviewed=reviewed, is_open=not is_closed(explorer), **shown)


def _events_before(reviewed: Reviewed, before: str | None) -> tuple[list[Event], bool]:
    """Return a page of events, and whether there are more."""
    first = 0
    if before is not None:
        found = reviewed.state.event(before)
        if found is None:
            raise BadRequest(f"before: there is no event {before}; take an address from the links to other pages")
        first = reviewed.events.index(found) + 1
    events = reviewed.events[first : first + N_EVENTS]
    return events, first + N_EVENTS < len(reviewed.events)


@router.get("/review/lists", include_in_schema=False)
def lists_page(request: Request, explorer: TheExplorer, query: Annotated[Query, Parameters()]) -> Response:
    """Show the lists that people made."""
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
        reviewed = view.reviewed(sae)
        lists = [(name, sum(key[0] == sae for key in keys), len(keys)) for name, keys in reviewed.lists.items()]
        return view.render("review_lists.html", sae, reviewed=reviewed, lists=lists)


@router.get("/review/orphans", include_in_schema=False)
def orphans_page(request: Request, explorer: TheExplorer, query: Annotated[Query, Parameters()]) -> Response:
    """Show what was said of features of other SAEs that are not found in this one."""
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
        return view.render("review_orphans.html", sae, reviewed=view.reviewed(sae), flags=FLAGS)


@router.get("/review/export.csv", include_in_schema=False)
def export(request: Request, explorer: TheExplorer, query: Annotated[ExportQuery, Parameters()]) -> Response:
    """Download what is said now, under the latents of one SAE, or every event."""
    with explorer.open(request) as view:
        reviewed = view.reviewed(view.choose_sae(query.sae))
        if query.what == "state" and reviewed.is_pending:
            raise HTTPException(503, "Features that were reviewed in other SAEs are still being searched; try again in some seconds.")
        data = to_csv(reviewed.state, reviewed.followed) if query.what == "state" else history_to_csv(reviewed.state)
        return Response(data, media_type="text/csv; charset=utf-8", headers=as_download(f"reviews-{query.what}.csv"))


@router.post("/review/import", include_in_schema=False, dependencies=WRITES)
def import_page(request: Request, explorer: TheExplorer, form: TheForm, file: Annotated[UploadFile, File()]) -> Response:
    """Import a CSV file, all of it or nothing."""
    who = _checked_who(form["who"] if "who" in form else find_who(request) or "")
    with explorer.open(request) as view:
        sae = view.choose_sae(form.get("sae") or None)
        sizes = {name: run["n_latents"] for name, run in view.opened.saes.items()}
        reviewed = view.reviewed(sae)
        followed = None if reviewed.is_pending else reviewed.followed
        log = explorer.reviews.log
        try:
            found = from_csv(log, file.file.read(), who, sizes, lambda sae, latent: find_direction(view.opened, sae, latent), followed)
        except ReviewError as error:
            raise BadRequest(str(error)) from None
        view._reviewed.clear()
        return view.render("review_imported.html", sae, imported=found)


@router.get("/api/review/csrf", tags=["reviews"])
def csrf_json(request: Request) -> Response:
    """The token that a program sends as X-CSRF-Token, with the cookie of this answer, when it says something of a feature."""
    return Json({"csrf": form_token(request)})


@router.get("/api/review/log", tags=["reviews"])
def log_json(request: Request, explorer: TheExplorer, query: Annotated[LogQuery, Parameters()]) -> Response:
    """Everything that was said, the latest first, with the address of the next page."""
    with explorer.open(request) as view:
        events, more = _events_before(view.reviewed(view.choose_sae(query.sae)), query.before)
        address = link("/api/review/log", sae=query.sae, before=events[-1].id) if more else None
        return Json({"events": [_event_json(event) for event in events], "next": address})


@router.get("/api/review/{sae}/{latent}", tags=["reviews"])
def feature_review_json(request: Request, explorer: TheExplorer, sae: str, latent: int) -> Response:
    """What people say of a feature now, and everything that was said."""
    with explorer.open(request) as view:
        sae = view.choose_sae(sae)
        find_feature(view, sae, latent)
        return Json(_said_json(view.reviewed(sae), latent))


@router.post("/api/review/event", tags=["reviews"], dependencies=[Depends(check_program), Depends(check_writable)], status_code=201)
def add_event_json(request: Request, explorer: TheExplorer, said: Statement) -> Response:
    """Say something of a feature."""
    with explorer.open(request) as view:
        return Json(_event_json(record(view, said)), 201)


def _event_json(event: Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in ("id", "at", "who", "sae", "latent", "kind", "value", "seen")}


def _said_json(reviewed: Reviewed, latent: int) -> dict[str, Any]:
    said = reviewed.feature(latent)
    return {
        "sae": reviewed.sae,
        "latent": latent,
        "name": said.name,
        "rating": said.rating,
        "ratings": {who: event.value for who, event in said.ratings.items()},
        "flags": {reason: list(by) for reason, by in said.flags.items()},
        "lists": list(said.lists),
        "comments": [_event_json(event) for event in said.comments],
        "conflicts": {kind: [event.id for event in events] for kind, events in said.conflicts.items()},
        "history": [_event_json(event) for event in said.history],
        "undone": {event_id: event.id for event_id, event in said.undone.items()},
        "last": said.last,
        "is_pending": reviewed.is_pending,
    }
