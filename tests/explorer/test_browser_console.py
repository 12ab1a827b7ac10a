"""Proves in a real browser that the SQL console and the list of the API work by keyboard and mouse, without JavaScript and on a phone."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import expect

from support.browser import Windows, assert_accessible
from support.processes import wait_for
from support.servers import serving_explorer

ENDLESS = "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range + b.range = 7"


@pytest.fixture(scope="module")
def url(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_explorer(hostile, tmp_path_factory.mktemp("console") / "log", is_read_only=True) as server:
        yield server.url


def test_a_statement_by_keyboard_and_mouse(windows: Windows, url: str) -> None:
    page = windows.open(f"{url}/sql")
    assert_accessible(page)
    page.get_by_label("Statement").fill("SELECT latent, ms, density FROM ")
    page.locator("summary", has_text="features").click()
    page.get_by_role("button", name="features", exact=True).click()
    expect(page.get_by_label("Statement")).to_be_focused()
    page.keyboard.type(" WHERE ms IS NOT NULL ORDER BY latent")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("region", name="Answer as a table").get_by_role("row")).to_have_count(5)
    page.get_by_text("Plot two columns").click()
    page.get_by_label("across").select_option("density")
    page.get_by_role("button", name="Plot", exact=True).click()
    expect(page.locator("path.dots")).to_have_count(1)
    expect(page.get_by_label("Statement")).to_have_value("SELECT latent, ms, density FROM features WHERE ms IS NOT NULL ORDER BY latent")
    assert_accessible(page)
    again = windows.open(page.url)
    expect(again.locator("path.dots")).to_have_count(1)
    page.go_back()
    expect(page.locator("path.dots")).to_have_count(0)
    page.get_by_label("Statement").focus()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Run")).to_be_focused()


def test_cancel(windows: Windows, hostile: Path, tmp_path: Path) -> None:
    with serving_explorer(hostile, tmp_path / "log", is_read_only=True) as server:
        page = windows.open(f"{server.url}/sql")
        page.get_by_label("Statement").fill(ENDLESS)
        page.get_by_label("seconds, at most").fill("60")
        cancel = page.get_by_role("button", name="Cancel")
        expect(cancel).to_be_hidden()

        def busy() -> list[psutil.Process]:
            return [child for child in server.process.children(recursive=True) if child.nice() == 10]

        # Playwright waits for the answer before it does anything, so that the page has to press the button itself
        page.evaluate("""setInterval(() => {
            const cancel = document.querySelector("[data-cancel]")
            if (!cancel.hidden && document.querySelector("[data-running]").textContent.includes("3 s")) { cancel.click() }
        }, 100)""")
        page.evaluate("document.querySelector('#editor').requestSubmit()")
        (running,) = wait_for(busy, "the statement to run")
        wait_for(lambda: not running.is_running(), "the end of the statement")
        expect(page.get_by_text("Cancelled.")).to_be_visible()
        wait_for(lambda: not running.is_running(), "the end of the statement")
        expect(page.get_by_label("Statement")).to_have_value(ENDLESS)


def test_without_javascript_and_narrow(windows: Windows, url: str) -> None:
    page = windows.open(f"{url}/sql", javascript=False, width=360)
    page.get_by_label("Statement").fill("SELECT 'plain' AS word")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("cell", name="plain")).to_be_visible()
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    narrow = windows.open(f"{url}/sql?q=SELECT * FROM labels", width=360)
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 360
    wrong = windows.open(f"{url}/sql?q=SELEC 1", 400)
    expect(wrong.get_by_role("alert")).to_contain_text("syntax error")
    expect(wrong.get_by_label("Statement")).to_have_value("SELEC 1")


def test_list_of_the_api(windows: Windows, url: str) -> None:
    page = windows.open(f"{url}/openapi", width=360)
    page.locator("summary", has_text="/api/sql").click()
    expect(page.get_by_role("cell", name="Seconds after which the statement is stopped.")).to_be_visible()
    assert_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
