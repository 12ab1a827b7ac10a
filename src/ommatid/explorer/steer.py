"""The boxes in which a visitor sets latents to doses, and asks which latents speak for a text: their forms, pages and results."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request
from fastapi import Query as Parameters
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError

from ommatid.compute.controls import EXCEEDED_ARMS, N_DRAWS, RANDOM_ARMS
from ommatid.explorer.cards import load_features, load_tiles
from ommatid.explorer.heat import draw_svg, encode, fit
from ommatid.explorer.image import BOX, SMALL, SaeField, Upload, find_image, read_upload
from ommatid.explorer.model import Model, about_model
from ommatid.explorer.model_client import LONGEST_TEXT, AttributedImage, SeenImage, SteeredImage, SteeredName
from ommatid.explorer.security import check_form
from ommatid.explorer.steer_box import N_CHOICES, SteerQuery, make_steer_box
from ommatid.explorer.web import BadRequest, Json, NotFound, TheExplorer, View, link
from ommatid.show import numbers
from ommatid.show.doses import ALL_ARMS
from ommatid.show.svg import Plot, draw_ranges

router = APIRouter()

_STRONGEST = "SELECT image FROM examples WHERE sae = $sae AND latent = $latent ORDER BY act DESC, image LIMIT $n"
_MOST = "SELECT latent, max_act FROM features WHERE sae = $sae AND latent IN (SELECT unnest($latents::INTEGER[]))"


def _check_latents(view: View, sae: str, latents: Sequence[int]) -> None:
    """Refuse latents that the SAE does not have.

    Raises:
        BadRequest: It does not have one.
    """
    n = view.opened.saes[sae]["n_latents"]
    if wrong := [latent for latent in latents if not 0 <= latent < n]:
        raise BadRequest(f"latents: got {str(wrong[0])[:40]}; {sae} has latents 0 to {n - 1:,}.")


def _find_images(view: View, sae: str, query: SteerQuery) -> list[int]:
    """Return the images to choose between, the chosen one among them."""
    found = [row["image"] for row in view.rows(_STRONGEST, sae=sae, latent=query.latents[0], n=N_CHOICES)]
    return found if query.image is None or query.image in found else [query.image, *found[: N_CHOICES - 1]]


def _make_box(view: View, sae: str, query: SteerQuery, images: Sequence[int]) -> dict[str, Any]:
    tiles = load_tiles(view, images)
    return make_steer_box(view, sae, query, [tiles[image] for image in images if image in tiles], load_features(view, sae, query.latents))


def describe_steered(view: View, sae: str, query: SteerQuery, found: SteeredImage, address: str | None = None) -> dict[str, Any]:
    """What a page needs to show what steering did.

    Args:
        view: The request.
        sae: The SAE.
        query: What was asked.
        found: The answer.
        address: Address of the result; None if an image was uploaded for it.
    """
    scales = {one.latent: one.scale for one in found.latents}
    most = {row["latent"]: row["max_act"] for row in view.rows(_MOST, sae=sae, latents=list(scales))}
    at = min(range(len(found.doses)), key=lambda place: abs(found.doses[place] - query.dose))
    (first, *_) = found.latents
    return {
        **_picture(found),
        "heat": encode(first.heat, max(first.heat)) if len(first.heat) and max(first.heat) > 0 else None,
        "latents": found.latents,
        "at": at,
        "doses": [
            {
                "dose": dose,
                "acts": ", ".join(f"{dose * scale:.3g}" for scale in scales.values()),
                "is_beyond": any(dose * scale > (most.get(latent) or scale) * (1 + 1e-6) for latent, scale in scales.items()),
                "said": _say(found, place),
                "rows": [_row(name, place) for name in found.names],
            }
            for place, dose in enumerate(found.doses)
        ],
        "curves": [(name.name, _draw(found, name, at)) for name in _by_interest(found)],
        "measure": found.measure,
        "n_names": found.n_names,
        "n_draws": found.n_draws,
        "by_chance": 2 / (1 + 2 * found.n_draws + 1),  # that a value like those of the controls is the lowest or the highest among them
        "random_arms": RANDOM_ARMS,
        "legend": {arm: text for arm, text in ALL_ARMS.items() if arm == "targeted" or arm in found.names[0].controls},
        "warnings": [*found.warnings, *_missing(found)],
        "address": address,
    }


def _missing(found: SteeredImage) -> list[str]:
    """Say which controls are missing, or are drawn less often than usual, and why."""
    said = []
    if "diff_means" not in found.names[0].controls:
        said.append(
            "there is no difference of means to compare with, as a latent fires on all of the sampled tokens or on none, or the edited "
            "tokens are not those that it reads"
        )
    if found.n_draws < N_DRAWS:
        said.append(
            f"each random control is drawn {found.n_draws} times instead of {N_DRAWS}, as too few other latents fire: its range is wider "
            "than it looks"
        )
    return said


def _picture(found: SeenImage) -> dict[str, Any]:
    """The picture of an image as a data URL, and its sizes in the page."""
    return {
        "picture": f"data:image/webp;base64,{base64.b64encode(found.picture).decode()}",
        "size": fit(found.picture_width, found.picture_height, BOX),
        "small": fit(found.picture_width, found.picture_height, SMALL),
        "is_sharp": max(found.picture_width, found.picture_height) < BOX,
        "grid": f"{found.rows} {found.cols}" if found.rows else None,
        "seen": f"{found.seen_width:.4g} {found.seen_height:.4g}",
    }


def _by_interest(found: SteeredImage) -> list[SteeredName]:
    """Names by whose curve comes first: what the visitor typed, the labels of the latents, and what the highest dose raises most."""
    order = {"text": 0, "label": 1}
    return sorted(found.names, key=lambda name: (order.get(name.kind, 2), name.score - name.scores[-1], name.rank))


def _range(name: SteeredName, place: int) -> tuple[float, float]:
    """Lowest and highest change of a score under the controls at a dose."""
    ends = [end - name.score for arm in EXCEEDED_ARMS if arm in name.controls for end in name.controls[arm][place]]
    return min(ends), max(ends)


def _row(name: SteeredName, place: int) -> dict[str, Any]:
    ends = (*_range(name, place), name.scores[place] - name.score)
    low, high, change = (round(value, 6) + 0.0 for value in ends)  # what is smaller is the noise of sums; 0 is added to −0
    return {
        "name": name.name,
        "kind": name.kind,
        "before": name.rank,
        "after": name.ranks[place],
        "change": change,
        "low": low,
        "high": high,
        "is_beyond": change < low or change > high,
    }


def _say(found: SteeredImage, place: int) -> str:
    """Say in a sentence what a dose does to the name of most interest."""
    name = _by_interest(found)[0]
    row = _row(name, place)
    moved = f"stays at rank {row['after']}" if row["after"] == row["before"] else f"goes from rank {row['before']} to {row['after']}"
    between = f"({numbers.short(row['low'])} to {numbers.short(row['high'])})"
    where = (
        "within the controls" if not row["is_beyond"] else "above every control" if row["change"] > row["high"] else "below every control"
    )
    return f"“\u2068{name.name[:80]}\u2069” {moved} of {found.n_names}; change {numbers.short(row['change'])}, {where} {between}."


def _draw(found: SteeredImage, name: SteeredName, at: int) -> Plot:
    """Draw the change of a name's score by dose, with those of all controls."""
    doses = found.doses

    def change(values: Sequence[float]) -> list[tuple[float, float]]:
        return [(dose, value - name.score) for dose, value in zip(doses, values, strict=True)]

    lines = {arm: change([low for low, _ in ends]) for arm, ends in name.controls.items() if arm not in RANDOM_ARMS}
    bands = {
        arm: [(dose, low - name.score, high - name.score) for dose, (low, high) in zip(doses, name.controls[arm], strict=True)]
        for arm in reversed(RANDOM_ARMS)  # the first is drawn below the others
    }
    title = f"Change of the {found.measure} with “{name.name[:60]}” by dose, and under each control"
    return draw_ranges(title, f"change of the {found.measure}", {**lines, "targeted": change(name.scores)}, bands, at)


