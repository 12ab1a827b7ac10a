"""What every page shares: settings, the view of a request, rendering, addresses, and errors that visitors can mend."""

import difflib
import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import jinja2
from fastapi import Depends, Request
from fastapi.responses import HTMLResponse, Response
from markupsafe import Markup, escape
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_json

from ommatid import __version__
from ommatid.errors import OmmatidError
from ommatid.explorer.heat import Tile
from ommatid.explorer.library import Library, Opened
from ommatid.explorer.model_client import ModelClient
from ommatid.explorer.originals import Originals
from ommatid.explorer.reviewed import Reviewed, Reviews
from ommatid.reviews import Event
from ommatid.show import numbers
from ommatid.show.doses import STATUSES_IN_WORDS

NAVIGATION = (
    ("/features?images_min=16", "Features"),
    ("/classes", "Classes"),
    ("/audit", "Audit"),
    ("/my-image", "My image"),
    ("/compare", "Compare"),
    ("/runs", "Runs"),
    ("/review", "Review"),
    ("/sql", "SQL"),
)
"""Address and name of each page in the bar."""
SERVED = ("/my-image", "/steer", "/attribute", "/search", "/review", "/sql", "/api", "/openapi", "/originals", "/heat")
"""Beginnings of addresses that need a server, and that a static copy lacks."""
SORT_NAMES = {
    "latent": "number",
    "label": "name",
    "label_score": "name score",
    "over_control": "name score − control",
    "auroc": "AUROC of the name",
    "ms": "MS",
    "over_floor": "MS − floor",
    "density": "density",
    "n_images": "images",
    "purity": "purity",
    "label_entropy": "entropy of classes",
    "uniqueness": "uniqueness",
    "max_act": "largest activation",
    "mean_act": "mean activation",
    "effect": "effect",
    "over_best": "effect − best control",
}
"""What pages call the sorts of features."""
TABLE_COLUMNS = (
    ("latent", "latent"),
    ("label", "name"),
    ("label_score", "score"),
    ("over_control", "score − control"),
    ("ms", "MS"),
    ("over_floor", "MS − floor"),
    ("density", "density"),
    ("n_images", "images"),
    ("purity", "purity"),
    ("label_entropy", "classes"),
)
"""Sort and title of each column of the table of features."""
FOREVER = "public, max-age=31536000, immutable"
"""Cache-Control of answers whose address changes with their content."""
STATIC = resources.files("ommatid.explorer") / "static"


@dataclass(frozen=True)
class Settings:
    """How the explorer is run."""

    catalog: Path = Path("data/catalog/catalog.duckdb")
    """The catalogue's DuckDB file."""
    data: str = "data"
    """Root of the study's artefacts, for larger pictures and the model."""
    is_published: bool = False
    """Whether the catalogue is the champion's."""
    is_read_only: bool = False
    """Whether reviews are shown but cannot be written."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8321
    """Port to listen on."""
    token: str | None = field(default=None, repr=False)
    """Token that visitors need; required unless the address is this machine's own."""
    is_static: bool = False
    """Whether the pages are written to files, where nothing that needs a server is shown."""
    only: Mapping[str, Sequence[int]] | None = None
    """Latents that lists show, by SAE; None for all."""


