"""Proves in a real browser that the pages of classes, comparisons and runs are accessible, fit a phone, and answer without JavaScript."""

import pytest

from support.browser import Windows, assert_accessible
from support.small_study import NAMES

WIDE, NARROW = NAMES
PAGES = ("/class?name=warm+on+white", f"/compare?a={WIDE}&b={NARROW}&kind=split", f"/runs/{WIDE}?against={NARROW}")
"""Pages beside those of test_browser_pages.py."""


@pytest.mark.parametrize("address", PAGES)
def test_accessible(windows: Windows, explorer: str, address: str) -> None:
    page = windows.open(f"{explorer}{address}", width=360)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it does not scroll sideways on a phone"
    assert_accessible(page)


def test_search_of_classes(windows: Windows, explorer: str) -> None:
    page = windows.open(f"{explorer}/classes")
    page.fill("#f-text", "warm")
    page.wait_for_url("**text=warm**")
    assert page.locator("#results tbody tr").count() == 1
    page.select_option("#f-sort", "n_images")
    page.wait_for_url("**sort=n_images**")
    page.go_back()
    page.wait_for_url(lambda url: "sort=n_images" not in url)
    assert page.input_value("#f-text") == "warm"


def test_choices(windows: Windows, explorer: str) -> None:
    page = windows.open(f"{explorer}/runs/{WIDE}")
    page.select_option("#against", index=1)
    page.wait_for_url("**against=**")
    assert page.locator("text=train.d_sae").count() == 1
    page = windows.open(f"{explorer}/compare", javascript=False)
    page.select_option("#c-kind", "lost")
    page.click("form.filters button")
    assert "kind=lost" in page.url and page.locator(".pairing").count() > 1
