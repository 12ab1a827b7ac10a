"""A static copy of the explorer: pages as files, which open from a disk or from any web server.

The pages are those of the application, asked in this process without a socket. Links are followed from the start page, so that pages that
other modules add are in the copy as soon as a page leads to them; a link to what is not in the copy becomes plain text.
"""

import asyncio
import hashlib
import html
import json
import posixpath
import re
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, unquote, urlencode, urljoin, urlsplit

from fastapi import APIRouter, Request
from fastapi import Query as Parameters
from fastapi.responses import Response

from ommatid.errors import ConfigError, QueryError, RunError
from ommatid.events import Listener, Progress, ignore
from ommatid.explorer.app import make_app
from ommatid.explorer.library import Library
from ommatid.explorer.start import LEAST_IMAGES
from ommatid.explorer.web import SERVED, Query, Settings, TheExplorer, feature_url, link
from ommatid.store.filesystem.base import temporary_path, writing

router = APIRouter()

MARK = "ommatid-site.json"
"""File in a copy that says that the folder may be replaced by another copy."""
FOLLOWED = {
    "/features": {"sae", "sort", "order", "state", "causal", "images_min", "over_control", "purity_min", "unmatched", "after"},
    "/classes": {"sae", "page"},
    "/class": {"sae", "name", "show"},
    "/audit": {"sae", "name"},
    "/compare": {"a", "b", "kind"},
}
"""Parameters that addresses which are followed may have, by path; of all other paths, the SAE. With more, lists would be too many."""
AT_ONCE = 4
"""Pages made at the same time: more than reader processes, so that those need not wait."""
_SUFFIXES = (".css", ".js", ".svg", ".webp")
"""Suffixes of what is not a page."""
PAGED = (None, "label", "label_score")
"""Sorts of lists whose pages are all followed; of other lists, the first page is."""
_TAG = re.compile(r'<\w+\b[^>]*?\s(?:href|src)="[^>]*>')
_LINK = re.compile(r'\s(href|src)="([^"]*)"')
_BUTTON = re.compile(r'<a\b[^>]*class="button[^>]*>[^<]*</a>')
_FORM = re.compile(r"<form\b.*?</form>", re.DOTALL)

_ALL = """
    SELECT sae, latent, label, label_score, control_score, ms, ms_floor, n_images FROM features
    WHERE sae = $sae AND CASE WHEN $only IS NULL THEN NOT is_dead ELSE latent IN (SELECT unnest($only::INTEGER[])) END
    ORDER BY ms - ms_floor DESC NULLS LAST, latent
"""
_BEST = f"""
    SELECT latent FROM features WHERE sae = $sae AND NOT is_dead
    ORDER BY n_images >= {LEAST_IMAGES} DESC, ms - ms_floor DESC NULLS LAST, latent LIMIT $most
"""


@dataclass(frozen=True)
class Site:
    """A static copy that was written."""

    n_features: int
    n_pages: int
    n_pictures: int
    n_bytes: int


@router.get("/all", include_in_schema=False)
def all_page(request: Request, explorer: TheExplorer, query: Annotated[Query, Parameters()]) -> Response:
    """Show every feature of the copy in one table, which a script filters as people type."""
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
        return view.render("all.html", sae, sae_page="/all", rows=_in_copy(view.opened, explorer.settings.only, sae))