class NotFound(OmmatidError):
    """What an address names does not exist.

    Args:
        message: What was not found.
        near: Text and address of pages that the visitor may have meant.
    """

    def __init__(self, message: str, near: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.near = near or {}


class BadRequest(OmmatidError):
    """A parameter of an address, or a field of a form, is not allowed; the message says what is."""


class Json(Response):
    """JSON of anything that an answer of the catalogue holds: bytes as base64, and null for numbers that JSON lacks, such as NaN."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Write a value."""
        return to_json(content, inf_nan_mode="null", bytes_mode="base64", fallback=str)


class Query(BaseModel):
    """Parameters of a page's address. Empty ones, which forms send, count as left out, and unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sae: Annotated[str | None, Field(max_length=500)] = None
    """Name of the SAE; left out: the one with the highest mean MS above its floor."""

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value not in ("", [])} if isinstance(data, dict) else data


@dataclass
class Explorer:
    """The state of the server."""

    settings: Settings
    library: Library
    """The catalogue that pages read."""
    console: Library
    """The same for statements of visitors, in processes of their own, which give way, so that pages never wait for them."""
    model: ModelClient
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    """Key of the tokens in forms; a restart makes a new one."""
    reviews: Reviews = field(init=False)
    """What people say of features, under the root of the artefacts, or under `data` if that is in an object store."""

    def __post_init__(self) -> None:
        root = "data" if "://" in self.settings.data else self.settings.data
        self.reviews = Reviews(Path(root) / "reviews" / "log.jsonl", self.library)

    @contextmanager
    def open(self, request: Request) -> Iterator["View"]:
        """Open the catalogue for a request."""
        with self.library.open() as opened:
            yield View(self, opened, request)

    def close(self) -> None:
        """Close the catalogue, and end the process that holds the model."""
        self.model.close()
        self.library.close()
        self.console.close()

    @property
    def _navigation(self) -> Sequence[tuple[str, str]]:
        if not self.settings.is_static:
            return NAVIGATION
        return (*((address, name) for address, name in NAVIGATION if not address.startswith(SERVED)), ("/all", "Search"))

    @cached_property
    def originals(self) -> Originals:
        """The images in full size."""
        return Originals(self.settings.data)

    def original_url(self, image: int, hash_: str) -> str | None:
        """Address of an image in full size; None if only its thumbnail is at hand."""
        return None if self.settings.is_static or not self.originals.were_at_hand else f"/originals/{image}/{hash_}"

    def draw_card(self, row: Mapping[str, Any], tiles: Sequence[Tile], person: Event | None, note: str | None = None) -> Markup:
        """Draw a feature in a list. This is HTML written by hand, as a template would take most of the time of a page of 50 features.

        Args:
            row: The feature's row of the relation `features`.
            tiles: Its strongest images.
            person: The event by which a person named it; None if nobody did.
            note: What is written below the images; None for nothing.
        """
        url = feature_url(row["sae"], row["latent"])
        pictures = "".join(self.draw_tile(one, row["sae"], row["latent"], url) for one in tiles)
        n = row["n_images"]
        return Markup(
            f'<article class="card" data-latent="{row["latent"]}">\n'
            f'<h3><a href="{escape(url)}">{draw_name(row["label"], person)}</a> <span class="number">{row["latent"]}</span></h3>\n'
            f'<p class="numbers">{draw_scored(row, person)} <span title="MonoSemanticity score, and the score of unrelated images">'
            f'MS {numbers.fixed(row["ms"])} <span class="control">floor {numbers.fixed(row["ms_floor"])}</span></span> '
            f"<span>{numbers.count(n)} image{'' if n == 1 else 's'}</span>{draw_does(row)}</p>\n"
            f'<div class="strip">{pictures}</div>\n'
            f'{f"""<p class="note">{escape(note)}</p>""" if note else ""}</article>\n'
        )

    def draw_tile(self, one: Tile, sae: str | None = None, latent: int | None = None, href: str | None = None) -> Markup:
        """Draw an image with a link, by hand as `draw_card` does.

        Args:
            one: The image.
            sae: The SAE that the image's page is opened with.
            latent: Latent whose heat map is drawn for browsers without JavaScript; None for none.
            href: Address that the tile leads to; None for the page of the image, before which it opens at full size.
        """
        alt = f"image {one.image}{f': {one.label[:80]}' if one.label else ''}"
        parts = [f'<a class="tile" href="{escape(href or image_url(one.image, sae=sae))}" data-image="{one.image}"']
        if not href:
            large = self.original_url(one.image, one.hash)
            parts.append(f' data-zoom data-large="{escape(large)}"' if large else " data-zoom")
        if one.heat:
            parts.append(f' data-heat="{one.heat}" data-grid="{one.rows} {one.cols}" data-seen="{one.seen}"')
        size = f'width="{one.width}" height="{one.height}"'
        sharp = ' class="sharp"' if one.is_small else ""
        parts.append(f'>\n<span class="picture"><img src="{escape(thumb_url(one.image, one.hash))}" {size} loading="lazy" decoding="async"')
        parts.append(f' alt="{escape(alt)}"{sharp}>')
        if one.heat and latent is not None and not self.settings.is_static:
            svg = f"/heat/{_quote(sae or '')}/{latent}/{one.image}.svg"
            parts.append(f'<noscript><img class="over" src="{escape(svg)}" {size} alt=""></noscript>')
        note = one.note or ("" if one.act is None else f"{one.act:.2f}")
        parts.append(f'</span>{f"""<span class="note">{escape(note)}</span>""" if note else ""}</a>')
        return Markup("".join(parts))

    @cached_property
    def templates(self) -> jinja2.Environment:
        """The templates, in which everything from data is escaped."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("ommatid", "explorer/templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        environment.globals |= {
            "settings": self.settings,
            "nav": self._navigation,
            "sort_names": SORT_NAMES,
            "table_columns": TABLE_COLUMNS,
            "version": __version__,
            "asset": asset,
            "link": link,
            "feature_url": feature_url,
            "image_url": image_url,
            "thumb_url": thumb_url,
            "original_url": self.original_url,
            "draw_card": self.draw_card,
            "draw_name": draw_name,
            "draw_score": draw_score,
            "draw_does": draw_does,
            "draw_scored": draw_scored,
            "draw_tile": self.draw_tile,
        }
        environment.filters |= {name: getattr(numbers, name) for name in ("fixed", "percent", "rate", "signed", "short", "count")}
        environment.filters["python"] = as_python
        return environment

    def render(self, request: Request, template: str, status: int = 200, **context: Any) -> HTMLResponse:
        """Render a template as a page."""
        from ommatid.explorer.security import form_token

        values = {
            "request": request,
            "path": request.url.path,
            "opened": None,
            "sae": None,
            "run": None,
            "sae_param": None,
            "sae_page": None,
            "csrf": form_token(request),
            "named": lambda sae, latent: None,
        } | context
        return HTMLResponse(self.templates.get_template(template).render(values), status)


@dataclass
class View:
    """A request, and the catalogue that answers it."""

    explorer: Explorer
    opened: Opened
    request: Request
    _reviewed: dict[str, Reviewed] = field(default_factory=dict)

    def rows(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """Answer a question with a dict for each row."""
        return self.opened.rows(sql, **values)

    def choose_sae(self, name: str | None) -> str:
        """Find an SAE by its name in the catalogue or in its training; None for the best.

        Raises:
            NotFound: There is no SAE of this name.
        """
        saes = self.opened.saes
        if name is None:
            return next(iter(saes))
        if found := next((sae for sae, run in saes.items() if name in (sae, run["name"])), None):
            return found
        near = difflib.get_close_matches(name[:200], saes, n=3, cutoff=0.2) or list(saes)[:3]
        raise NotFound(f"There is no SAE {name[:200]!r} in this catalogue.", {sae: link("/", sae=sae) for sae in near})

    def reviewed(self, sae: str) -> Reviewed:
        """Return what people say of the features of an SAE, the same throughout the request."""
        if sae not in self._reviewed:
            self._reviewed[sae] = self.explorer.reviews.look(self.opened, sae)
        return self._reviewed[sae]

    def named(self, sae: str, latent: int) -> Event | None:
        """Return the event by which a person named a feature; None if nobody did."""
        return self.reviewed(sae).name_of(latent) if sae in self.opened.saes else None

    def render(self, template: str, sae: str | None = None, status: int = 200, **context: Any) -> HTMLResponse:
        """Render a template as a page about an SAE."""
        run = self.opened.saes[sae] if sae else None
        sae_param = None if sae == next(iter(self.opened.saes)) else sae
        context = {"opened": self.opened, "sae": sae, "run": run, "sae_param": sae_param, "named": self.named} | context
        return self.explorer.render(self.request, template, status, **context)


def get_explorer(request: Request) -> Explorer:
    """Return the state of the server that handles a request."""
    return request.app.state.explorer


TheExplorer = Annotated[Explorer, Depends(get_explorer)]


def link(path: str, **parameters: Any) -> str:
    """Make an address; parameters that are None are left out."""
    found = urlencode({name.rstrip("_"): value for name, value in parameters.items() if value is not None}, doseq=True)
    return f"{path}?{found}" if found else path


def draw_name(label: str | None, person: Event | None) -> Markup:
    """Draw the name of a feature: the one that a person gave it, or else the catalogue's.

    Args:
        label: Name in the catalogue; None if it has none.
        person: The event by which a person named it; None if nobody did.
    """
    if person:
        who = escape(person.who)
        by = f'<span class="by" title="named by {who}" role="img" aria-label="named by {who}">✎</span>'
        return Markup(f"<bdi>{escape(_shorten(str(person.value)))}</bdi> {by}")
    return Markup(f"<bdi>{escape(_shorten(label))}</bdi>" if label else '<span class="none">without a name</span>')


def draw_does(row: Mapping[str, Any]) -> Markup:
    """Draw what a tested feature does to the model's output, beside its best control; nothing if it is not tested."""
    if row.get("causal") in (None, "untested"):
        return Markup("")
    effect, control = numbers.signed(row["effect"]), numbers.signed(row["best_control"])
    title = "what setting the latent does to the model's output, and the same under the best control"
    said = f"{STATUSES_IN_WORDS[row['causal']]} {effect}"
    return Markup(f' <span title="{escape(title)}">{said} <span class="control">control {control}</span></span>')


def draw_scored(row: Mapping[str, Any], person: Event | None) -> Markup:
    """Draw the score of the name that a feature is shown with.

    Args:
        row: The feature's row of the relation `features`.
        person: The event by which a person named it, whose name has no score until the catalogue is built again; None if nobody did.
    """
    if person and person.value != row["label"]:
        return Markup('<span class="score none">name not scored yet</span>')
    return draw_score(row["label_score"], row["control_score"])


def draw_score(score: float | None, control: float | None) -> Markup:
    """Draw the score of a name beside its control; None for one that is not known."""
    if score is None:
        return Markup('<span class="score none">name not scored</span>')
    meaning = "balanced accuracy of the name on held-out images; the control is another latent's name on the same images"
    beside = "" if control is None else f' <span class="control">control {numbers.percent(control)}</span>'
    return Markup(f'<span class="score" title="{escape(meaning)}">name {numbers.percent(score)}{beside}</span>')


def _shorten(text: str) -> str:
    return f"{text[:200]}…" if len(text) > 200 else text


def feature_url(sae: str, latent: int, **parameters: Any) -> str:
    """Address of a feature's page."""
    return link(f"/features/{_quote(sae)}/{latent}", **parameters)


@lru_cache(64)
def _quote(sae: str) -> str:
    return quote(sae, safe="")


def image_url(image: int, **parameters: Any) -> str:
    """Address of an image's page."""
    return link(f"/images/{image}", **parameters)


def thumb_url(image: int, hash_: str) -> str:
    """Address of an image's thumbnail."""
    return f"/thumbs/{image}/{hash_}.webp"


def as_python(text: str) -> str:
    """Write a text as a literal of Python: over several lines if it has some, unless a text from data could end the literal."""
    return f'"""\n{text}\n"""' if "\n" in text and '"""' not in text and "\\" not in text else repr(text)


def asset(name: str) -> str:
    """Address of a file in `static`, which changes with the file's content, so that browsers may keep it for ever."""
    return f"/static/{_digests()[name]}/{name}"


def _digests() -> dict[str, str]:
    if not _DIGESTS:
        files = [file for file in STATIC.iterdir() if file.is_file()]
        _DIGESTS.update({file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files})
    return _DIGESTS


_DIGESTS: dict[str, str] = {}