def describe_attributed(view: View, sae: str, found: AttributedImage) -> dict[str, Any]:
    """What a page needs to show which latents speak for a text."""
    rows = load_features(view, sae, [one.latent for one in found.latents])
    entries = []
    for one in found.latents:
        if one.latent in rows:
            sign = 1 if one.effect >= 0 else -1
            heat = [sign * value for value in one.heat]
            written = encode(heat, max(heat)) if heat and max(heat) > 0 else None
            svg = draw_svg(written, found.rows, found.cols, (found.seen_width, found.seen_height)) if written else None
            entries.append({"row": rows[one.latent], "effect": one.effect, "estimate": one.estimate, "heat": written, "svg": svg})
    return {
        **_picture(found),
        "sides": [("for", [one for one in entries if one["effect"] > 0]), ("against", [one for one in entries if one["effect"] < 0])],
        "score": found.score,
        "largest": max((abs(one.effect) for one in found.latents), default=0) / abs(found.score) if found.score else None,
        "measure": found.measure,
        "n_firing": found.n_firing,
        "others": found.others,
        "warnings": found.warnings,
    }


def _ask(view: View, sae: str, query: SteerQuery, encoded: bytes, wait: float = 0) -> SteeredImage:
    return view.explorer.model.steer(
        sae, encoded, query.latents, query.dose, query.tokens, query.patch_numbers, query.text_lines, wait=wait
    )