def write_site(
    catalog: Path,
    out: Path,
    data: str = "data",
    sae: str | None = None,
    latents: Sequence[int] | None = None,
    most: int | None = None,
    on_event: Listener = ignore,
) -> Site:
    """Write a static copy of the explorer.

    The same catalogue gives the same bytes. The folder appears when all of it is written; an earlier copy there is replaced.

    Args:
        catalog: The catalogue's DuckDB file.
        out: Folder to write to.
        data: Root of the study's artefacts, which pages name.
        sae: Name of the SAE whose features are copied; None: all, or with `latents` the best.
        latents: Latents to copy; None for all that fire.
        most: Number of features to copy of each SAE, those with the highest MS above its floor; None for all that fire.
        on_event: Called with progress events.

    Returns:
        Numbers of what was written.

    Raises:
        ConfigError: The folder has something else in it, or a latent does not exist.
        QueryError: There is no such catalogue, or no such SAE in it.
        RunError: A page cannot be made.
        ArtefactError: The folder cannot be written.
    """
    _check_place(out)
    only = _choose(catalog, sae, latents, most)
    settings = Settings(catalog=catalog, data=data, is_read_only=True, is_static=True, only=only)
    folder = temporary_path(out.absolute())
    try:
        with writing(out):
            folder.mkdir(parents=True)
            site = asyncio.run(_copy(settings, folder, on_event))
            mark = {"made_by": "ommatid export site", "features": site.n_features, "pages": site.n_pages, "pictures": site.n_pictures}
            (folder / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
            _replace(folder, out.absolute())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return site


def _check_place(out: Path) -> None:
    """Refuse a folder that holds anything but an earlier copy.

    Raises:
        ConfigError: It does, or it is a file.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARK).exists())):
        raise ConfigError(f"--out {out}: there is something else already; name a new folder, or one that `ommatid export site` wrote")


def _replace(folder: Path, out: Path) -> None:
    if not out.exists():
        folder.rename(out)
        return
    before = temporary_path(out)
    out.rename(before)
    folder.rename(out)
    shutil.rmtree(before)


def _choose(catalog: Path, sae: str | None, latents: Sequence[int] | None, most: int | None) -> dict[str, list[int]] | None:
    """Return the latents to copy by SAE; None for all that fire.

    Raises:
        ConfigError: A latent does not exist.
        QueryError: There is no such SAE.
    """
    library = Library(catalog)
    try:
        with library.open() as opened:
            names = [name for name, run in opened.saes.items() if sae in (None, name, run["name"])]
            if not names:
                known = ", ".join(run["name"] or name for name, run in opened.saes.items())
                raise QueryError(f"--sae: there is no SAE {sae!r} in {catalog}; it has {known}")
            if latents is not None:
                n_latents = opened.saes[names[0]]["n_latents"]
                if wrong := [latent for latent in latents if not 0 <= latent < n_latents]:
                    raise ConfigError(f"--latents: there is no latent {wrong[0]} in {names[0]}; its latents are 0 to {n_latents - 1}")
                return {names[0]: sorted(set(latents))}
            if most is None and sae is None:
                return None
            return {name: [row["latent"] for row in opened.rows(_BEST, sae=name, most=most or 2**31)] for name in names}
    finally:
        library.close()


def _in_copy(opened: Any, only: Mapping[str, Sequence[int]] | None, sae: str) -> list[dict[str, Any]]:
    return opened.rows(_ALL, sae=sae, only=None if only is None else list(only.get(sae, ())))


async def _copy(settings: Settings, folder: Path, on_event: Listener) -> Site:
    app = make_app(settings)
    app.include_router(router)
    explorer = app.state.explorer
    async with app.router.lifespan_context(app):
        with explorer.library.open() as opened:
            saes = list(opened.saes)
            while any(explorer.reviews.look(opened, name).is_pending for name in saes):
                await asyncio.sleep(0.05)  # features that were reviewed in other SAEs are still searched
            copied = [name for name in saes if settings.only is None or name in settings.only]
            pages = [feature_url(name, row["latent"]) for name in copied for row in _in_copy(opened, settings.only, name)]
            only = None if settings.only is None else frozenset(pages)
            copy = _Copy(app, folder, saes[0], only, on_event)
            await copy.follow(["/", *(link("/all", sae=name) for name in copied), *pages])
    n_bytes = copy.finish()
    n_pages = len(copy.pages)
    return Site(len(pages), n_pages, sum(address.startswith("/thumbs/") for address in copy.made), n_bytes)


@dataclass
class _Copy:
    """A copy in the making."""

    app: Callable[..., Any]
    folder: Path
    best: str
    """The SAE that addresses without one are about."""
    only: frozenset[str] | None
    """Addresses of the features in the copy; None for all."""
    on_event: Listener
    made: dict[str, str] = field(default_factory=dict)
    """File of each address that was answered, relative to the folder."""
    pages: list[str] = field(default_factory=list)
    """Addresses of the pages among them."""
    previous: dict[str, str] = field(default_factory=dict)
    """Address of the page of a list that leads to the next one, by that one's address."""
    addresses: dict[str, str | None] = field(default_factory=dict)
    """Address that each link leads to."""

    async def follow(self, starts: Sequence[str]) -> None:
        """Make the pages at these addresses, and all that they lead to."""
        seen = dict.fromkeys(address for start in starts if (address := self._address(start, "/")))
        waiting, running = deque(seen), set()
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                running.add(asyncio.ensure_future(self._make(waiting.popleft())))
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                new = [address for address in task.result() if address not in seen]
                seen.update(dict.fromkeys(new))
                waiting += new
            self.on_event(Progress("export pages and pictures", len(seen) - len(waiting) - len(running), len(seen)))

    def finish(self) -> int:
        """Make the links in all pages relative, and return the bytes of all files."""
        for address in self.pages:
            path = self.folder / self.made[address]
            path.write_text(self._rewrite(address, path.read_text(encoding="utf-8")), encoding="utf-8")
        return sum((self.folder / name).stat().st_size for name in self.made.values())

    async def _make(self, address: str) -> list[str]:
        """Write the answer of an address to its file, and return the addresses that it leads to.

        Raises:
            RunError: The explorer fails to make it.
        """
        status, is_page, content = await _ask(self.app, address)
        if status == 404:
            return []
        if status != 200:
            said = re.search(r'<p class="problem">(.*?)</p>', content.decode(errors="replace"), re.DOTALL)
            raise RunError(f"the page {address} cannot be made ({html.unescape(said[1]) if said else f'status {status}'})")
        self.made[address] = name = _file_of(address)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_page:
            path.write_bytes(content)
            return []
        self.pages.append(address)
        text = _FORM.sub("", content.decode())
        path.write_text(text, encoding="utf-8")
        found = []
        for tag in _TAG.finditer(text):
            for _, value in _LINK.findall(tag[0]):
                if target := self._target(value, address):
                    found.append(target)
                    if 'rel="next"' in tag[0]:
                        self.previous[target] = address
        return list(dict.fromkeys(found))

    def _rewrite(self, address: str, text: str) -> str:
        """Make the links of a page relative; those that lead out of the copy are taken away."""
        here = posixpath.dirname(self.made[address])

        def relative(tag: re.Match[str]) -> str:
            found = _LINK.search(tag[0])
            if found is None or found[2].startswith("#"):
                return tag[0]
            value = html.unescape(found[2])
            target = self.previous.get(address) if 'rel="prev"' in tag[0] else self._target(found[2], address)
            if target in self.made:
                fragment = urlsplit(value).fragment
                path = posixpath.relpath(self.made[target], here) + (f"#{fragment}" if fragment else "")
                return tag[0].replace(found[0], f' {found[1]}="{html.escape(path)}"')
            if target is None and urlsplit(value).scheme in ("http", "https", "data"):
                return tag[0]
            # a link without an address is plain text, whose other attributes would say that it is a link
            return re.sub(r'\s(href|src|aria-label|title|rel)="[^"]*"', "", tag[0])

        return _BUTTON.sub(lambda button: button[0] if ' href="' in button[0] else "", _TAG.sub(relative, text))

    def _target(self, value: str, base: str) -> str | None:
        """Return the address that a link of a page leads to, as `_address` does."""
        if not value.startswith("/"):
            return self._address(html.unescape(value), base)
        if value not in self.addresses:
            self.addresses[value] = self._address(html.unescape(value), base)
        return self.addresses[value]

    def _address(self, value: str, base: str) -> str | None:
        """Return the address that a link leads to, in one spelling; None if it is not followed."""
        parts = urlsplit(urljoin(f"http://site{base}", value))
        parameters = [(name, given) for name, given in parse_qsl(parts.query) if (name, given) != ("sae", self.best)]
        path = parts.path or "/"
        names = dict(parameters)
        if parts.netloc != "site" or path.startswith(SERVED) or names.keys() - FOLLOWED.get(path, {"sae"}):
            return None
        if "after" in names and names.get("sort") not in PAGED:
            return None
        if self.only is not None and re.fullmatch(r"/features/[^/]+/\d+", path) and path not in self.only:
            return None
        return f"{path}?{urlencode(sorted(parameters))}" if parameters else path


async def _ask(app: Callable[..., Any], address: str) -> tuple[int, bool, bytes]:
    """Ask the application for an address, and return the status, whether the answer is a page, and its content."""
    path, _, query = address.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http", "root_path": "",
        "path": unquote(path), "raw_path": path.encode(), "query_string": query.encode(), "headers": [(b"host", b"127.0.0.1")],
        "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    status, headers, content = 500, {}, []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Mapping[str, Any]) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], dict(message["headers"])
        else:
            content.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, headers.get(b"content-type", b"").startswith(b"text/html"), b"".join(content)


def _file_of(address: str) -> str:
    """Name of the file of an address: readable where the address is plain, and never outside the folder."""
    path, _, query = address.partition("?")
    first, *rest = [_plain(unquote(part)) for part in path.split("/") if part] or ["index"]
    if path.endswith(_SUFFIXES):
        return f"{first}/{'-'.join(rest)}"
    return "/".join([first, *rest, *([_digest(query)] if query else [])]) + ".html"


def _plain(part: str) -> str:
    found = re.sub(r"[^A-Za-z0-9._-]", "_", part)[:100].lstrip(".")
    return found if found == part else f"{found}-{_digest(part)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