def _read_form(**fields: Any) -> SteerQuery:
    """Check the fields of a form as the parameters of an address are checked."""
    try:
        return SteerQuery.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None


@router.get("/steer", include_in_schema=False)
def steer_page(request: Request, explorer: TheExplorer, query: Annotated[SteerQuery, Parameters()]) -> Response:
    """Show what the model's output does on an image of the data set while latents are set to doses."""
    with explorer.open(request) as view:
        sae, found, image, images = _steer_image(view, query)
        address = _address(query, sae, image)
        result = about_model(lambda: describe_steered(view, sae, query, found(), address))
        box = _make_box(view, sae, query.model_copy(update={"image": image}), images)
        return view.render("steer.html", sae, box=box, result=result, address=address, name=None)


def _steer_image(view: View, query: SteerQuery) -> tuple[str, Any, int, list[int]]:
    """Return the SAE, a function that asks the model, the image, and the images to choose between."""
    sae = view.choose_sae(query.sae)
    _check_latents(view, sae, query.latents)
    query.patch_numbers  # noqa: B018 - fails at once
    images = _find_images(view, sae, query)
    if not images:
        raise NotFound(f"Latent {query.latents[0]} fires on no image; name an image with image=NUMBER.")
    image = images[0] if query.image is None else query.image
    row = find_image(view, image)
    return sae, lambda: _ask(view, sae, query, view.explorer.originals.get(image, row["hash"])[0]), image, images


def _address(query: SteerQuery, sae: str, image: int) -> str:
    given = query.model_dump(exclude_defaults=True, exclude={"sae", "image", *(["patches"] if query.tokens != "patches" else [])})
    return link("/steer", sae=sae, image=image, **given)


@router.post("/steer", include_in_schema=False, dependencies=[Depends(check_form)])
def steer_upload_page(
    request: Request,
    explorer: TheExplorer,
    upload: Upload,
    latents: Annotated[list[str] | None, Form()] = None,
    dose: Annotated[str, Form()] = "",
    tokens: Annotated[str, Form()] = "",
    patches: Annotated[str, Form()] = "",
    texts: Annotated[str, Form()] = "",
    sae: SaeField = None,
) -> Response:
    """Show the same on an uploaded image, which stays in memory."""
    query = _read_form(latents=latents or [], dose=dose, tokens=tokens, patches=patches, texts=texts)
    with explorer.open(request) as view:
        sae, encoded = view.choose_sae(sae or None), read_upload(upload)
        _check_latents(view, sae, query.latents)
        result = about_model(lambda: describe_steered(view, sae, query, _ask(view, sae, query, encoded, wait=60)))
        box = _make_box(view, sae, query, _find_images(view, sae, query))
        return view.render("steer.html", sae, box=box, result=result, address=None, name=upload.filename)


@router.get("/api/steer", tags=["images"])
def steer_json(request: Request, explorer: TheExplorer, query: Annotated[SteerQuery, Parameters()]) -> Response:
    """What the model's output on an image of the data set does while latents are set to doses, beside the controls."""
    with explorer.open(request) as view:
        _, ask, image, _ = _steer_image(view, query)
        found: Model = about_model(ask)
        if found.answer is None:
            return Json({"error": found.problem or str(found.starting)}, 503)
        one: SteeredImage = found.answer
        return Json({"image": image, **{name: value for name, value in vars(one).items() if not name.startswith("picture")}})


@router.post("/attribute", include_in_schema=False, dependencies=[Depends(check_form)])
def attribute_page(
    request: Request,
    explorer: TheExplorer,
    upload: Upload,
    text: Annotated[str, Form(max_length=LONGEST_TEXT)] = "",
    against: Annotated[str, Form(max_length=LONGEST_TEXT)] = "",
    sae: SaeField = None,
) -> Response:
    """Show which latents speak for a text on an uploaded image, or for it against another."""
    if not text.strip():
        raise BadRequest("text: nothing was typed; name what the image may show, such as a truck.")
    with explorer.open(request) as view:
        sae, encoded = view.choose_sae(sae or None), read_upload(upload)
        ask = explorer.model.attribute
        result = about_model(lambda: describe_attributed(view, sae, ask(sae, encoded, text, against, wait=60)))
        return view.render("attribute.html", sae, result=result, text=text, against=against, name=upload.filename)
